"""A model's folder appears whole, and what was changed in it since is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmkit.backbones.model import create_model
from mmkit.errors import CheckpointError, InputError, StorageError
from mmkit.storage import open_folder


def build(depth: int = 1) -> torch.nn.Module:
    return create_model(
        "lightm_unet_2d", num_classes=2, init_filters=8, blocks_down=(1,) * depth, blocks_up=(1,) * (depth - 1)
    )


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_full_disk_never_pairs_one_model_with_the_settings_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    first, second, target, calls, real = build(2), build(3), tmp_path / "model", iter(range(1, 100)), os.replace
    first.save_pretrained(target)

    def replace(*args: str) -> None:
        if next(calls) == stop:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(StorageError, match="disk is full"):
        second.save_pretrained(target)
    monkeypatch.undo()
    loaded = type(first).from_pretrained(target)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), first.state_dict().values(), strict=True)
    )
    assert os.listdir(tmp_path) == ["model"]


def test_changed_and_strange_files_are_refused_and_the_card_may_be_edited(tmp_path: Path) -> None:
    model, target = build(2), tmp_path / "model"
    model.save_pretrained(target)
    assert open_folder(target)["kind"] == "model"  # type: ignore[index]
    (target / "README.md").write_text("my model")
    type(model).from_pretrained(target)
    (target / "model.bin").write_text("x")
    with pytest.raises(CheckpointError, match=r"not written with it: model\.bin"):
        type(model).from_pretrained(target)
    with pytest.raises(InputError, match=r"model\.bin"):
        model.save_pretrained(target)
    (target / "model.bin").unlink()
    config = target / "config.json"
    config.write_text(config.read_text().replace('"num_classes": 2', '"num_classes": 3'))
    with pytest.raises(CheckpointError, match=r"changed: config\.json"):
        type(model).from_pretrained(target)
