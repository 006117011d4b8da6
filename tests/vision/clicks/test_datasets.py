"""Scenes to learn clicking from: a bank of pictures, and batches made of it."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.vision.clicks import OBJECT, UNKNOWN, SceneSampler, build_bank


@pytest.fixture
def bank():
    """Two photos with a bright square each, one without objects; a band around the first square is unknown."""
    rows = []
    for i in range(2):
        picture = np.random.default_rng(i).integers(0, 90, (40, 60, 3), np.uint8)
        ids = np.zeros((40, 60), np.uint8)
        ids[8:28, 18:42] = 2
        ids[10:26, 20:40] = 1
        ids[0:2, 0:2] = 3  # too small to be an object
        picture[ids == 1] = 250
        objects = [{"ids": (1,), "unknown": (2,), "weight": 1.0}, {"ids": (3,), "unknown": (), "weight": 1.0}]
        rows.append((Image.fromarray(picture), ids, objects))
    rows.append((Image.new("RGB", (30, 30), "navy"), np.zeros((30, 30), np.uint8), []))
    return build_bank([(1.0, rows)], 64, torch.device("cpu"))


def test_a_bank_keeps_aspect_ids_and_boxes_and_leaves_out_specks(bank):
    assert bank.images.shape == (3, 3, 64, 64)
    assert bank.sizes.tolist() == [[43, 64], [43, 64], [64, 64]]
    assert bank.owner.tolist() == [0, 1]
    kinds = bank.table[0].long()[bank.maps[0].long()]
    x0, y0, x1, y1 = bank.boxes[0].int().tolist()
    assert (kinds[y0:y1, x0:x1] == OBJECT).all()
    assert (kinds == OBJECT).sum() == (y1 - y0) * (x1 - x0)
    assert (kinds == UNKNOWN).any()


def test_batches_show_objects_where_their_targets_say(bank):
    torch.manual_seed(0)
    sampler = SceneSampler(bank, 32)
    images, target, known, inside = sampler.objects(16)
    assert images.shape == (16, 3, 32, 32)
    assert target.shape == known.shape == inside.shape == (16, 32, 32)
    assert not (target & ~inside).any()
    bright = images.mean(dim=1)
    assert bright[target].mean() > 0.8
    assert bright[~target & known].mean() < 0.4


@pytest.mark.parametrize("procedural", [0.0, 0.5, 1.0])
def test_a_sample_is_what_the_loss_takes(bank, procedural):
    torch.manual_seed(0)
    batch = SceneSampler(bank, 32).sample(8, procedural=procedural)
    assert batch["image"].shape == (8, 3, 32, 32)
    assert 0 <= float(batch["image"].min()) <= float(batch["image"].max()) <= 1
    assert batch["target"].dtype == batch["valid"].dtype == torch.bool
    assert not (batch["target"] & ~batch["valid"]).any()
