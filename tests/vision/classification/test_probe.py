"""A classifier solved on frozen features answers for pictures it has not seen."""

from __future__ import annotations

import pytest
import torch

from mmkit import create_backbone
from mmkit.data import ImageTransform, load_digits
from mmkit.errors import InputError
from mmkit.vision.classification import probe_answers


def test_the_probe_tells_two_digits_and_leaves_the_backbone_as_it_is():
    digits = load_digits((0, 1), size=32).with_transform(ImageTransform(32, (0.5,) * 3, (0.5,) * 3))
    train, test = digits.subset(range(0, len(digits), 2)), digits.subset(range(1, len(digits), 2))
    model = create_backbone("tiny_vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    right = probe_answers(model, train, test)
    assert right.dtype == torch.bool
    assert len(right) == len(test)
    assert right.float().mean() > 0.95
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_without_a_classifier_is_refused():
    digits = load_digits((0, 1), size=32).with_transform(ImageTransform(32, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(InputError, match="no classifier"):
        probe_answers(create_backbone("tiny_vit", num_classes=0), digits, digits)
