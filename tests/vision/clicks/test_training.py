"""Training from simulated clicks: samplers, targets, losses, and a small network that learns."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from mmkit.errors import InputError
from mmkit.vision.clicks.model import SqueezeSAM
from mmkit.vision.clicks.training import (
    close_small_holes,
    distance_transform,
    focal_dice,
    iterative_loss,
    mask_iou,
    merge_held_objects,
    right_clicks,
    sample_boxes,
    sample_clicks,
    sample_outliers,
    whole_object_parents,
)


def test_batched_distance_transform_is_exact():
    mask = torch.rand(3, 17, 26) > 0.1
    mask[1] = True
    for found, region in zip(distance_transform(mask), mask, strict=True):
        expected = ndimage.distance_transform_edt(np.pad(region.numpy(), 1))[1:-1, 1:-1]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("style", ["uniform", "ritm", "center"])
def test_training_clicks_lie_in_the_error_with_the_right_sign(style):
    target = torch.zeros(3, 40, 40, dtype=torch.bool)
    target[:, 10:30, 10:30] = True
    prediction = target.clone()
    prediction[0, 10:30, 10:20] = False  # missed
    prediction[1, 0:9, :] = True  # too much; sample 2 is perfect
    valid = torch.ones_like(target)
    for _ in range(5):
        points, labels = sample_clicks(prediction, target, valid, style=style)
        assert labels.tolist() == [1, 0, -1]
        assert 10 <= points[0, 0] < 20
        assert points[1, 1] < 9
        assert points[2].tolist() == [-1, -1]
    with pytest.raises(InputError):
        sample_clicks(prediction, target, valid, style="odd")


def test_boxes_follow_the_object_and_outliers_miss_it():
    target = torch.zeros(2, 30, 40, dtype=torch.bool)
    target[0, 5:10, 7:20] = True
    target[1, 0:3, 0:2] = True
    points, labels = sample_boxes(target, jitter=0)
    assert points.tolist() == [[[7, 5], [19, 9]], [[0, 0], [1, 2]]]
    assert labels.tolist() == [[2, 3]] * 2
    for _ in range(5):
        wrong, kinds = sample_outliers(target, torch.ones_like(target), near=4)
        assert kinds.tolist() == [1, 1]
        assert not any(target[i, int(y), int(x)] for i, (x, y) in enumerate(wrong))


def test_loss_prefers_the_right_mask_and_skips_unknown_pixels():
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    valid = torch.ones_like(target)
    good, bad = 8 * (2 * target - 1)[:, None], -8 * (2 * target - 1)[:, None]
    losses = focal_dice(torch.cat([good, bad], dim=1), target, valid)
    assert losses[0, 0] < 0.01 < 1 < losses[0, 1]
    half = good.clone()
    half[..., 4:] *= -1
    valid[..., 4:] = 0
    assert focal_dice(half, target, valid)[0, 0] < 0.01


def test_the_focal_balance_decides_where_an_uncertain_pixel_ends():
    target = torch.zeros(1, 1, 2, dtype=torch.bool)
    target[..., 0] = True  # one logit for both: inside half of the time
    found = {}
    for alpha in (0.25, 0.5):
        logit = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([logit], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            both = logit.view(1, 1, 1, 1).expand(1, 1, 1, 2)
            (
                focal_dice(both, target, torch.ones_like(target), alpha=alpha)
                - focal_dice(both, target, torch.ones_like(target), focal_weight=0)
            ).sum().backward()
            optimizer.step()
        found[alpha] = logit.sigmoid().item()
    assert found[0.25] < 0.42
    assert found[0.5] == pytest.approx(0.5, abs=0.01)


def test_start_clicks_are_right_and_distinct():
    target = torch.zeros(64, 32, 32, dtype=torch.bool)
    target[:, 4:20, 6:18] = True
    valid = torch.ones_like(target)
    valid[:, 28:] = False
    points, labels = right_clicks(target, valid, 5, negatives=True)
    assert points.shape == (64, 5, 2)
    assert {-1, 0, 1} == set(labels.unique().tolist())
    for spots, kinds in zip(points.long().tolist(), labels.tolist(), strict=True):
        clicks = [(x, y, k) for (x, y), k in zip(spots, kinds, strict=True) if k >= 0]
        assert all(target[0, y, x] == bool(k) and valid[0, y, x] for x, y, k in clicks)
        assert len(set(clicks)) == len(clicks)
    assert 0 not in right_clicks(target, valid, 5, negatives=False)[1]


def test_parts_know_their_whole_and_holes_close():
    whole = np.zeros((30, 30), bool)
    whole[5:25, 5:25] = True
    part, alone = np.zeros_like(whole), np.zeros_like(whole)
    part[6:10, 6:20] = True
    alone[0:3, 0:3] = True
    assert whole_object_parents([part, whole, alone]) == [1, 1, 2]
    dotted = whole.copy()
    dotted[10, 10] = False
    dotted[12:18, 12:18] = False
    closed = close_small_holes(dotted)
    assert closed[10, 10]
    assert not closed[14, 14]


def test_persons_are_merged_with_what_they_hold():
    person, bag, far = (np.zeros((60, 60), bool) for _ in range(3))
    person[10:50, 20:35] = True
    bag[30:40, 36:44] = True
    far[0:5, 55:60] = True
    assert merge_held_objects([person, bag, far], ["person", "handbag", "handbag"]) == [(0, 1)]
    assert merge_held_objects([person, bag], ["person", "car"]) == [(0,)]


def test_iterative_training_reaches_every_weight():
    model = SqueezeSAM(
        img_size=32, patch_embed_dim=8, dims=(8, 12), mlp_dim=8, num_heads=2, negative_clicks=True, previous_mask=True
    )
    target = torch.zeros(6, 32, 32, dtype=torch.bool)
    target[:, 8:20, 8:20] = True
    moved = set()
    for _ in range(12):
        loss, metrics = iterative_loss(model, {"image": torch.rand(6, 3, 32, 32), "target": target}, outlier_prob=0.5)
        loss.backward()
        moved |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved | _dead_biases(model) == {n for n, _ in model.named_parameters()}
    assert 0 <= metrics["iou"] <= metrics["best"] <= 1


def _dead_biases(model):
    """Key biases cancel in the softmax, up to rounding."""
    return {n for n, _ in model.named_parameters() if n.endswith("k_proj.bias")}


def scenes(n, seed, side=64):
    """Colored disks and rectangles with occlusion."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((side, side))
    out = []
    for _ in range(n):
        image = np.ones((side, side, 3)) * rng.random(3) + rng.normal(0, 0.05, (side, side, 3))
        ids = np.zeros((side, side), int)
        for k in range(1, 4):
            y, x, a, b = *rng.uniform(10, side - 10, 2), *rng.uniform(6, 14, 2)
            shape = (abs(cols - x) < a) & (abs(rows - y) < b) if k % 2 else (cols - x) ** 2 + (rows - y) ** 2 < a**2
            ids[shape], image[shape] = k, rng.random(3)
        wanted = rng.integers(1, 4)
        target = ids == (wanted if (ids == wanted).sum() >= 40 else 3)
        out.append(_example(image, target))
    return out


