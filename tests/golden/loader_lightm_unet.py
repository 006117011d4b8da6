"""Golden cases of LightM-UNet, the Mamba block and the selective scan; the kind of case is read from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mmkit.backbones.model import load_official_checkpoint
from mmkit.ops import Mamba, selective_scan
from mmkit.storage import load_state, read_tensors
from mmkit.vision.medical.model import LightMUNet
from mmkit.vision.medical.official import config_from_official

BACKENDS = ("cpu", "torch", "reference")


def run(case: Path, meta: dict[str, Any]) -> None:
    """Check one case against every backend of the scan."""
    config = meta["config"]
    inputs, expected = (load_file(case / f"{part}.safetensors") for part in ("inputs", "outputs"))
    check = _scan if "dstate" in config else _mamba if "d_model" in config else _network
    for backend in BACKENDS:
        check(case, config, meta["tolerance"], inputs, expected, backend)


def _close(name: str, got: Tensor, want: Tensor, tolerance: dict[str, float]) -> None:
    kind = "grad" if name.startswith("grad.") else "y"
    limits = {"atol": tolerance[f"{kind}_atol"], "rtol": tolerance[f"{kind}_rtol"]}
    torch.testing.assert_close(got.to(want.dtype), want, msg=lambda text: f"{name}: {text}", **limits)


def _scan(case, config, tolerance, inputs, expected, backend) -> None:
    tensors = {**inputs, **load_file(case / "weights.safetensors")}
    grad_out = tensors.pop("grad_out", None)
    tensors = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    result = selective_scan(
        *(tensors[k] for k in ("u", "delta", "A", "B", "C")),
        *(tensors.get(k) for k in ("D", "z", "delta_bias")),
        delta_softplus=config["delta_softplus"],
        return_last_state=True,
        backend=backend,
    )
    got = dict(zip(("y", "last_state"), result, strict=True))
    if grad_out is not None:
        (got["y"] * grad_out).sum().backward()
    got["y_float64"] = got["y"]
    got |= {f"grad.{k}": v.grad for k, v in tensors.items() if v.grad is not None}
    for name, want in expected.items():
        _close(name, got[name].detach(), want, tolerance)


def _mamba(case, config, tolerance, inputs, expected, backend) -> None:
    block = Mamba(**config, backend=backend)
    load_state(block, read_tensors(case / "weights.safetensors"), source=str(case))
    x = inputs["x"].clone().requires_grad_()
    got = {"y": block(x)}
    if "grad_out" in inputs:
        (got["y"] * inputs["grad_out"]).sum().backward()
    got |= {f"grad.{k}": v.grad for k, v in [("x", x), *block.named_parameters()]}
    for name, want in expected.items():
        _close(name, got[name].detach(), want, tolerance)


def _network(case, config, tolerance, inputs, expected, backend) -> None:
    model = load_official_checkpoint(
        LightMUNet(**config_from_official(config), backend=backend), case / "weights.safetensors"
    )
    got: dict[str, Tensor] = {}
    modules = {"bottleneck": model.down_layers[-1], **dict(model.named_modules())}
    for name in expected:
        if name.startswith("act."):
            modules[name[4:]].register_forward_hook(lambda m, i, out, name=name: got.__setitem__(name, out))
    got["logits"] = model(inputs["x"])
    if "target" in inputs:
        got["loss"] = F.cross_entropy(got["logits"], inputs["target"]).reshape(1)
        got["loss"].sum().backward()
        grads = {f"grad.{k}": p.grad for k, p in model.named_parameters()}
        got |= grads
        got["grad_norm"] = torch.stack([g.norm() for g in grads.values()]).norm().reshape(1)
    for name, want in expected.items():
        error = (got[name].detach() - want).abs().max() / want.abs().max()
        limit = tolerance[name if name in tolerance else name.split(".")[0]]
        assert error <= limit, f"{case.name} {name} ({backend}): {error:.2e} > {limit:.0e}"
