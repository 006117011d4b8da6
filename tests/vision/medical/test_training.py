"""Loss, patches, and a network trained through the public loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mmkit
from mmkit.errors import InputError
from mmkit.vision.medical.metrics import dice_per_class
from mmkit.vision.medical.model import LightMUNet
from mmkit.vision.medical.training import Patches, dice_ce_loss
from mmkit.vision.medical.volumes import normalize


def test_loss_is_zero_for_a_perfect_guess_and_counts_foreground_only() -> None:
    labels = torch.tensor([[[0, 1], [2, 0]]])
    perfect = 50 * nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    assert dice_ce_loss(perfect, labels) < 1e-4
    uniform = torch.zeros(1, 3, 2, 2)
    soft = 2 * (1 / 3) / (4 / 3 + 1)
    assert dice_ce_loss(uniform, labels).item() == pytest.approx(np.log(3) + 1 - soft, abs=1e-4)


def test_patches_are_cut_consistently_and_find_rare_foreground() -> None:
    labels = torch.zeros(64, 40, dtype=torch.long)
    labels[50, 3] = 1
    image = labels[None].float()
    patches = Patches([(image, labels)], (16, 48), 40, foreground=1.0, turn=False)
    for x, y in (patches[i] for i in range(40)):
        assert (x.shape, y.shape) == ((1, 16, 48), (16, 48))
        assert y.sum() == 1
        assert x[0].argmax() == y.flatten().argmax()
    with pytest.raises(InputError, match="do not fit"):
        Patches([(image, labels.T)], (16, 16), 4)


def test_fit_trains_a_network_through_the_public_loop() -> None:
    from mmkit.vision.medical.training import segmentation_loss

    truth = (torch.arange(32)[:, None] - 16).square().add((torch.arange(32) - 16).square()).lt(64).long()
    case = (normalize(truth[None].float() + 0.1 * torch.randn(1, 32, 32)), truth)
    model = LightMUNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,))
    config = mmkit.FitConfig(max_steps=40, batch_size=2, lr=1e-2, progress=False)
    mmkit.fit(model, Patches([case], (16, 16), 80), loss_fn=segmentation_loss, config=config)
    assert dice_per_class(model, [case], (32, 32), 2)[0] > 0.6  # everything as foreground scores 0.33


def hand_made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (1, 3, 4) in a row, labels with one pixel ignored, and which pixels count."""
    logits = torch.tensor([[[2.0, 0.5, -1.0, 9.0], [0.0, 1.5, 0.0, -9.0], [1.0, 0.0, 2.0, 4.0]]], requires_grad=True)
    return logits, torch.tensor([[0, 1, 2, -1]]), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 4.0])])
def test_ignored_pixels_have_no_part_in_the_loss_and_no_gradient(
    smoothing: float, weights: torch.Tensor | None
) -> None:
    logits, labels, known = hand_made()
    options = {"weights": weights, "label_smoothing": smoothing}
    loss = dice_ce_loss(logits, labels, **options)
    p = logits[0].detach().softmax(0)
    w = torch.ones(3) if weights is None else weights
    each = [
        -(1 - smoothing) * w[k] * p[k, i].log() - smoothing / 3 * (w * p[:, i].log()).sum()
        for i, k in enumerate(labels[0, :3].tolist())
    ]
    soft = [2 * p[k, k] / (p[k, known].sum() + 1) for k in (1, 2)]
    assert loss.item() == pytest.approx(float(sum(each) / 3 + 1 - sum(soft) / 2), abs=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient[..., 3], torch.zeros(1, 3)), "exactly"
    assert (gradient[..., :3] != 0).all()
    assert dice_ce_loss(logits[..., :3], labels[..., :3], **options).item() == pytest.approx(loss.item(), abs=1e-6)
    nothing = dice_ce_loss(logits, torch.full((1, 4), -1), **options)
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, logits)[0].any()


def test_measures_leave_ignored_pixels_out() -> None:
    from mmkit.vision.medical.metrics import confusion, dice

    truth, answer = np.array([0, 1, 1, -1, -1]), np.array([0, 1, 0, 1, 0])
    assert confusion(answer, truth, 2).tolist() == [[1, 0], [1, 1]]
    assert dice(answer, truth, 1) == pytest.approx(2 / 3)


def test_patches_beyond_an_image_and_around_ignored_pixels() -> None:
    labels = torch.full((8, 8), -1)
    labels[2, 3] = 1
    patches = Patches([(labels[None].float(), labels)], (4, 12), 20, foreground=1.0, mirror=(), margin=-1)
    for _, y in (patches[i] for i in range(20)):
        assert (y == 1).sum() == 1, "ignored pixels are no foreground"
        assert (y[:, 8:] == -1).all(), "what lies beyond the end does not count"


def test_balanced_patches_take_every_class_as_often() -> None:
    common, rare = torch.zeros(32, 32, dtype=torch.long), torch.zeros(32, 32, dtype=torch.long)
    common[:16], rare[5, 7] = 1, 2
    cases = [(y[None].float(), y) for y in [*[common] * 9, rare]]
    torch.manual_seed(0)
    balanced = Patches(cases, (1, 1), 300, mirror=(), balanced=True)
    counts = torch.bincount(torch.stack([balanced[i][1] for i in range(300)]).flatten(), minlength=3)
    assert (counts > 75).all(), counts
    plain = Patches(cases, (1, 1), 300, mirror=())
    assert torch.bincount(torch.stack([plain[i][1] for i in range(300)]).flatten(), minlength=3)[2] < 40


def test_cutmix_pastes_labels_with_their_pixels() -> None:
    from mmkit.vision.medical.training import SegmentationLoss

    seen = []

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.cat([-x, x], 1)

    labels = torch.stack([torch.zeros(12, 12), torch.ones(12, 12)]).long()
    images = 60 * (labels.float() - 0.5)[:, None]
    torch.manual_seed(0)
    losses = [float(SegmentationLoss(cutmix=1.0)(Watched(), (images, labels))) for _ in range(8)]
    assert max(losses) < 1e-3, "every pixel still has its label"
    mixed = [x for x in seen if 0 < (x[0] > 0).sum() < 144]
    assert len(mixed) >= 5
    for x in mixed:
        assert torch.equal(x[0] > 0, x[1] < 0)
    assert torch.equal(images, 60 * (labels.float() - 0.5)[:, None]), "the batch stays as it was"
    assert not SegmentationLoss(cutmix=1.0, mixup_prob=1e-9)(Watched(), (images, labels)) > 1e-3
