"""Explicit parameter groups: rates that follow the one schedule, decay, what is left out, and resuming."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mmkit.adapters import apply_adapter
from mmkit.adapters.ssf import SSFConfig
from mmkit.errors import InputError
from mmkit.training import FitConfig, fit
from mmkit.training.groups import describe_groups, parameter_groups

CONFIG = {"epochs": 2, "batch_size": 16, "lr": 0.02, "progress": False, "device": "cpu"}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def points(n: int = 96) -> list[tuple[torch.Tensor, int]]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return [(row, int(row[:3].argmax())) for row in x]


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}


def groups_of(model: nn.Module, given, **options):
    return parameter_groups(nn.ModuleDict({"model": model}), model, None, 0.1, given, **options)


def test_a_groups_rate_is_a_share_of_the_schedules_and_its_decay_is_its_own():
    model = network()
    given = [
        {"params": model[0].parameters(), "lr": 0.002},
        {"params": model[3].named_parameters(), "lr_scale": 2.0, "weight_decay": 0.3, "betas": (0.8, 0.9)},
    ]
    groups, names = groups_of(model, given, lr=0.02)
    assert names == ["model.0.weight", "model.0.bias", "model.3.weight", "model.3.bias"]
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(0.1, 0.1), (0.1, 0.0), (2.0, 0.3)]
    assert groups[2]["betas"] == (0.8, 0.9)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]
    json.dumps(describe_groups(groups, {id(p): k for k, p in model.named_parameters()}))


def test_groups_equal_plain_torch():
    data, ours, theirs = points(32), network(), network()
    config = FitConfig(**{**CONFIG, "epochs": 1, "batch_size": 32, "schedule": "constant", "clip_grad": None})
    fit(
        ours,
        data,
        config=config,
        parameter_groups=lambda m: [
            {"params": m[0].parameters(), "lr": 0.01, "weight_decay": 0.5},
            {"params": m[3].parameters(), "weight_decay": 0.0},
        ],
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": theirs[0].parameters(), "lr": 0.01, "weight_decay": 0.5},
            {"params": theirs[3].parameters(), "lr": 0.02, "weight_decay": 0.0},
        ]
    )
    from mmkit.training.sampling import StepSampler

    theirs[1].eval()  # a norm that is not trained keeps its statistics
    chosen = StepSampler(32, 32).examples(0)
    x, y = torch.stack([data[i][0] for i in chosen]), torch.tensor([data[i][1] for i in chosen])
    nn.functional.cross_entropy(theirs(x), y).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_what_is_in_no_group_is_not_trained_and_comes_back_trainable():
    model = network()
    before = {k: v.clone() for k, v in model.named_parameters()}
    result = fit(model, points(), config=FitConfig(**CONFIG), parameter_groups=[{"params": model[3].weight}])
    assert changed(model, before) == {"3.weight"}
    assert result.trainable_parameters == 48
    assert all(p.requires_grad for p in model.parameters())


def test_groups_resume_bit_by_bit_and_other_groups_are_another_run(tmp_path):
    def run(folder, rate=0.1, stop=10**6):
        model, count = network(), iter(range(10**6))
        given = [{"params": [model[3].weight, model[0].weight], "lr_scale": rate}, {"params": model[3].bias}]
        config = FitConfig(**CONFIG, optimizer="nadamw")
        fit(
            model,
            points(),
            config=config,
            output_dir=folder,
            parameter_groups=given,
            should_stop=lambda: next(count) >= stop,
        )
        return model.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", stop=5)
    with pytest.raises(InputError, match="parameter groups"):
        run(tmp_path / "part", rate=0.2)
    assert all(torch.equal(v, whole[k]) for k, v in run(tmp_path / "part").items())


def test_an_adapter_keeps_its_say():
    model = network()
    adapter = apply_adapter(model, SSFConfig(targets=("0", "3")))
    own = dict(adapter.trainable_parameters())
    before = {k: v.detach().clone() for k, v in own.items()}
    given = [{"params": [p for k, p in own.items() if k.startswith("3")], "lr": 0.1}]
    fit(model, points(), config=FitConfig(**CONFIG), adapter=adapter, parameter_groups=given)
    assert {k[0] for k, v in own.items() if not torch.equal(v, before[k])} == {"3"}
    with pytest.raises(InputError, match="would not be saved"):
        fit(
            model, points(), adapter=adapter, config=FitConfig(**CONFIG), parameter_groups=[{"params": model[3].weight}]
        )


NETWORK = network()
BAD = {
    "no list": ({"params": [NETWORK[0].weight]}, "list of dicts"),
    "empty": ([], "nothing to train"),
    "no params": ([{"lr": 1.0}], "number 0 is"),
    "empty group": ([{"params": []}], "Group 0 .* is empty"),
    "names": ([{"params": ["0.weight"]}], "holds str"),
    "twice": ([{"params": NETWORK[0].weight}, {"params": NETWORK[0].parameters()}], "Group 1 .* repeats"),
    "strangers": ([{"params": network().parameters()}], "neither in the model"),
    "setting": ([{"params": NETWORK[0].parameters(), "weight_decy": 0.1}], "no setting 'weight_decy'.*'weight_decay'"),
}


@pytest.mark.parametrize("case", BAD)
def test_groups_that_cannot_be_meant_are_refused(case):
    given, message = BAD[case]
    with pytest.raises(InputError, match=message):
        fit(NETWORK, points(), config=FitConfig(**CONFIG), parameter_groups=given)
    assert all(p.requires_grad for p in NETWORK.parameters())
