"""Pictures as people have them: rotated, paletted, transparent, 16-bit, damaged, far too large."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.data import ImageTransform, load_image
from mmkit.errors import InputError


def corner(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((0, 0))


def test_exif_orientation(tmp_path):
    picture = Image.new("RGB", (6, 4), "blue")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    picture.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == (255, 0, 0)


def test_palette_alpha_grey_and_16_bit(tmp_path):
    Image.new("P", (2, 2), 0).save(tmp_path / "p.png")
    assert load_image(tmp_path / "p.png").mode == "RGB"
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert corner(load_image(clear)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "t.png", transparency=1)
    assert corner(load_image(tmp_path / "t.png")) == (255, 255, 255)
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert corner(load_image(tmp_path / "deep.png")) == (255, 255, 255)
    Image.fromarray(np.full((2, 2), 32768, np.uint16)).save(tmp_path / "half.tif")
    assert corner(load_image(tmp_path / "half.tif")) == (128, 128, 128)
    assert corner(load_image(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert load_image(Image.new("CMYK", (2, 2))).mode == "RGB"


def giant_png() -> bytes:
    """A valid header of a 10^9-pixel picture with almost no data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_billion_pixels_are_refused_before_decoding():
    with pytest.raises(InputError, match=r"1000000000 pixels.*the limit is 64 million"):
        load_image(giant_png())


def test_truncated_and_foreign_files(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:600])
    with pytest.raises(InputError, match=r"cut\.jpg cannot be read"):
        load_image(tmp_path / "cut.jpg")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text\.png"):
        load_image(tmp_path / "text.png")
    with pytest.raises(InputError, match="does not exist"):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize(
    "array,message",
    [
        (np.full((2, 2), np.nan), "NaN"),
        (np.full((2, 2, 3), np.inf), "NaN or infinite"),
        (np.zeros((2, 2, 2), np.uint8), r"\(2, 2, 2\)"),
        (np.zeros((0, 2), np.uint8), "empty"),
        (np.full((2, 2), -5), "negative"),
        (np.full((2, 2), 300.0), "0..1"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(InputError, match=message):
        load_image(array)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size,crop_pct", [(32, 0.875), (48, 1.0)])
def test_evaluation_transform_equals_timm(interpolation, size, crop_pct):
    from timm.data import create_transform

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    theirs = create_transform((3, size, size), interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct)
    ours = ImageTransform(size, mean, std, interpolation, crop_pct=crop_pct)
    assert torch.equal(ours(image), theirs(image))


def test_transform_of_a_backbone_and_training_variation():
    info = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 24, 32), "interpolation": "bilinear"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    plain, train = ImageTransform.of(info), ImageTransform.of(info, train=True, hflip=0.0)
    assert plain(image).shape == train(image).shape == (3, 24, 32)
    assert torch.equal(plain(image), plain(np.asarray(image)))
    assert not torch.equal(train(image), train(image))
    assert (plain.train, train.hflip) == (False, 0.0)
    assert ImageTransform(16, (0.5,), (0.5,))(image).shape == (1, 16, 16)


@pytest.mark.parametrize("bad", [{"size": 0}, {"std": (0, 1, 1)}, {"interpolation": "cubic"}, {"crop_pct": 2}])
def test_bad_transforms(bad):
    with pytest.raises(InputError):
        ImageTransform(**bad)
