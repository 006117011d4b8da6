"""Pyramids in pipelines: pictures of any size, from modules and folders; the authors' pictures of trouble refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import pyramid, shaken

import mmkit
from mmkit.errors import CheckpointError, InputError
from mmkit.vision.piip import PIIP, PIIPFeaturePyramid, PIIPSegmenter, pca_picture


def picture(width: int = 50, height: int = 31) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_features_of_a_picture_of_any_size(tmp_path) -> None:
    model = shaken(PIIPFeaturePyramid(pyramid()))
    result = mmkit.pipeline("dense-features", model)(picture(), size=50)
    assert result.seen == (31, 50)
    shapes = {name: f.shape for name, f in result.features.items()}
    assert shapes == {"branch1": (3, 5, 32), "branch2": (6, 9, 32), "branch3": (8, 13, 32), "merged": (8, 13, 32)}
    assert result.plot().size == (100, 31)
    saved = np.load(result.save(tmp_path / "f.npz"))
    assert np.array_equal(saved["merged"], result.features["merged"])
    small = mmkit.pipeline("dense-features", model)(picture())
    assert max(small.seen) == 24
    with pytest.raises(InputError, match="no 'branch9'"):
        result.pca("branch9")
    for size in (0, 2.5):
        with pytest.raises(InputError, match="size must be a positive whole number"):
            mmkit.pipeline("dense-features", model)(picture(), size=size)


def test_separate_heads_have_no_merged_features() -> None:
    result = mmkit.pipeline("dense-features", PIIP(pyramid(), 3, separate_head=True, pool="avg"))(picture())
    assert result.best == "branch3"


def test_classification_from_a_folder(tmp_path) -> None:
    model = shaken(PIIP(pyramid(), 2, class_names=("cat", "dog")))
    model.save_pretrained(tmp_path / "m")
    for source in (model, tmp_path / "m"):
        result = mmkit.pipeline("image-classification", source)(picture())
        assert set(result.labels) == {"cat", "dog"}
        assert sum(result.scores) == pytest.approx(1, abs=1e-5)


def test_segmentation_has_the_size_of_the_picture(tmp_path) -> None:
    model = shaken(PIIPSegmenter(pyramid(), 3, class_names=("background", "a", "b")))
    model.save_pretrained(tmp_path / "m")
    result = mmkit.pipeline("semantic-segmentation", tmp_path / "m")(picture())
    assert result.mask.shape == (31, 50)
    assert [row["class"] for row in result.measures()] == ["a", "b"]
    assert sum(row["pixels"] for row in result.measures()) == int((result.mask > 0).sum())
    again = mmkit.pipeline("medical-segmentation", model, window=24)(picture())  # other pipelines take it, too
    assert again.mask.shape == (31, 50)


def test_models_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="takes a model that gives every pixel a class"):
        mmkit.pipeline("semantic-segmentation", PIIP(pyramid(), 3))
    with pytest.raises(InputError, match="takes a PIIP model"):
        mmkit.pipeline("dense-features", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="3 classes, but 2 names"):
        mmkit.pipeline("semantic-segmentation", PIIPSegmenter(pyramid(), 3), class_names=("a", "b"))
    (tmp_path / "config.json").write_text('{"model": "Nothing", "config": {}}')
    with pytest.raises(CheckpointError, match="holds no model of mmkit"):
        mmkit.pipeline("dense-features", tmp_path)
    broken = PIIPSegmenter(pyramid(), 2)
    torch.nn.init.constant_(broken.classifier.bias, float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        mmkit.pipeline("semantic-segmentation", broken)(picture())


def test_the_explorer_shows_what_an_interaction_did() -> None:
    model = shaken(PIIPFeaturePyramid(pyramid()))
    explore = mmkit.pipeline("pyramid-explorer", model)
    view = explore(picture(), img_sizes=(12, 24, 48), interaction=1, pair=2)
    assert [f.shape for f in view.after] == [(2, 3, 32), (4, 6, 32), (8, 12, 32)]
    reads = view.reads["larger reads smaller"]
    assert (reads.query_grid, reads.feature_grid) == ((4, 6), (8, 12))
    assert reads.places.shape == (24, 4, 2, 2)
    assert np.allclose(reads.weights.sum(-1), 1)
    assert min(view.changed(b) for b in (1, 2, 3)) > 0
    assert view.reads_image("smaller reads larger", (0.9, 0.1), 100).size == (100, 62)
    with pytest.raises(InputError, match="interactions 0 to 1, no 2"):
        explore(picture(), interaction=2)
    with pytest.raises(InputError, match="3 branches, but 2 sizes"):
        explore(picture(), img_sizes=(12, 24))
    with pytest.raises(InputError, match="place must be"):
        view.reads_image("smaller reads larger", (2, 0))


def test_the_bundled_pyramid_finds_drawn_nuclei() -> None:
    from mmkit.data.drawn.scans import sample_picture

    image, mask = sample_picture(7)
    found = mmkit.pipeline("semantic-segmentation")(image).mask > 0
    assert 2 * (found & (mask > 0)).sum() / (found.sum() + (mask > 0).sum()) > 0.6
    assert mmkit.pipeline("dense-features")(image).features["merged"].shape == (32, 32, 128)


def test_principal_directions_show_what_differs() -> None:
    features = np.zeros((4, 6, 5), np.float32)
    features[:, 3:] = [1, 2, 0, 0, 3]
    shown = np.asarray(pca_picture(features))
    assert shown.shape == (4, 6, 3)
    assert np.ptp(shown[:, :3], axis=(0, 1)).max() == 0
    assert abs(int(shown[0, 0, 0]) - int(shown[0, 5, 0])) == 255


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_antialiased_pyramid_answers_in_half_precision(dtype) -> None:
    model = shaken(PIIPFeaturePyramid(pyramid(antialias=True)))
    wanted = mmkit.pipeline("dense-features", model)(picture(), size=48).features["merged"]
    found = mmkit.pipeline("dense-features", model, dtype=dtype)(picture(), size=48).features["merged"]
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("size", [(300, 1), (1, 300)])
def test_a_strip_of_one_row_of_cells_is_segmented(size) -> None:
    model = shaken(PIIPSegmenter(pyramid(grid_fit="nearest"), 2, hidden=32))
    result = mmkit.pipeline("semantic-segmentation", model)(picture(*size), size=24)
    assert result.mask.shape == size[::-1]


def test_more_classes_than_a_mask_can_number_are_refused() -> None:
    with pytest.raises(InputError, match=r"300 classes; a mask of 8 bits numbers 256"):
        mmkit.pipeline("semantic-segmentation", PIIPSegmenter(pyramid(), 300))


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_of_other_channels_than_a_picture_has_is_refused(channels) -> None:
    model = PIIPSegmenter(pyramid(), 2)
    model.backbone_info = dataclasses.replace(model.backbone_info, input_size=(channels, 24, 24))
    for task in ("semantic-segmentation", "dense-features", "pyramid-explorer"):
        with pytest.raises(InputError, match=rf"takes {channels} channels; pictures have 1 \(grey\) or 3 \(RGB\)"):
            mmkit.pipeline(task, model)
