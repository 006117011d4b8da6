"""Masks as pictures, cut-outs, polygons and run lengths."""

import json

import numpy as np
import pytest
from PIL import Image

from mmkit.errors import InputError
from mmkit.vision.clicks.metrics import iou
from mmkit.vision.clicks.result import mask_to_rle, rle_to_mask


def test_masks_export_to_rle_polygons_and_cutouts(session, tmp_path):
    session.add_click(20, 20)
    mask = session.add_click(40, 20)
    assert (rle_to_mask(mask.rle()) == mask.binary).all()
    assert len(mask.polygons()) == 2
    assert mask.save(tmp_path / "m.png").exists()
    soft, hard = Image.open(tmp_path / "m.png"), mask.cutout(soft=False)
    assert soft.mode == "RGBA"
    assert abs((np.asarray(soft)[..., 3] > 127).sum() - mask.binary.sum()) < 20
    assert ((np.asarray(hard)[..., 3] == 255) == mask.binary).all()
    assert json.loads(mask.save(tmp_path / "m.json").read_text())["segmentation"]["size"] == [40, 60]
    assert (np.load(mask.save(tmp_path / "m.npy")) == mask.binary).all()
    assert mask.plot().size == (60, 40)
    with pytest.raises(InputError, match="suffix"):
        mask.save(tmp_path / "m.txt")
    for rle in ({"size": [2, 2], "counts": [1]}, {"counts": [1]}, {"size": [2, 2], "counts": "04"}):
        with pytest.raises(InputError, match="counts"):
            rle_to_mask(rle)


def test_a_mask_without_an_estimate_is_saved_as_plain_json(session, tmp_path):
    path = session.add_click(20, 20).save(tmp_path / "m.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["predicted_iou"] is None


def test_a_cutout_hides_nothing_behind_its_transparency(session):
    session.set_image(np.full((40, 60, 3), 77, np.uint8))
    pixels = np.asarray(session.add_click(20, 20).cutout())
    assert (pixels[pixels[..., 3] == 255][:, :3] == 77).all()
    assert (pixels[pixels[..., 3] == 0] == 0).all()


def test_an_overlay_tints_the_inside_outlines_it_and_leaves_the_rest(session):
    overlay = np.asarray(session.add_click(20, 20).overlay((0, 0, 228), opacity=0.5))
    assert overlay[20, 20].tolist() == [64, 64, 178]
    assert overlay[20, 26].tolist() == [0, 0, 228]
    assert overlay[20, 27].tolist() == [128, 128, 128]


def test_a_mask_follows_its_picture_to_another_size(session):
    mask = session.add_click(20, 20)
    large = mask.resized(Image.new("RGB", (180, 120)))
    assert large.cutout().size == (180, 120)
    assert large.iou is mask.iou
    assert iou(large.binary, np.kron(mask.binary, np.ones((3, 3), bool))) > 0.9


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool)])
def test_rle_round_trip(mask):
    assert (rle_to_mask(mask_to_rle(mask)) == mask).all()


def test_rle_counts_start_with_background_column_by_column():
    mask = np.array([[1, 0], [1, 0]], bool)
    assert mask_to_rle(mask) == {"size": [2, 2], "counts": [0, 2, 2]}
