"""Photographs are fine-tuned from classifiers solved on the features of the backbone as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.vision.classification import finetune, load_finetuned, prepare
from mmkit.vision.classification.probe import PRIOR, head_inputs, solve


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of stripes, 72 pixels wide."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, axis in (("across", 0), ("down", 1)):
        (folder / name).mkdir()
        for i in range(8):
            stripes = (
                120 + 80 * np.sin(np.indices((72, 72))[axis] * rng.uniform(0.4, 0.8)) + rng.normal(0, 15, (72, 72))
            )
            Image.fromarray(stripes.clip(0, 255).astype(np.uint8)).convert("RGB").save(folder / name / f"{i}.png")
    return folder


def test_the_solution_is_the_optimum_in_standardised_features() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=rng) * torch.tensor([1, 10, 0.1, 3, 0]) + torch.tensor([0, 100, 0, -5, 7])
    y = torch.randint(3, (60,), generator=rng)
    weight, bias = solve(x, y, 3)
    assert torch.equal(weight[:, 4], torch.zeros(3).double())  # a constant says nothing
    mean, deviation = x.double().mean(0)[:4], x.double().std(0, unbiased=False)[:4]
    z = (x.double()[:, :4] - mean) / deviation
    own = (weight[:, :4] * deviation).requires_grad_()
    offset = (bias + weight[:, :4] @ mean).requires_grad_()
    loss = torch.nn.functional.cross_entropy(z @ own.T + offset, y) + PRIOR * 5 / 60 * own.square().sum()
    loss.backward()
    assert max(own.grad.abs().max(), offset.grad.abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["linear_probe", "full"])
def test_a_short_gentle_training_starts_right_and_comes_back_bit_for_bit(
    photos: Path, tmp_path: Path, method: str
) -> None:
    result = finetune(
        photos, "mobilenetv2", method, epochs=1, batch_size=4, output_dir=tmp_path / "out", overrides={"img_size": 64}
    )
    assert result.accuracy == 1
    model = result.prepared.model.eval()
    picture = result.prepared.val[0][0][None]
    with torch.no_grad():
        assert torch.equal(load_finetuned(tmp_path / "out")(picture), model(picture))
    fresh = prepare(photos, "mobilenetv2", "linear_probe", overrides={"img_size": 64}).model
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name  # also statistics, with all weights trained


def test_what_has_no_vector_per_picture_is_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    found = head_inputs(model, ["0", "2"], torch.zeros(3, 3, 2, 2))
    assert {name: tuple(x.shape) for name, x in found.items()} == {"2": (3, 16)}
