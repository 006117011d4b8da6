"""Folders of images and masks: which numbers are classes, which are ignored, and the names that nnU-Net gives its folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.errors import InputError
from mmkit.vision.medical import IGNORED, find_pairs, load_labels

SIDE = 16


def write(
    folder: Path, masks: Sequence[np.ndarray], parts: tuple[str, str] = ("images", "masks"), tail: str = ""
) -> Path:
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, mask in enumerate(masks):
        Image.fromarray(rng.integers(0, 256, (*mask.shape, 3), np.uint8)).save(folder / parts[0] / f"{i}{tail}.png")
        Image.fromarray(mask).save(folder / parts[1] / f"{i}.png")
    return folder


def mask(*values: int) -> np.ndarray:
    """Stripes of these numbers."""
    return np.repeat(np.array(values, np.uint8), SIDE * SIDE // len(values) + 1)[: SIDE * SIDE].reshape(SIDE, SIDE)


@pytest.mark.parametrize(
    ("masks", "classes", "count", "ignore"),
    [
        ([mask(0, 1, 2, 255), mask(0, 1)], None, 3, 255),
        ([mask(0, 1, 255), mask(0, 1)], None, 2, 255),
        ([mask(0, 1, 255), mask(0, 1)], ["background", "cell"], 2, 255),
        ([mask(0, 255), mask(0, 255)], None, 2, None),
        ([mask(0, 255), mask(0, 1)], ["background", "cell"], 2, None),  # everything above zero, as promised
        ([mask(0, 1, 2, 3, 255)] * 2, ["background", "cell"], 2, None),  # object numbers
        ([mask(0, 1)] * 2, ["background", "a", "b"], 3, 255),
        ([mask(0, 2), mask(0, 2)], None, 2, None),
        ([mask(1, 2), mask(1, 2)], None, 3, None),
    ],
)
def test_255_is_ignored_where_it_can_mean_nothing_else(
    tmp_path: Path, masks: list[np.ndarray], classes: list[str] | None, count: int, ignore: int | None
):
    write(tmp_path, masks)
    if classes:
        (tmp_path / "classes.txt").write_text("\n".join(classes))
    pairs = find_pairs(tmp_path)
    assert len(pairs.class_names) == count
    assert pairs.ignore == ignore
    for (_, labels), stripes in zip(pairs.cases(), masks, strict=True):
        if count > 2 or ignore:
            assert labels.tolist() == np.where(stripes == 255, IGNORED, stripes.astype(int)).tolist()
        else:
            assert labels.tolist() == (stripes > 0).astype(int).tolist()


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        ([mask(0, 255), mask(0, 1)], "none 1 and 255: whether 255 is the foreground or ignored is unclear"),
        ([mask(0, 30, 255)], "grey borders"),
        ([mask(0, 1, 3, 255)], "classes that no mask holds, are named there"),
        ([mask(0, 128, 255)], "numbers up to 255"),
        ([mask(255)], "numbers up to 255"),
    ],
)
def test_what_255_means_is_not_guessed(tmp_path: Path, masks: list[np.ndarray], told: str):
    write(tmp_path, masks)
    with pytest.raises(InputError, match=told):
        find_pairs(tmp_path)


def test_grey_borders_of_one_class_stay_foreground(tmp_path: Path):
    soft = np.tile(np.array([0, 30, 60, 90, 120, 150, 180, 210, 240, 255, 255, 255, 255, 255, 255], np.uint8), (16, 1))
    write(tmp_path, [soft, mask(0, 255)])
    (tmp_path / "classes.txt").write_text("background\ncell\n")
    pairs = find_pairs(tmp_path)
    assert pairs.ignore is None
    assert pairs.case(pairs.train[0])[1].sum() == (soft >= 128).sum()


def test_class_255_of_256_names_is_a_class(tmp_path: Path):
    write(tmp_path, [mask(0, 255)])
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i}" for i in range(256)))
    pairs = find_pairs(tmp_path)
    assert pairs.ignore is None
    assert pairs.case(pairs.train[0])[1].max() == 255


def test_labels_are_read_with_a_number_to_ignore():
    found = load_labels(np.array([[0.0, 2, 7]], np.float32), 3, 7)
    assert found.dtype == np.int16
    assert found.tolist() == [[0, 2, IGNORED]]
    assert load_labels(np.array([[0, 5, 7]], np.uint8), 2, 7).tolist() == [[0, 1, IGNORED]]
    assert load_labels(np.array([[0, 1]], np.uint8), 3, 7).dtype == np.uint8
    with pytest.raises(InputError, match=r"0\.\.2"):
        load_labels(np.array([[0, 255]], np.uint8), 3, 7)


def nnunet(folder: Path, labels: object, **more: object) -> Path:
    write(folder, [mask(0, 1, 2), mask(0, 1)], ("imagesTr", "labelsTr"), "_0000")
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))
    return folder


@pytest.mark.parametrize(
    ("labels", "names", "ignore"),
    [
        ({"background": 0, "liver": 1, "tumour": 2}, ("background", "liver", "tumour"), 255),
        ({"0": "background", "2": "tumour", "1": "liver"}, ("background", "liver", "tumour"), 255),
        ({"background": 0, "liver": 1, "ignore": 2}, ("background", "liver"), 2),
    ],
)
def test_folders_of_nnunet_are_known(tmp_path: Path, labels: dict[str, object], names: tuple[str, ...], ignore: int):
    folder = nnunet(tmp_path / "d", labels)
    pairs = find_pairs(folder)
    assert (pairs.class_names, pairs.ignore, pairs.held) == (names, ignore, None)
    assert [image.name for image, _ in pairs.train] == ["0_0000.png", "1_0000.png"]
    wanted = [2, 0] if ignore == 255 else [0, round(256 / 3)]
    found = pairs.case(pairs.train[0])[1]
    assert (found == 2).any() == (ignore == 255)
    assert (found == IGNORED).any() == (ignore == 2), wanted
    write(folder, [mask(0, 1)], ("imagesTs", "labelsTs"), "_0000")
    assert len(find_pairs(folder).held or []) == 1
    for path in (folder / "labelsTs").iterdir():
        path.unlink()
    (folder / "labelsTs").rmdir()
    assert find_pairs(folder).held is None, "published test images come without masks"


def test_channels_regions_and_masks_without_images_are_told(tmp_path: Path):
    folder = nnunet(tmp_path / "d", {"background": 0, "whole": [1, 2], "core": 2})
    with pytest.raises(InputError, match="regions of several numbers"):
        find_pairs(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset\.json is damaged"):
        find_pairs(folder)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 2}}))
    with pytest.raises(InputError, match="must number the classes 0, 1, 2"):
        find_pairs(folder)
    (folder / "dataset.json").write_text(json.dumps({"images": []}))  # another program's
    assert find_pairs(folder).class_names == ("background", "class 1", "class 2")
    Image.new("L", (4, 4)).save(folder / "labelsTr" / "9.png")
    with pytest.warns(UserWarning, match=r"1 of 3 masks .* have no image .* and are not used: 9\.png"):
        find_pairs(folder)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "imagesTr" / "0_0001.png")
    with pytest.raises(InputError, match=r"0_0001\.png is another channel of the image 0"):
        find_pairs(folder)


def test_cases_beyond_the_limit_are_read_again_and_are_the_same(tmp_path: Path):
    pairs = find_pairs(write(tmp_path, [mask(0, 1, 2, 255), mask(0, 1), mask(2, 0), mask(1, 0)]))
    all_kept, one_kept, none = pairs.cases(), pairs.cases(kept=4 * SIDE * SIDE + 2 * SIDE * SIDE), pairs.cases(kept=0)
    assert [len(c._shelf.stored) for c in (all_kept, one_kept, none)] == [4, 1, 0]
    for first, second, third in zip(all_kept, one_kept, none, strict=True):
        for a, b, c in zip(first, second, third, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    assert all_kept.ignored == pytest.approx((mask(0, 1, 2, 255) == 255).sum() / (4 * SIDE * SIDE))
    assert none.pixels.sum(1).tolist() == [256 - (mask(0, 1, 2, 255) == 255).sum(), 256, 256, 256]
    kinds = {type(v) for facts in none.facts for v in (*facts.pixels, *facts.shape, facts.mean, facts.std)}
    assert kinds == {int, float}, "small tensors that stay keep the heap between the pictures from being used again"
    block = {
        c.untyped_storage().data_ptr() for kept in all_kept._shelf.stored.values() for c in (kept.pixels, kept.labels)
    }
    assert len(block) == 1, "what stays lies together, not between what goes"
    assert none.part([2]).describe(0).endswith("2.png")
