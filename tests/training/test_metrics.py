"""The default loss: labels that fit, soft targets, and timm's mixing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import nn
from torch.nn import functional as F

from mmkit.errors import InputError
from mmkit.training import FitConfig, fit
from mmkit.training.metrics import CrossEntropyLoss, TargetError, check_targets

QUIET = {"progress": False, "device": "cpu"}


def pictures(n: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(4, (n,), generator=generator)


class Linear(nn.Module):
    """A linear classifier that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 4)

    def forward(self, x):
        self.seen = x
        return self.head(x.flatten(1))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_is_timms_with_the_classes_the_model_has(mixup, cutmix, smoothing):
    images, labels = pictures(6)
    model, before = Linear(), images.clone()
    loss_fn = CrossEntropyLoss(smoothing, mixup, cutmix)
    for seed in range(4):
        np.random.seed(seed)
        loss = loss_fn(model, (images, labels))
        np.random.seed(seed)
        mixed, soft = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=4)(images.clone(), labels)
        assert torch.equal(model.seen, mixed)
        expected = -(soft * model(mixed).log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(loss, expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("n", [1, 5])
def test_the_last_of_an_odd_batch_stays_as_it_is(n):
    images, labels = pictures(n)
    model = Linear()
    np.random.seed(0)
    loss = CrossEntropyLoss(mixup=1.0)(model, (images, labels))
    assert torch.equal(model.seen[-1], images[-1])
    assert n == 1 or not torch.equal(model.seen[0], images[0])
    assert torch.isfinite(loss)


def test_soft_targets_are_mixed_as_hard_ones_are():
    images, labels = pictures(6)
    model, loss_fn = Linear(), CrossEntropyLoss(0.1, 1.0, 1.0)
    losses = []
    for targets in (labels, F.one_hot(labels, 4).float()):
        np.random.seed(3)
        losses.append(loss_fn(model, (images, targets)).item())
    assert losses[0] == pytest.approx(losses[1])


def test_fit_mixes_training_and_measures_whole_pictures():
    images, labels = pictures(33)
    data = list(zip(images, labels.tolist(), strict=True))
    results = [
        fit(
            Linear(),
            data,
            data,
            config=FitConfig(epochs=2, batch_size=16, mixup=m, cutmix=m, label_smoothing=0.1, **QUIET),
        )
        for m in (0.0, 1.0)
    ]
    assert all(0 <= r.metrics["accuracy"] <= 1 for r in results)
    model = Linear()
    result = fit(model, data, data, config=FitConfig(epochs=2, batch_size=16, mixup=1.0, **QUIET))
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == labels).float().mean()
    assert float(right) == pytest.approx(result.best_metrics["accuracy"])


def test_mixing_resumes_exactly_and_whatever_the_workers(tmp_path):
    images, labels = pictures(40)
    data = list(zip(images, labels.tolist(), strict=True))

    def run(folder=None, stop=10**6, **settings):
        torch.manual_seed(0)
        model, count = Linear(), iter(range(10**6))
        config = FitConfig(epochs=2, batch_size=8, mixup=0.8, cutmix=1.0, **QUIET, **settings)
        losses = fit(model, data, config=config, output_dir=folder, should_stop=lambda: next(count) >= stop).losses
        return losses, model.head.weight.tolist()

    whole = run()
    assert run(num_workers=2) == whole
    assert len(run(tmp_path, stop=3)[0]) < 10
    assert run(tmp_path) == whole


def test_mixing_needs_the_default_loss_and_pictures():
    images, labels = pictures(8)
    data = list(zip(images, labels.tolist(), strict=True))
    with pytest.raises(InputError, match="default loss"):
        fit(Linear(), data, loss_fn=CrossEntropyLoss(), config=FitConfig(mixup=0.2, **QUIET))
    with pytest.raises(InputError, match=r"cutmix needs images \(B, C, H, W\), not \(8, 3\)"):
        fit(nn.Linear(3, 4), [(x[:, 0, 0], y) for x, y in data], config=FitConfig(cutmix=1.0, **QUIET))
    with pytest.raises(InputError, match="mixup_prob"):
        FitConfig(mixup_prob=0)


def test_labels_that_fit_are_taken_in_any_integer_type():
    for kind in (torch.uint8, torch.int32, torch.int64):
        assert check_targets(torch.tensor([0, 3], dtype=kind), 4).tolist() == [0, 3]
    soft = torch.rand(2, 4)
    assert check_targets(soft, 4) is soft


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 4, -1]), r"Label 4 is outside 0..3"),
        (torch.tensor([0.0, 1.0]), "expected integers"),
        (torch.tensor([[0], [1]]), "expected integers"),
        (torch.rand(2, 5), r"probabilities \(B, 4\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(targets, message):
    with pytest.raises(TargetError, match=message):
        check_targets(targets, 4)
    assert check_targets(torch.tensor([1]), 4).tolist() == [1]
