"""Checkpoints: complete or absent, checked when read, refused by another run, never pickled."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mmkit.adapters import apply_adapter
from mmkit.adapters.ssf import SSFConfig
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import runs as checkpoint, sha256_file
from mmkit.training import FitConfig, fit, load_trained

CONFIG = {"epochs": 3, "batch_size": 16, "lr": 0.02, "progress": False, "device": "cpu"}


def data(n: int = 64):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return [(row, int(row.sum() > 0)) for row in x]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


@pytest.fixture
def run(tmp_path):
    model = network()
    fit(model, data(), config=FitConfig(**CONFIG), output_dir=tmp_path)
    return tmp_path, model


def test_holds_only_safetensors_and_json(run):
    folder, _ = run
    folders = checkpoint.list_checkpoints(folder / "checkpoints")
    assert [f.name for f in folders] == ["step_00000008", "step_00000012"]  # the newest two of three epochs
    assert {p.suffix for f in folders for p in f.iterdir()} == {".safetensors", ".json"}
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "no state"])
def test_damaged_newest_is_passed_over(run, damage):
    folder, model = run
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    file = newest / "weights.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
    else:
        (newest / "state.json").write_text("{")
    again = network()
    with pytest.warns(UserWarning, match="damaged"):
        result = fit(again, data(), config=FitConfig(**CONFIG), output_dir=folder)
    assert result.stopped == "finished"
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_half_written_folder_is_ignored_and_cleaned(run):
    folder, _ = run
    half = folder / "checkpoints" / ".step_00000099.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    found = checkpoint.newest_checkpoint(folder / "checkpoints")
    assert found is not None
    assert found[0].name == "step_00000012"
    checkpoint.prune_checkpoints(folder / "checkpoints", 2)
    assert not half.exists()


def test_other_settings_are_refused_and_resume_false_starts_over(run):
    folder, _ = run
    with pytest.raises(InputError, match=r"lr: 0.02 is now 0.01"):
        fit(network(), data(), config=FitConfig(**{**CONFIG, "lr": 0.01}), output_dir=folder)
    with pytest.raises(InputError, match="train: 64 examples are now 60"):
        fit(network(), data(60), config=FitConfig(**CONFIG), output_dir=folder)
    result = fit(network(), data(), config=FitConfig(**{**CONFIG, "lr": 0.01, "resume": False}), output_dir=folder)
    assert result.steps == 12
    assert len((folder / "log.csv").read_text().splitlines()) == 13


def test_another_model_is_refused(run):
    folder, _ = run
    wider = nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 2))
    with pytest.raises(InputError, match="trained tensors"):
        fit(wider, data(), config=FitConfig(**CONFIG), output_dir=folder)
    with pytest.raises(CheckpointError, match="another model"):
        load_trained(folder, wider)


def test_resume_from_a_named_folder(run, tmp_path):
    folder, model = run
    earlier = folder / "checkpoints" / "step_00000008"
    other = network()
    result = fit(other, data(), config=FitConfig(**CONFIG, resume=earlier), output_dir=tmp_path / "other")
    assert result.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="no readable training checkpoint"):
        fit(network(), data(), config=FitConfig(**CONFIG, resume=tmp_path / "nowhere"), output_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pickled_weights_are_never_read(run):
    folder, _ = run
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    torch.save({"weights": torch.zeros(1)}, newest / "weights.safetensors")
    state = json.loads((newest / "state.json").read_text())
    state["files"]["weights.safetensors"] = sha256_file(newest / "weights.safetensors")
    (newest / "state.json").write_text(json.dumps(checkpoint.sealed(state)))
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoint.read_checkpoint(newest)


def test_files_outside_the_checkpoint_are_refused(run):
    folder, _ = run
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    state["files"]["../../secret.safetensors"] = "0"
    (newest / "state.json").write_text(json.dumps(checkpoint.sealed(state)))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_checkpoint(newest)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam", "lion", "nadamw"])
def test_optimisers_resume_exactly(tmp_path, optimizer):
    config = FitConfig(**CONFIG, optimizer=optimizer)
    whole, part = network(), network()
    expected = fit(whole, data(), config=config)
    count = iter(range(100))
    fit(part, data(), config=config, output_dir=tmp_path, should_stop=lambda: next(count) >= 5)
    result = fit(part, data(), config=config, output_dir=tmp_path)
    assert result.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), whole.state_dict().values(), strict=True))


def test_adapter_only_tensors_are_trained_and_saved(tmp_path):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = apply_adapter(model, SSFConfig(targets=("0",)))
    fit(model, data(), config=FitConfig(**CONFIG), adapter=adapter, output_dir=tmp_path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    newest = checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1]
    _, tensors = checkpoint.read_checkpoint(newest)
    trained = [k for k in tensors["weights"] if k.startswith("adapter.")]
    assert len(trained) == len(adapter.trainable_parameters()) == 2
    assert {k for k in tensors["weights"] if not k.startswith("adapter.")} == {
        "model.1.running_mean",
        "model.1.running_var",
        "model.1.num_batches_tracked",
    }
    fresh = network()
    other = apply_adapter(fresh, SSFConfig(targets=("0",)))
    load_trained(tmp_path, fresh, other)
    x = torch.randn(4, 6)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
