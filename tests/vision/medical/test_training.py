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
