"""Volumes and label maps: what cannot be used is named."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from PIL import Image

from mmkit.errors import InputError
from mmkit.vision.medical.metrics import dice
from mmkit.vision.medical.volumes import Volume, load_labels, load_volume


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
