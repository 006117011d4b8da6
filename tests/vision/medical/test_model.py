"""LightM-UNet: official sizes, key names and files; shapes, precision and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mmkit
from mmkit.backbones.model import load_official_checkpoint
from mmkit.errors import CheckpointError, InputError
from mmkit.vision.medical.model import LightMUNet, lightm_unet_2d, lightm_unet_3d
from mmkit.vision.medical.official import config_from_official


def tiny(dims: int = 2, **overrides) -> LightMUNet:
    settings = {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}
    return LightMUNet(dims, **{**settings, **overrides}).eval()


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "settings, parameters",
    [
        ((2, 32, 1, 2), 5_011_683),
        ((2, 32, 3, 2), 5_011_765),
        ((2, 32, 1, 3), 5_011_716),
        ((3, 32, 1, 3), 5_015_766),
        ((3, 16, 1, 2), 1_344_949),
        ((2, 16, 3, 2), 1_342_965),
        ((3, 8, 1, 2), 381_813),
        ((2, 8, 3, 2), 380_821),
    ],
)
def test_parameter_counts_of_the_official_code(settings: tuple[int, ...], parameters: int) -> None:
    with torch.device("meta"):
        assert count(LightMUNet(*settings)) == parameters


def test_parameter_counts_with_a_shorter_last_level() -> None:
    with torch.device("meta"):
        assert count(lightm_unet_3d(num_classes=3, blocks_down=(1, 2, 2, 2))) == 2_997_458
        assert count(lightm_unet_3d(num_classes=14, blocks_down=(1, 2, 2, 2))) == 2_997_821
        assert count(lightm_unet_2d(blocks_down=(1, 2, 2, 2))) == 2_993_375


def test_official_key_names() -> None:
    keys = set(lightm_unet_3d(num_classes=3).state_dict())
    assert len(keys) == 362
    mamba = {"A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight"}
    mamba |= {"dt_proj.weight", "dt_proj.bias", "out_proj.weight"}
    layer = {f"mamba.{k}" for k in mamba} | {"skip_scale", "norm.weight", "norm.bias", "proj.weight", "proj.bias"}
    expected = {f"down_layers.1.0.0.{k}" for k in layer}
    expected |= {f"down_layers.0.1.{conv}.{k}" for conv in ("conv1", "conv2") for k in layer}
    expected |= {f"down_layers.3.4.{k}" for k in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
    expected |= {"convInit.0.conv.weight", "convInit.1.conv.weight", "up_samples.2.0.conv.weight"}
    expected |= {f"up_layers.0.0.{k}" for k in ("skip_scale", "norm1.bias", "conv.0.conv.weight", "conv.1.conv.weight")}
    expected |= {f"conv_final.{k}" for k in ("0.weight", "0.bias", "2.0.conv.weight", "2.0.conv.bias", "2.1.conv.bias")}
    assert expected <= keys


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_nnunet_checkpoints_load(tmp_path, prefix: str) -> None:
    source = tiny(num_classes=3)
    file = tmp_path / "checkpoint_final.pth"
    extras = {
        "logging": {"dice": [np.float64(0.5)]},
        "_best_ema": np.float32(0.1),
        "trainer_name": "nnUNetTrainerLightMUNet",
    }
    torch.save({"network_weights": {prefix + k: v for k, v in source.state_dict().items()}, **extras}, file)
    target = load_official_checkpoint(tiny(num_classes=3), file)
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(source(x), target(x))


def test_the_first_release_and_other_networks_are_refused(tmp_path) -> None:
    state = tiny().state_dict()
    old = {"convInit.conv.weight": torch.ones(8, 1, 3, 3), **{k: v for k, v in state.items() if "convInit" not in k}}
    torch.save(old, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match="2024-03-29"):
        load_official_checkpoint(tiny(), tmp_path / "old.pth")
    torch.save(state, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load_official_checkpoint(tiny(num_classes=5), tmp_path / "two.pth")


@pytest.mark.parametrize("dims, size", [(2, (16, 24)), (3, (8, 4, 12))])
def test_shapes_gradients_and_saving(tmp_path, dims: int, size: tuple[int, ...]) -> None:
    model = tiny(dims, in_chans=2, num_classes=3)
    x = torch.randn(2, 2, *size, requires_grad=True)
    before = x.detach().clone()
    logits = model(x)
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.equal(x.detach(), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(LightMUNet.from_pretrained(tmp_path)(x), logits)


def test_hooks_that_replace_outputs_work() -> None:
    model = tiny()
    want = model(torch.ones(1, 1, 8, 8))
    for module in model.modules():
        module.register_forward_hook(lambda m, i, out: out.clone())
    assert torch.equal(model(torch.ones(1, 1, 8, 8)), want)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(1, 1, 9, 8), "multiple of 2"),
        (torch.zeros(1, 3, 8, 8), "1 input channel"),
        (torch.zeros(1, 8, 8), "2D network takes"),
        (torch.zeros(1, 1, 8, 8, 8), "2D network takes"),
        (torch.zeros(0, 1, 8, 8), "empty"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), "floating-point"),
    ],
)
def test_unusable_inputs_are_named(x: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny()(x)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init_filters": 12}, "multiple of num_groups"),
        ({"blocks_up": (1, 1)}, "one entry fewer"),
        ({"dims": 1}, "2 or 3"),
        ({"num_groups": 0}, "at least 1"),
        ({"num_classes": 0}, "at least 1"),
        ({"dropout_prob": 2.0}, "dropout_prob"),
        ({"blocks_down": (1, -1)}, "negative"),
    ],
)
def test_impossible_configurations_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**settings)


def test_padding_gives_any_size_and_leaves_fitting_sizes_alone() -> None:
    model, padded = tiny(), tiny(pad=True)
    padded.load_state_dict(model.state_dict())
    x = torch.randn(1, 1, 8, 12)
    assert torch.equal(model(x), padded(x))
    assert padded(torch.randn(1, 1, 9, 7)).shape == (1, 2, 9, 7)


def test_bidirectional_sees_the_rest_of_the_image_and_keeps_the_parameters() -> None:
    from mmkit.vision.medical.model import MambaLayer

    one, two = MambaLayer(8, 8), MambaLayer(8, 8, bidirectional=True)
    two.load_state_dict(one.state_dict())
    x = torch.randn(1, 8, 4, 4)
    changed = x.clone()
    changed[..., -1, -1] = 3 * torch.randn(1, 8)
    assert torch.allclose(one(x)[..., 0, 0], one(changed)[..., 0, 0])
    assert not torch.allclose(two(x)[..., 0, 0], two(changed)[..., 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_models_stay_close(dtype: torch.dtype) -> None:
    # weights of the golden case: LayerNorm after ReLU is ill-conditioned for weights drawn carelessly
    case = Path(__file__).parents[2] / "golden" / "lightm_unet" / "net2d"
    model = LightMUNet(**config_from_official(json.loads((case / "meta.json").read_text())["config"]))
    load_official_checkpoint(model, case / "weights.safetensors")
    x = load_file(case / "inputs.safetensors")["x"]
    want = model(x)
    with torch.autocast("cpu", dtype):
        got = model(x)
    assert torch.isfinite(got).all()
    assert (got.float() - want).norm() < 2e-2 * want.norm()
    half = model.to(dtype)(x.to(dtype))
    assert torch.isfinite(half).all()


def test_registered_by_name() -> None:
    model = mmkit.create_model("lightm_unet_2d_tiny", in_chans=3, init_filters=8)
    assert (model.spatial_dims, model.in_chans, model.multiple) == (2, 3, 4)
    assert {"lightm_unet_2d", "lightm_unet_3d"} <= set(mmkit.list_models("lightm"))


@pytest.mark.slow
def test_it_learns_noisy_discs() -> None:
    from mmkit.vision.medical.training import dice_ce_loss

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        grid = torch.arange(48.0)
        centre, radius = 12 + 24 * torch.rand(n, 2, 1, 1), 6 + 6 * torch.rand(n, 1, 1)
        disc = ((grid[:, None] - centre[:, 0]) ** 2 + (grid - centre[:, 1]) ** 2 < radius**2).long()
        return (1.2 * disc + 0.6 * torch.randn(n, 48, 48))[:, None], disc

    def score() -> float:
        x, y = batch(8)
        with torch.no_grad():
            guess = model.eval()(x).argmax(1)
        return float(2 * (guess * y).sum() / (guess.sum() + y.sum()))

    torch.manual_seed(0)
    model = tiny(blocks_down=(1, 1, 2), blocks_up=(1, 1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(90):
        x, y = batch(4)
        optimizer.zero_grad()
        dice_ce_loss(model.train()(x), y).backward()
        optimizer.step()
    assert score() > 0.8
