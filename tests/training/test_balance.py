"""Classes of unequal size: balanced order and weights; and the search for a learning rate."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from mmkit.errors import InputError, RunDiffersError
from mmkit.training import FitConfig, find_lr, fit
from mmkit.training.metrics import CrossEntropyLoss, balanced_weights, labels_of
from mmkit.training.sampling import StepSampler

QUIET = {"progress": False, "device": "cpu"}


def uneven(n: int = 60) -> list[tuple[torch.Tensor, int]]:
    torch.manual_seed(0)
    labels = [0] * (n - n // 6) + [1] * (n // 6)
    return [(torch.randn(4) + 1.5 * y, y) for y in labels]


@pytest.mark.parametrize("counts", [(50, 10, 3), (7, 7), (1, 100)])
def test_balanced_sampling_takes_every_class_and_within_it_every_example_equally_often(counts):
    labels = [k for k, n in enumerate(counts) for _ in range(n)]
    sampler = StepSampler(len(labels), 8, seed=3, labels=labels)
    for epoch in range(3):
        order = list(sampler.order(epoch))
        assert len(order) == len(labels)
        by_class = Counter(labels[i] for i in order)
        assert max(by_class.values()) - min(by_class.values()) <= 1
        for k in range(len(counts)):
            times = Counter({i: 0 for i, y in enumerate(labels) if y == k})
            times.update(i for i in order if labels[i] == k)
            assert max(times.values()) - min(times.values()) <= 1
    again = StepSampler(len(labels), 8, seed=3, labels=labels)
    assert list(again.order(1)) == list(sampler.order(1)) != list(sampler.order(2))


def test_balanced_weights_are_scikit_learns_and_the_loss_is_the_mean_over_examples():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 9 + [1] * 3 + [2] * 6
    weights = balanced_weights(labels)
    assert weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels).tolist())
    assert balanced_weights([0, 0, 2])[1] == 0
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    loss = CrossEntropyLoss(weights=weights)(lambda x: x, (logits, targets))
    by_hand = torch.stack([weights[y] * F.cross_entropy(logits[i], y) for i, y in enumerate(targets)]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_balanced_runs_differ_from_plain_ones_and_splitting_a_batch_changes_nothing(tmp_path):
    data, plain = uneven(), FitConfig(epochs=1, batch_size=12, **QUIET)
    fit(nn.Linear(4, 2), data, config=plain, output_dir=tmp_path)
    for name in ("class_weights", "sampling"):
        config = FitConfig(epochs=1, batch_size=12, **{name: "balanced"}, **QUIET)
        with pytest.raises(RunDiffersError, match=f"{name}: .*'balanced'"):
            fit(nn.Linear(4, 2), data, config=config, output_dir=tmp_path)
    found = []
    for size, accum in ((12, 1), (4, 3)):
        torch.manual_seed(1)
        model = nn.Linear(4, 2)
        config = FitConfig(
            epochs=2, batch_size=size, grad_accum=accum, class_weights="balanced", sampling="balanced", **QUIET
        )
        fit(model, data, config=config)
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_labels_are_found_where_data_sets_say_them():
    data = uneven(12)
    y = [label for _, label in data]
    assert labels_of(data) == y
    assert labels_of(Subset(data, [0, 11])) == [0, 1]
    assert labels_of(TensorDataset(torch.zeros(12, 4), torch.tensor(y))) == y
    for bad in ([torch.zeros(3)], TensorDataset(torch.zeros(3, 2)), iter(data)):
        with pytest.raises(InputError, match="class of every example"):
            labels_of(bad)


def test_the_search_finds_a_useful_rate_and_leaves_everything_as_it_was():
    data = uneven(120)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = find_lr(model, data, config=FitConfig(batch_size=16, optimizer="sgd", **QUIET), highest=1e4, steps=60)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(found.rates) == len(found.losses) < 60, "it ends when the loss has gone up"
    steps = [b / a for a, b in zip(found.rates, found.rates[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    assert found.rates[0] == pytest.approx(1e-6)
    assert found.lines().count("about here") == 1
    losses = {}
    for lr in (found.suggestion / 300, found.suggestion):
        model.load_state_dict(before)
        losses[lr] = fit(model, data, config=FitConfig(epochs=3, batch_size=16, optimizer="sgd", lr=lr, **QUIET)).losses
    assert losses[found.suggestion][-1] < losses[found.suggestion / 300][-1]
    with pytest.raises(InputError, match="lowest"):
        find_lr(model, data, lowest=1.0, highest=0.1)


def test_an_exponential_schedule_needs_a_start():
    with pytest.raises(InputError, match="min_lr"):
        FitConfig(schedule="exponential")
    with pytest.raises(InputError, match="class_weights"):
        FitConfig(class_weights="equal")
