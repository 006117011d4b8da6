"""Interactive segmentation: a session of clicks, its history, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit
from mmkit.errors import InputError
from mmkit.vision.clicks.model import SqueezeSAM
from mmkit.vision.clicks.pipeline import InteractiveSegmenter
from mmkit.vision.clicks.result import Mask

PICTURE = np.full((40, 60, 3), 128, np.uint8)


def test_clicks_undo_redo_and_reset(session):
    one = session.add_click(20, 20).binary
    two = session.add_click(24, 20, positive=False).binary
    assert one.sum() > two.sum() > 0
    assert session.clicks == [(20, 20, True), (24, 20, False)]
    assert (session.undo().binary == one).all()
    assert (session.redo().binary == two).all()
    session.redo()
    assert session.undo() is not None
    assert session.undo() is None
    assert session.undo() is None
    session.add_click(5, 5)
    assert session.clicks == [(5, 5, True)]
    session.reset()
    assert session.mask is None
    assert session.clicks == []


def test_a_new_picture_forgets_the_clicks(session):
    session.add_click(20, 20)
    session.set_image(np.zeros((10, 10, 3), np.uint8))
    assert session.mask is None
    assert session.clicks == []
    assert session.undo() is None


@pytest.mark.parametrize("x, y", [(-1, 0), (60, 0), (0, 40), (float("nan"), 3)])
def test_clicks_outside_are_refused_and_change_nothing(session, x, y):
    session.add_click(1, 1)
    with pytest.raises(InputError, match="outside"):
        session.add_click(x, y)
    assert session.clicks == [(1, 1, True)]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ({"points": [(1, 1)], "labels": [7]}, "labels must lie"),
        ({"points": [(1, 1)], "labels": [1.5]}, "labels must lie"),
        ({"points": [(1, 1)], "labels": ["in"]}, "one number per point"),
        ({"points": [(1, 1), (2, 2)], "labels": [1]}, "2 points but 1"),
        ({"points": [(-1, -1)], "labels": [-1]}, "at least one point or a box"),
        ({"points": [3, 3]}, "pairs"),
        ({"points": [(3, 3, 3)]}, "pairs"),
        ({"points": "here"}, "pairs"),
        ({"points": [("a", 3)]}, "pairs"),
        ({"points": [(60, 3)]}, "outside the picture of 60x40"),
        ({"points": [(3, 3)], "labels": [2]}, "two points labelled 2 and 3"),
        ({"points": [(3, 3), (9, 9)], "labels": [2, 3], "box": (1, 1, 5, 5)}, "one only"),
        ({"box": (1, 2, 3)}, "x0, y0, x1, y1"),
        ({"box": (1, 2, 61, 9)}, "outside the picture of 60x40"),
        ({"box": (3, 3, 3, 9)}, "empty"),
    ],
)
def test_malformed_prompts_are_explained(session, prompt, message):
    session.add_click(1, 1)
    with pytest.raises(InputError, match=message):
        session.predict_many([prompt])
    assert session.clicks == [(1, 1, True)]
    with pytest.raises(InputError, match=message):
        session(PICTURE, **{"points": (), **prompt})


def test_corner_labels_are_the_box_and_the_far_edges_count(session):
    session(PICTURE, [(30, 25), (4, 4), (3, 9), (-1, -1)], labels=[3, 1, 2, -1])
    assert session.box == (3, 9, 30, 25)
    assert session.clicks == [(4, 4, True)]
    session.set_box(60, 40, 0, 0)
    assert session.box == (0, 0, 59, 39)


def test_misuse_is_explained(session):
    for prompts in ([], [3], [{"point": (1, 1)}]):
        with pytest.raises(InputError, match="predict_many takes"):
            session.predict_many(prompts)
    with pytest.raises(InputError, match="model must be"):
        InteractiveSegmenter(np.zeros(3))
    with pytest.raises(InputError, match="empty"):
        session.set_box(3, 3, 3, 9)
    with pytest.raises(InputError, match="no mask yet"):
        session.reset() or session.cutout()
    with pytest.raises(InputError, match="set_image"):
        InteractiveSegmenter(session.predictor.engine).add_click(1, 1)
    with pytest.raises(InputError, match="not a promptable"):
        InteractiveSegmenter(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="expected logits"):
        InteractiveSegmenter(lambda image, points, labels: np.zeros((3, 3)))(PICTURE, [(1, 1)])
    with pytest.raises(InputError, match="expected logits"):
        InteractiveSegmenter(lambda image, points, labels: np.zeros((0, 40, 60)))(PICTURE, [(1, 1)])
    with pytest.raises(InputError, match="NaN"):
        InteractiveSegmenter(lambda image, points, labels: np.full((40, 60), np.nan))(PICTURE, [(1, 1)])


def test_no_points_are_no_points(session):
    assert (session(PICTURE, None).binary == session(PICTURE).binary).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "1"])
def test_every_picture_mode_is_taken(mode, session):
    session.set_image(Image.new(mode, (30, 20)))
    assert session.add_click(5, 5).logits.shape == (20, 30)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10)])
def test_extreme_sizes_are_taken(size):
    model = SqueezeSAM(img_size=32, patch_embed_dim=8, dims=(8, 12), mlp_dim=8, num_heads=2, keep_aspect=True)
    segmenter = InteractiveSegmenter(model)
    segmenter.set_image(Image.new("RGB", size))
    segmenter.propose()
    assert segmenter.mask.logits.shape == size[::-1]


def test_rotated_and_broken_files(session, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    session.set_image(tmp_path / "turned.jpg")
    assert session.image.size == (20, 30)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError):
        session.set_image(tmp_path / "broken.png")
    assert session.image.size == (20, 30)


def test_the_task_is_listed(session):
    assert "interactive-segmentation" in mmkit.list_tasks()
    assert isinstance(mmkit.pipeline("interactive-segmentation", session.predictor.engine)(PICTURE, [(5, 5)]), Mask)


@pytest.mark.parametrize("points", [5, True])
def test_points_that_are_no_list_are_told(session, points):
    with pytest.raises(InputError, match="points must be pairs"):
        session(PICTURE, points)
