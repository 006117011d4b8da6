"""The pyramid as a backbone: torchvision's detectors train on it, timm's conventions hold, the segmenter learns."""

from __future__ import annotations

import pytest
import torch
from tiny import pyramid, shaken
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

from mmkit.errors import InputError
from mmkit.vision.piip import PIIPFeaturePyramid, PIIPSegmenter


def test_four_maps_as_timm_describes_them() -> None:
    model = shaken(PIIPFeaturePyramid(pyramid()))
    x = torch.randn(1, 3, 24, 48)
    maps = model(x)
    assert list(maps) == ["0", "1", "2", "3"]
    for m, channels, stride in zip(
        maps.values(), model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert m.shape == (1, channels, 24 / stride, 48 / stride)
    last, chosen = model.forward_intermediates(x, 2)
    assert torch.equal(last, maps["3"])
    assert [torch.equal(a, maps[n]) for a, n in zip(chosen, "23", strict=True)] == [True, True]
    (tokens,) = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(tokens, maps["1"].flatten(2).transpose(1, 2))
    with pytest.raises(InputError, match="There are 4 maps"):
        model.forward_intermediates(x, [4])


def test_some_maps_only_and_one_width() -> None:
    model = shaken(PIIPFeaturePyramid(pyramid(), out_indices=(1, 2, 3), fpn_channels=8))
    maps = model(torch.randn(1, 3, 24, 24))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(8, 12, 12), (8, 6, 6), (8, 3, 3)]
    assert model.out_channels == 8
    assert model.feature_info.reduction() == [2, 4, 8]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"out_indices": (0, 4)}, "out_indices must be some of"),
        ({"taps": (0, 1, 2)}, "taps must be three growing interactions of 0 to 1"),
        ({"norm_groups": 7}, "norm_groups=7 must divide"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words: str) -> None:
    with pytest.raises(InputError, match=words):
        PIIPFeaturePyramid(pyramid(), **settings)


def scene(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A dark square on a light ground, with its box and mask."""
    make = torch.Generator().manual_seed(seed)
    left, top = (int(torch.randint(4, 20, (), generator=make)) for _ in range(2))
    picture, mask = torch.full((3, 48, 48), 0.9), torch.zeros(1, 48, 48, dtype=torch.uint8)
    picture[:, top : top + 20, left : left + 20], mask[:, top : top + 20, left : left + 20] = 0.1, 1
    box = torch.tensor([[left, top, left + 20, top + 20]], dtype=torch.float32)
    return picture, {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": mask}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FasterRCNN", "MaskRCNN", "RetinaNet"])
def test_torchvision_detectors_train_on_it(kind: str) -> None:
    torch.manual_seed(0)
    backbone = PIIPFeaturePyramid(pyramid((16, 32, 48)), fpn_channels=16)
    anchors = AnchorGenerator(((8,), (16,), (24,), (32,)), ((1.0,),) * 4)
    same = {
        "min_size": 48,
        "max_size": 48,
        "size_divisible": backbone.multiple,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if kind == "RetinaNet":
        detector = RetinaNet(backbone, 2, anchor_generator=anchors, head=RetinaNetHead(16, 1, 2), **same)
    else:
        pools = {"box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 4, 2)}
        if kind == "MaskRCNN":
            pools["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        cls = MaskRCNN if kind == "MaskRCNN" else FasterRCNN
        detector = cls(backbone, 2, rpn_anchor_generator=anchors, **pools, **same)
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    before = backbone.interactions[0].interaction_units_12.branch2to1_injector.ca_gamma.detach().clone()
    losses = []
    for step in range(16):
        pictures, targets = zip(*(scene(4 * (step % 3) + i) for i in range(4)), strict=True)
        loss = sum(detector(list(pictures), [dict(t) for t in targets]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert not torch.equal(before, backbone.interactions[0].interaction_units_12.branch2to1_injector.ca_gamma)
    found = detector.eval()([scene(0)[0]])[0]
    assert {"boxes", "labels", "scores"} <= set(found)


@pytest.mark.slow
def test_the_segmenter_learns_where_a_square_lies() -> None:
    torch.manual_seed(0)
    model = PIIPSegmenter(pyramid((16, 32, 48)), 2, hidden=16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(40):
        pictures, targets = zip(*(scene(4 * step + i) for i in range(4)), strict=True)
        logits = model(torch.stack(pictures) - 0.5)
        loss = torch.nn.functional.cross_entropy(logits, torch.cat([t["masks"] for t in targets]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    picture, target = scene(10_001)
    guess = model.eval()(picture[None] - 0.5).argmax(1)
    overlap = ((guess == 1) & (target["masks"] == 1)).sum() / ((guess == 1) | (target["masks"] == 1)).sum()
    assert overlap > 0.8
