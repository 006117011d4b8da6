"""Volumes and label maps: what cannot be used is named."""

from __future__ import annotations

import gzip
import itertools

import nibabel
import numpy as np
import pytest
from PIL import Image

from mmkit.errors import InputError
from mmkit.vision.medical.labels import load_labels
from mmkit.vision.medical.metrics import dice
from mmkit.vision.medical.volumes import Volume, from_ras, load_volume, ras


def test_unusable_volumes_are_named(tmp_path) -> None:
    good = tmp_path / "good.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((30, 30, 30)).astype(np.float32), np.eye(4)), good)
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:4000])
    (tmp_path / "text.nii").write_text("not a volume")
    for name, message in [("cut.nii.gz", "truncated"), ("text.nii", "cannot be read"), ("none.nii", "does not exist")]:
        with pytest.raises(InputError, match=message):
            load_volume(tmp_path / name)
    plain = tmp_path / "plain.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), plain)
    for name, place, value in [("type", 70, 1234), ("size", 42, -5), ("end", 42, 40)]:
        damaged = bytearray(plain.read_bytes())
        damaged[place : place + 2] = value.to_bytes(2, "little", signed=True)
        (tmp_path / f"{name}.nii").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            load_volume(tmp_path / f"{name}.nii")
    nan = np.zeros((4, 4, 4), np.float32)
    nan[1, 1, 1:3] = np.nan, np.inf
    with pytest.raises(InputError, match="2 NaN or infinite"):
        load_volume(nan)
    with pytest.raises(InputError, match="2 NaN or infinite"):
        load_volume(Volume(nan, (1.0, 1.0, 1.0), np.eye(4)))
    with pytest.raises(InputError, match="spacing"):
        load_volume(np.zeros((4, 4, 4)), spacing=(1, float("nan"), 1))
    with pytest.raises(InputError, match="one time point"):
        load_volume(np.zeros((4, 4, 4, 3)))
    assert load_volume(np.zeros((4, 5, 6, 1))).data.shape == (4, 5, 6)
    with pytest.raises(InputError, match="spacing"):
        load_volume(np.zeros((4, 4, 4)), spacing=(1, 0, 1))
    with pytest.raises(InputError, match="real numbers"):
        load_volume(np.zeros((4, 4, 4), complex))


def save(path, data, affine=None):
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_volume_without_the_end_of_its_checksum_is_refused(tmp_path, cut) -> None:
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((20, 20, 20)).astype(np.float32))
    load_volume(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="truncated"):
        load_volume(path)


def test_what_follows_the_voxels_is_bounded(tmp_path) -> None:
    path = save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.float32))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(path.read_bytes() + bytes(70_000_000), 1))
    with pytest.raises(InputError, match="goes on long after"):
        load_volume(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("value", [1e38, -3.4e38, 1e300])
def test_voxels_beyond_any_scanner_are_told_as_what_they_are(tmp_path, value) -> None:
    data = np.zeros((4, 4, 4), np.float64)
    data[1, 2, 3] = value
    for source in (save(tmp_path / "a.nii", data), data):
        with pytest.raises(InputError, match="fill values or damaged"):
            load_volume(source)


def test_channels_are_counted(tmp_path) -> None:
    with pytest.raises(InputError, match="3 channels or time points"):
        load_volume(save(tmp_path / "a.nii", np.zeros((4, 4, 4, 3), np.float32)))
    color = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(InputError, match="3 color channels per voxel"):
        load_volume(save(tmp_path / "b.nii", color))


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1, 0, 1, 1])])
def test_a_matrix_that_says_nothing_is_refused(affine) -> None:
    with pytest.raises(InputError, match="singular or not finite"):
        load_volume(Volume(np.zeros((4, 4, 4), np.float32), (1.0, 1.0, 1.0), affine))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_every_orientation_turns_upright_and_back(order, flips) -> None:
    upright = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    data = upright.transpose(order)[tuple(slice(None, None, f) for f in flips)]
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, flip) in enumerate(zip(order, flips, strict=True)):
        affine[world, axis] = flip * (axis + 1)
    assert np.array_equal(ras(data, affine), upright)
    assert np.array_equal(from_ras(upright, affine), data)


def mask_picture(path, mode, color, size=16, background=0):
    picture = Image.new(mode, (size, size), background)
    picture.paste(color, (4, 4, 8, 8))
    picture.save(path)
    return path


