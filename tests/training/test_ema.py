"""The moving average: timm's formula, useful on a short run, exact over a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from mmkit.storage.runs import newest_checkpoint
from mmkit.training import FitConfig, fit
from mmkit.training.ema import MovingAverage

QUIET = {"progress": False, "device": "cpu"}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def points(n: int = 96) -> list[tuple[torch.Tensor, int]]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return [(row, int(row[:3].argmax())) for row in x]


def change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


def test_the_average_is_timms_with_buffers():
    model = network()
    ours, theirs = MovingAverage(model, 0.7), ModelEmaV3(model, decay=0.7, use_warmup=True)
    for step in range(1, 12):
        change(model, step)
        ours.update(step)
        theirs.update(model, step=step)
    for key, expected in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.average[key], expected)


def test_applied_averages_leave_the_weights_as_they_were():
    model = network().to(torch.bfloat16)
    average = MovingAverage(model, 0.9)
    for step in range(1, 4):
        change(model, step)
        average.update(step)
    assert average.average["0.weight"].dtype == torch.float32  # bfloat16 could not hold small changes
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(average.average)
    with average.applied():
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, kept[k]) for k, v in average.average.items())


def test_frozen_buffers_do_not_drift():
    model = nn.BatchNorm1d(3)
    model.running_mean.copy_(torch.tensor([0.1, 1 / 3, 1e-7]))
    average = MovingAverage(model, 0.999)
    for step in range(1, 300):
        average.update(step)
    assert torch.equal(average.average["running_mean"], model.running_mean)


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
def test_a_usual_decay_is_of_use_on_a_short_run(decay):
    data, model = points(), network()
    config = FitConfig(epochs=20, batch_size=16, lr=1e-2, ema_decay=decay, **QUIET)
    result = fit(model, data, data, config=config)
    assert result.best_metrics["accuracy"] > 0.9
    with torch.no_grad():  # what is returned is what was measured, running statistics included
        right = [int(model.eval()(x[None]).argmax()) == y for x, y in data]
    assert sum(right) / len(right) == pytest.approx(result.best_metrics["accuracy"])


def test_averages_and_buffers_are_stored_and_resumed_bit_by_bit(tmp_path):
    data, config = points(), FitConfig(epochs=3, batch_size=16, lr=0.02, ema_decay=0.99, **QUIET)
    whole, part = network(), network()
    fit(whole, data, config=config, output_dir=tmp_path / "whole")
    count = iter(range(100))
    fit(part, data, config=config, output_dir=tmp_path / "part", should_stop=lambda: next(count) >= 7)
    again = network()
    fit(again, data, config=config, output_dir=tmp_path / "part")
    found = [newest_checkpoint(tmp_path / name / "checkpoints")[2]["ema"] for name in ("whole", "part")]
    assert {"model.1.running_mean", "model.1.num_batches_tracked"} <= found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