def persons(n, seed, side=64):
    """A head, a torso and a bag in random colors; the target is all three, "parts" lists each."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((side, side))
    out = []
    for _ in range(n):
        image = np.ones((side, side, 3)) * rng.random(3) + rng.normal(0, 0.05, (side, side, 3))
        y, x, r = rng.uniform(14, 24), rng.uniform(18, 36), rng.uniform(5, 8)
        head = (cols - x) ** 2 + (rows - y) ** 2 < r**2
        torso = (abs(cols - x) < 1.4 * r) & (rows > y + 0.8 * r) & (rows < y + 4 * r)
        bag = (abs(cols - x - 2.2 * r) < 0.9 * r) & (abs(rows - y - 3 * r) < r) & ~torso
        parts = [head & ~torso, torso, bag]
        for part in parts:
            image[part] = rng.random(3)
        out.append(_example(image, head | torso | bag, parts))
    return out


def _example(image, target, parts=()):
    pixels = torch.from_numpy(np.clip(image, 0, 1)).permute(2, 0, 1).float()
    row = {"image": pixels, "target": torch.from_numpy(target)}
    return {**row, "parts": torch.from_numpy(np.stack(parts))} if len(parts) else row


def toy(**options):
    return SqueezeSAM(
        img_size=64,
        patch_embed_dim=16,
        dims=(16, 24, 32, 48),
        mlp_dim=48,
        num_heads=4,
        iou_head_hidden_dim=48,
        **options,
    )


def train_toy(model, data, steps, **options):
    from mmkit.training import FitConfig, fit

    def loss_fn(model, batch):
        return iterative_loss(model, batch, max_rounds=1, box_prob=0, outlier_prob=0, **options)

    data = [{k: row[k] for k in ("image", "target")} for row in data]
    config = FitConfig(max_steps=steps, batch_size=16, lr=3e-3, clip_grad=1.0, progress=False, warmup_steps=20)
    fit(model, data, loss_fn=loss_fn, config=config)
    return model.eval()


@torch.no_grad()
def masks_at(model, row, region, off=False):
    """All masks for a click deep inside `region` (or off the picture), and the predicted IoU."""
    y, x = np.unravel_index(int(distance_transform(region[None])[0].argmax()), region.shape)
    point = (-50.0, -50.0) if off else (float(x), float(y))
    logits, scores = model(row["image"][None], torch.tensor([[[point]]]), torch.tensor([[[-1 if off else 1]]]))
    return logits[0, 0] > 0, scores[0, 0]


def best_iou(model, data, off=False):
    return np.mean(
        [mask_iou(masks_at(model, r, r["target"], off)[0], r["target"], torch.tensor(True)).max().item() for r in data]
    )


@pytest.mark.slow
def test_a_small_network_learns_to_follow_the_click_and_needs_it():
    torch.manual_seed(0)
    model = train_toy(toy(), scenes(600, 0), 200)
    held_out = scenes(60, 1)
    with_click, without = best_iou(model, held_out), best_iou(model, held_out, off=True)
    assert with_click > 0.35
    assert without < 0.5 * with_click


@pytest.mark.slow
def test_whole_object_targets_make_a_click_on_a_part_select_the_whole():
    torch.manual_seed(0)
    model = train_toy(toy(), persons(320, 2), 140)
    whole, as_part = [], []
    for row in persons(25, 3):
        for part in row["parts"]:
            masks, scores = masks_at(model, row, part)
            chosen = masks[scores.argmax()]
            whole.append(float(mask_iou(chosen, row["target"], torch.tensor(True))))
            as_part.append(float(mask_iou(chosen, part, torch.tensor(True))))
    assert np.mean(whole) > 0.6
    assert np.mean(whole) > np.mean(as_part)