@pytest.mark.parametrize(
    "mode,color", [("RGB", (255, 0, 0)), ("RGB", (0, 1, 0)), ("RGBA", (0, 0, 255, 255)), ("LA", (9, 255))]
)
def test_any_color_on_black_or_clear_is_foreground(tmp_path, mode, color) -> None:
    clear = (255, 255, 255, 0) if mode == "RGBA" else (255, 0) if mode == "LA" else 0
    assert load_labels(mask_picture(tmp_path / "m.png", mode, color, background=clear), 2).sum() == 16


@pytest.mark.parametrize("black,white", [(0, 1), (1, 0), (5, 7)])
def test_a_palette_counts_by_its_colors(tmp_path, black, white) -> None:
    picture = Image.new("P", (16, 16), black)
    picture.putpalette([200, 10, 10] * 8)
    palette = picture.getpalette()
    palette[3 * black : 3 * black + 3] = 0, 0, 0
    picture.putpalette(palette)
    picture.paste(white, (4, 4, 8, 8))
    picture.save(tmp_path / "m.png")
    assert load_labels(tmp_path / "m.png", 2).sum() == 16
    found = load_labels(tmp_path / "m.png", 8)
    assert (found[5, 5], found[0, 0]) == (white, black)


def test_colors_without_black_or_for_many_classes_are_refused(tmp_path) -> None:
    path = mask_picture(tmp_path / "m.png", "RGB", (255, 0, 0), background=(9, 9, 9))
    with pytest.raises(InputError, match="no black background"):
        load_labels(path, 2)
    with pytest.raises(InputError, match="holds 2 colors"):
        load_labels(path, 3)
    assert load_labels(mask_picture(tmp_path / "g.png", "RGB", (2, 2, 2)), 3).max() == 2


def test_lossy_compression_and_resampling_are_no_foreground(tmp_path) -> None:
    for mode, color in (("L", 255), ("RGB", (255, 0, 0)), ("RGB", (255, 255, 255))):
        assert load_labels(mask_picture(tmp_path / "m.jpg", mode, color), 2).sum() == 16
    with pytest.raises(InputError, match="JPEG may blur"):
        load_labels(mask_picture(tmp_path / "m.jpg", "L", 1), 2)
    with pytest.raises(InputError, match="JPEG may change the numbers"):
        load_labels(mask_picture(tmp_path / "m.jpg", "L", 255), 3)
    mask_picture(tmp_path / "m.png", "L", 255)
    Image.open(tmp_path / "m.png").resize((160, 160), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    assert abs(int(load_labels(tmp_path / "large.png", 2).sum()) - 1600) < 60


def test_nearly_whole_numbers_are_whole_and_others_are_shown() -> None:
    true = np.zeros((8, 8, 8), np.float32)
    true[:3], true[3:5] = 1, 2
    assert np.array_equal(load_labels(true * np.float32(0.9999998), 3), true)
    assert load_labels(np.where(true > 0, 1, 1e-7).astype(np.float32), 2).sum() == (true > 0).sum()
    for wrong, shown in ((0.5, "0.5"), (2.25, "2.25"), (np.nan, "nan"), (-1, "-1"), (3, "3")):
        with pytest.raises(InputError, match=rf"0\.\.2; 64 values are not: {shown}"):
            load_labels(np.where(np.arange(8)[:, None, None] == 7, wrong, true), 3)
    with pytest.raises(InputError, match=r"not: 0\.3"):
        load_labels(np.full((2, 2), 0.3), 2)
    with pytest.raises(InputError, match="whole numbers"):
        load_labels(np.full((2, 2), "a"), 2)


def test_labels_and_dice(tmp_path) -> None:
    ids = np.arange(12, dtype=np.uint16).reshape(3, 4) * 100
    Image.fromarray(ids).save(tmp_path / "ids.png")
    assert load_labels(tmp_path / "ids.png", 2).sum() == 11
    with pytest.raises(InputError, match=r"0\.\.2"):
        load_labels(ids, 3)
    a = np.array([[1, 1, 0, 2]])
    assert dice(a, np.array([[1, 0, 0, 2]]), 1) == pytest.approx(2 / 3)
    assert dice(a, a, 5) == 1.0
    with pytest.raises(InputError, match="must be equal"):
        dice(a, a.T, 1)
