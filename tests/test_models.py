"""One contract for every model: built without memory, saved and opened again whatever its class, ready for a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkit import create_model, list_models
from mmkit.backbones.model import Model, open_model
from mmkit.errors import CheckpointError
from mmkit.registry import MODEL_CLASSES

BRANCHES = {
    "branches": [
        {"backbone": "timm:vit_tiny_patch16_224", "img_size": 32, "settings": {**size, "patch_size": 8, "num_heads": 2}}
        for size in ({"embed_dim": 16, "depth": 2}, {"embed_dim": 8, "depth": 2})
    ],
    "num_heads": 2,
}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
NORM = {"norm_groups": 4}
GIVEN: dict[str, dict[str, Any]] = {  # what has no default
    "piip": {"pyramid": BRANCHES, **NORM},
    "piip_feature_pyramid": {"pyramid": BRANCHES, **NORM},
    "piip_segmenter": {"pyramid": BRANCHES, **NORM},
    "video_classifier": {"backbone": "timm:vit_tiny_patch16_224", "num_classes": 3, "backbone_args": VIT},
}
MOST = 6_000_000
"""Parameters of the models that are written here; of the larger ones it is enough to be built."""


@pytest.mark.parametrize("name", list_models())
def test_a_model_is_built_without_memory_and_comes_back_whatever_its_class(name: str, tmp_path: Path) -> None:
    given = GIVEN.get(name, {})
    with torch.device("meta"):
        empty = create_model(name, **given)
    assert isinstance(empty, Model)
    assert MODEL_CLASSES.get(type(empty).__name__) is type(empty)
    assert json.loads(json.dumps(empty.config)) == empty.config
    assert callable(empty.push_to_hub)
    if sum(p.numel() for p in empty.parameters()) > MOST:
        return
    torch.manual_seed(0)
    model = create_model(name, **given)
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(1)
    opened = open_model(tmp_path / "saved")
    assert type(opened) is type(model)
    assert opened.config == model.config
    assert not opened.training
    there = opened.state_dict()
    assert there.keys() == model.state_dict().keys()
    assert all(torch.equal(v, there[k]) for k, v in model.state_dict().items())


def test_every_class_is_known_by_its_name() -> None:
    classes = [MODEL_CLASSES.get(name) for name in MODEL_CLASSES.names()]
    assert [c.__name__ for c in classes] == MODEL_CLASSES.names()
    written = {c for base in Model.__subclasses__() for c in (base, *base.__subclasses__())}
    own = {c for c in written | set(classes) if c.__module__.startswith("mmkit.")}
    bases = {c for c in own if c.__subclasses__() and c not in classes}  # what several of them share
    assert own - bases == set(classes)


def test_a_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    create_model("scene_judge").save_pretrained(tmp_path / "judge")
    config = tmp_path / "judge" / "config.json"
    for kind in ("Module", 3, None):
        config.write_text(json.dumps({"model": kind, "config": {}}))
        with pytest.raises(CheckpointError):
            open_model(tmp_path / "judge")
