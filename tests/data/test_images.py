"""Pictures as people have them: rotated, paletted, transparent, 16-bit, damaged, far too large."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.data import ImageTransform, load_image, open_dataset
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


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3)])
def test_values_up_to_255_are_8_bit_whatever_their_type(dtype, shape):
    assert corner(load_image(np.full(shape, 200, dtype))) == (200, 200, 200)


def test_integers_beyond_8_bit_are_16_bit_or_doubted():
    assert corner(load_image(np.full((2, 2), 65535))) == (255, 255, 255)
    assert corner(load_image(np.full((2, 2), 25700, np.int32))) == (100, 100, 100)
    for top in (256, 1023, 4095, 65536, 2**31):
        with pytest.raises(InputError, match=f"in {top}..{top}, which is neither 8-bit"):
            load_image(np.full((2, 2), top))


def test_floats_of_unclear_range_are_refused():
    assert corner(load_image(np.full((2, 2), 0.5, np.float16))) == (128, 128, 128)
    for array in (np.full((2, 2), 1.2), np.full((2, 2), 8.0), np.array([[-1.0, 1.0]])):
        with pytest.raises(InputError, match=r"0\.\.1 or 0\.\.255"):
            load_image(array)
    for dtype in (complex, object, "U1"):
        with pytest.raises(InputError, match="must hold numbers"):
            load_image(np.zeros((2, 2), dtype))


def test_mode_i_and_f_pictures_have_grey_levels(tmp_path):
    for mode in ("I", "F"):
        Image.new("L", (4, 4), 200).convert(mode).save(tmp_path / f"{mode}.tif")
        assert corner(load_image(tmp_path / f"{mode}.tif")) == (200, 200, 200)
        assert corner(load_image(Image.new("L", (4, 4), 200).convert(mode))) == (200, 200, 200)


@pytest.mark.parametrize(
    "kind,suffix", [("JPEG", ".jfif"), ("AVIF", ".avif"), ("WEBP", ".webp"), ("MPO", ".mpo"), ("TIFF", ".tif")]
)
def test_formats_of_cameras_and_the_web(tmp_path, kind, suffix):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        more = {"append_images": [Image.new("RGB", (16, 16), "red")], "save_all": True} if kind == "MPO" else {}
        Image.new("RGB", (16, 16), (0, 0, 250)).save(tmp_path / name / f"0{suffix}", kind, **more)
    data = open_dataset(tmp_path)
    assert len(data) == 2
    assert np.abs(np.array(corner(data[0][0])) - (0, 0, 250)).max() < 8


def test_a_heic_picture_names_what_reads_it(monkeypatch):
    monkeypatch.setattr("mmkit.data.images._formats", lambda: ("JPEG", "PNG"))
    with pytest.raises(InputError, match="pip install pi-heif"):
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100)


def test_postscript_never_reaches_an_interpreter(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        load_image(tmp_path / "a.png")


def test_a_damaged_exif_block_does_not_hide_the_picture():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert corner(load_image(buffer.getvalue())) == (255, 0, 0)


def test_the_callers_picture_is_not_handed_back():
    mine = Image.new("RGB", (2, 2))
    load_image(mine).putpixel((0, 0), (9, 9, 9))
    assert corner(mine) == (0, 0, 0)


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (1_000_000, 1)])
def test_long_strips_allocate_no_gigabytes(size):
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    assert len(file.getvalue()) < 3000
    ImageTransform(224)(Image.new("RGB", (9, 9)))  # libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"resized to cover 224x224, is .* million pixels; the limit is 64 million"):
        ImageTransform(224)(file.getvalue())
    assert ImageTransform(224, train=True)(file.getvalue()).shape == (3, 224, 224)
    assert ImageTransform(224, crop_mode="squash")(file.getvalue()).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000)])
@pytest.mark.parametrize("mode", ["border", "pad"])
def test_a_strip_that_shrinks_to_nothing_is_said(size, mode):
    with pytest.raises(InputError, match="cannot be prepared"):
        ImageTransform(224, crop_mode=mode)(Image.new("RGB", size))


def test_the_evaluation_transform_is_timm_s_for_each_of_its_configurations():
    import timm
    from timm.data import create_transform, resolve_data_config

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    configs = {}
    for name in timm.list_pretrained():
        config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        configs.setdefault(repr(sorted(config.items())), config)
    shapes = set()
    for config in configs.values():
        ours, theirs = ImageTransform.of(config), create_transform(**config)
        assert repr(ours._steps) == repr(theirs)
        kind = (
            config["crop_mode"],
            config["interpolation"],
            config["crop_pct"] < 1,
            len(set(config["input_size"][1:])),
        )
        if kind not in shapes and (max(config["input_size"]) <= 384 or config["crop_mode"] == "border"):
            shapes.add(kind)
            assert torch.equal(ours(image), theirs(image)), config
    assert {mode for mode, *_ in shapes} == {"center", "squash", "border"}


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size,crop_pct", [((32, 32), 0.875), ((48, 40), 1.0), ((40, 40), 1.15)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_evaluation_transform_equals_timm(interpolation, size, crop_pct, crop_mode):
    from timm.data import create_transform

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    kw = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    assert torch.equal(ImageTransform(size, **kw)(image), create_transform((3, *size), **kw)(image))


def test_padding_puts_the_picture_into_the_upper_left_corner():
    image = Image.fromarray(np.full((30, 60, 3), 255, dtype=np.uint8))
    padded = ImageTransform(40, (0.5,) * 3, (0.5,) * 3, crop_mode="pad")(image)
    assert torch.equal(padded[:, :20], torch.ones(3, 20, 40))
    assert padded[:, 20:].abs().max() < 0.01
    assert pickle.loads(pickle.dumps(ImageTransform(40, crop_mode="pad")))(image).shape == (3, 40, 40)


def test_random_interpolation_of_a_configuration_is_bilinear():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    assert torch.equal(
        ImageTransform(32, interpolation="random")(image), ImageTransform(32, interpolation="bilinear")(image)
    )


def test_transform_of_a_backbone_and_training_variation():
    info = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 24, 32), "interpolation": "bilinear"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    plain, train = ImageTransform.of(info), ImageTransform.of(info, train=True, hflip=0.0)
    assert plain(image).shape == train(image).shape == (3, 24, 32)
    assert torch.equal(plain(image), plain(np.asarray(image)))
    assert not torch.equal(train(image), train(image))
    assert (plain.train, train.hflip) == (False, 0.0)
    assert ImageTransform(16, (0.5,), (0.5,))(image).shape == (1, 16, 16)


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"std": (0, 1, 1)}, {"interpolation": "cubic"}, {"crop_pct": 0}, {"crop_mode": "centre"}]
)
def test_bad_transforms(bad):
    with pytest.raises(InputError):
        ImageTransform(**bad)
