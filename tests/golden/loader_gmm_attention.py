"""Golden cases of the official Gaussian-mixture-mask code: logits, masked attention logits, loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmkit.backbones.model import load_official_checkpoint
from mmkit.vision.gmm.masks import GaussianMixtureMask
from mmkit.vision.gmm.models.cait import GMMCaiT
from mmkit.vision.gmm.models.pit import GMMPiT
from mmkit.vision.gmm.models.swin import GMMSwin
from mmkit.vision.gmm.models.t2t import GMMT2T
from mmkit.vision.gmm.models.vit import GMMViT

CLASSES = {
    "ViT": GMMViT,
    "CaiT": GMMCaiT,
    "PiT": GMMPiT,
    "SwinTransformer": GMMSwin,
    "Swin": GMMSwin,
    "T2T_ViT": GMMT2T,
    "T2T": GMMT2T,
}
NAMES = {
    "dim": "embed_dim",
    "dim_head": "head_dim",
    "mlp_dim_ratio": "mlp_ratio",
    "num_kernals": "num_kernels",
    "stochastic_depth": "drop_path_rate",
}
HANDLED = {"cls", "is_GMM", "is_SLM", "channels"}
INACTIVE = {"dropout", "emb_dropout", "layer_dropout", "drop_rate", "attn_drop_rate", "use_checkpoint"}  # in eval mode
CONSTRUCTOR_DEFAULTS: dict[type, dict[str, Any]] = {  # of the official classes, where they differ from ours
    GMMViT: {"head_dim": 16},
    GMMPiT: {"head_dim": 64},
    GMMCaiT: {"num_kernels": 3},
    GMMT2T: {"img_size": 224, "num_classes": 1000},
    GMMSwin: {
        "img_size": 224,
        "num_classes": 1000,
        "patch_size": 4,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
    },
}


def build(config: dict[str, Any]) -> torch.nn.Module:
    """Our model for the keyword arguments of an official class."""
    cls = CLASSES[config["cls"]]
    settings = dict(CONSTRUCTOR_DEFAULTS[cls])
    pyramid = cls is GMMPiT
    names = {**NAMES, "heads": "num_heads", "depth": "depths" if pyramid else "depth"}
    settings |= {names.get(k, k): v for k, v in config.items() if k not in HANDLED | INACTIVE and v is not None}
    if pyramid and isinstance(settings["num_heads"], int):
        settings["num_heads"] = [settings["num_heads"]] * len(settings["depths"])
    if "channels" in config:
        settings["in_chans"] = config["channels"]
    settings["mask"] = "gmm" if config.get("is_GMM") else "elm" if config.get("is_SLM") else "none"
    return cls(**settings, official_underflow=True)


def run(case: Path, meta: dict[str, Any]) -> None:
    """Assert that our implementation reproduces every stored output of one case."""
    expected = load_file(case / "outputs.safetensors")
    inputs = load_file(case / "inputs.safetensors")
    tolerance = meta["tolerance"]
    if "grid" in meta["config"]:
        _run_mask(case, meta["config"], inputs, expected, tolerance)
        return
    model = load_official_checkpoint(build(meta["config"]), case / "weights.safetensors")
    if "trainable_params" in meta:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == meta["trainable_params"]
    masked: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(".mask"):
            module.register_forward_hook(lambda m, args, out, name=name: masked.__setitem__(name, out.detach()))
    logits = model(inputs["image"])
    loss = F.cross_entropy(logits, inputs["target"], label_smoothing=0.1)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    close = {"atol": tolerance["logits_atol"], "rtol": tolerance["logits_rtol"]}
    checked = 0
    for key, value in expected.items():
        if key == "logits":
            torch.testing.assert_close(logits, value, **close)
        elif key == "loss":
            torch.testing.assert_close(loss.view(1), value, atol=tolerance["loss_atol"], rtol=tolerance["logits_rtol"])
        elif key == "grad_norm":
            norm = torch.stack([g.norm() for g in grads.values()]).norm().view(1)
            torch.testing.assert_close(norm, value, atol=1e-6, rtol=tolerance["grad_rtol"])
        elif key.startswith("masked_logits."):
            found = masked[_our_name(model, key.removeprefix("masked_logits.") + ".alpha").removesuffix(".alpha")]
            found = found[..., -value.shape[-2] :, -value.shape[-1] :]
            torch.testing.assert_close(found, value, **close)
        elif key.startswith("grad."):
            ((name, value),) = model.official_state({key.removeprefix("grad."): value}).items()
            limit = tolerance["grad_rtol"] * float(value.abs().max())
            torch.testing.assert_close(grads[name], value, atol=limit, rtol=tolerance["grad_rtol"])
        else:
            raise AssertionError(f"{case.name}: no check for output {key!r}")
        checked += 1
    assert checked == len(expected)


def _our_name(model: Any, official: str) -> str:
    (name,) = model.official_state({official: torch.zeros(1, 1)})
    return name


def _run_mask(case: Path, config: Any, inputs: Any, expected: Any, tolerance: Any) -> None:
    mask = GaussianMixtureMask(config["heads"], config["grid"], config["kernels"], official_underflow=True)
    mask.load_state_dict(load_file(case / "weights.safetensors"))
    matrix = mask.matrix()
    close = {"atol": tolerance["atol"], "rtol": tolerance["rtol"]}
    torch.testing.assert_close(matrix[:, inputs["rows"]], expected["mask_rows"], **close)
    sums = matrix.double().sum((1, 2)).float()
    torch.testing.assert_close(sums, expected["mask_sum_per_head"], rtol=1e-4, atol=1e-3)
    generator = torch.Generator().manual_seed(int(inputs["seed_of_probe"]))
    probe = torch.randn(1, *matrix.shape, generator=generator)
    (matrix * probe).sum().backward()
    for name in ("alpha", "sigma"):
        value = expected[f"grad_{name}"]
        limit = tolerance["grad_rtol"] * float(value.abs().max())
        torch.testing.assert_close(getattr(mask, name).grad, value, atol=limit, rtol=tolerance["grad_rtol"])
