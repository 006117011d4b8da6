"""The mask explorer: what it shows is what the model computes, and edits do what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.backbones.model import create_model
from mmkit.errors import InputError
from mmkit.vision.gmm.pipeline import MaskExplorer

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture
def explorer():
    return MaskExplorer(create_model("gmm_vit", **SMALL), class_names=["a", "b", "c"])


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def test_the_view_shows_the_models_own_numbers(explorer, picture):
    view = explorer(picture, layer=1, head=1, patch=(0, 3))
    assert view.attention.sum() == pytest.approx(1, abs=1e-5)
    assert view.plain_attention.sum() == pytest.approx(1, abs=1e-5)
    expected = explorer.model.blocks[1].attn.mask.matrix()[1, 3].detach().reshape(4, 4).numpy()
    np.testing.assert_allclose(view.mask, expected, rtol=1e-6)
    np.testing.assert_array_equal(view.mask, view.trained_mask)
    assert view.predictions["edited"] == view.predictions["trained"] != view.predictions["no mask"]
    assert sum(view.predictions["no mask"].values()) == pytest.approx(1, abs=1e-5)


def test_edits_reach_their_scope_and_leave_the_model_alone(explorer, picture):
    state = {k: v.clone() for k, v in explorer.model.state_dict().items()}
    views = {scope: explorer(picture, alpha_scale=0, scope=scope) for scope in ("head", "layer", "model")}
    assert np.all(views["head"].mask == 0)
    assert views["head"].attention == pytest.approx(1 / 16)
    edited = [v.predictions["edited"]["a"] for v in views.values()]
    assert len(set(edited)) == 3
    assert all(torch.equal(v, state[k]) for k, v in explorer.model.state_dict().items())
    narrow = explorer(picture, sigma_scale=0.01)
    assert abs(narrow.profile[-1]) < abs(narrow.trained_profile[-1])


def test_saving_writes_the_maps_side_by_side_or_their_numbers(explorer, picture, tmp_path):
    view = explorer(picture)
    record = json.loads(view.save(tmp_path / "view.json").read_text())
    assert np.allclose(record["mask"], view.mask)
    assert record["predictions"] == view.predictions
    with Image.open(view.save(tmp_path / "view.png")) as saved:
        assert saved.size == view.plot().size
        assert saved.height == 384
        assert np.array_equal(np.asarray(saved)[:, :384], np.asarray(view.mask_image()))


@pytest.mark.parametrize(
    "settings",
    [{"layer": 2}, {"head": -1}, {"patch": (4, 0)}, {"alpha_scale": 99}, {"sigma_scale": 0}, {"scope": "all"}],
)
def test_bad_settings_are_named(explorer, picture, settings):
    with pytest.raises(InputError):
        explorer(picture, **settings)


def test_models_without_masks_are_refused():
    with pytest.raises(InputError, match="mask='gmm'"):
        MaskExplorer(create_model("gmm_vit", **SMALL, mask="none"))
    with pytest.raises(InputError, match="one entry per output"):
        MaskExplorer(create_model("gmm_vit", **SMALL), class_names=["a"])


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_of_other_channels_than_a_picture_has_is_refused(channels):
    with pytest.raises(InputError, match=rf"takes {channels} channels; pictures have 1 \(grey\) or 3 \(RGB\)"):
        MaskExplorer(create_model("gmm_vit", **SMALL, in_chans=channels))
