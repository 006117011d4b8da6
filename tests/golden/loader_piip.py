"""Golden cases of PIIP: the sampling operator, classification pyramids and detection backbones of the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mmkit.backbones.model import load_official_checkpoint
from mmkit.ops import multi_scale_deformable_attention
from mmkit.vision.piip.model import PIIP
from mmkit.vision.piip.official import config_from_official
from mmkit.vision.piip.pyramid import PIIPFeaturePyramid


def run(case: Path, meta: dict[str, Any]) -> None:
    """Assert that every stored output of one case is reproduced."""
    inputs, expected = (load_file(case / f"{part}.safetensors") for part in ("inputs", "outputs"))
    tolerance = meta["tolerance"]
    if "sampling_locations" in inputs:
        found = _operator(inputs)
        for name, want in expected.items():
            torch.testing.assert_close(found[name], want, **tolerance, msg=lambda t, n=name: f"{n}: {t}")
        return
    found = _pyramid(case, meta, inputs)
    unknown = set(expected) - set(found)
    assert not unknown, f"outputs the loader does not compute: {sorted(unknown)}"
    for name, want in expected.items():
        limits = {"atol": tolerance["outputs_atol"], "rtol": tolerance["outputs_rtol"]}
        if name.startswith("grad"):
            limits = {"atol": tolerance["grads_rtol"] * float(want.abs().max()), "rtol": tolerance["grads_rtol"]}
        torch.testing.assert_close(found[name], want, **limits, msg=lambda t, n=name: f"{n}: {t}")


def _operator(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("value", "sampling_locations", "attention_weights")
    tensors = [inputs[n].clone().requires_grad_() for n in names]
    shapes = [tuple(s) for s in inputs["spatial_shapes"].tolist()]
    out = multi_scale_deformable_attention(tensors[0], shapes, tensors[1], tensors[2])
    out.backward(inputs["grad_output"])
    return {"output": out.detach(), **{f"grad_{n}": t.grad for n, t in zip(names, tensors, strict=True)}}


def _pyramid(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    weights = load_file(case / "weights.safetensors")
    config = meta["config"]
    patches = weights.get("branch4.patch_embed.proj.weight")
    own = patches is not None and len(patches) != config["branch3"].get("embed_dim", 768)
    settings = config_from_official(config, own_branch4=own)
    cls = PIIP if "num_classes" in settings else PIIPFeaturePyramid
    model = load_official_checkpoint(cls(**settings), case / "weights.safetensors")
    found: dict[str, Any] = {}
    for k, interaction in enumerate(model.interactions):
        interaction.register_forward_hook(lambda m, args, out, k=k: found.update(_features(k, out)))
    output = model(inputs["pixel_values"])
    if isinstance(output, Tensor):
        found |= {"logits": output.detach()}
        loss = F.cross_entropy(output, inputs["labels"])
    else:
        found |= {f"feat{i}": m.detach() for i, m in output.items()}
        loss = sum(m.square().mean() for m in output.values())
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    found |= {"loss": loss.detach(), "grad_norm": torch.stack([g.norm() for g in grads.values()]).norm()}
    official = {f"grad.{k}" for k in weights}
    for key in official:
        own = next(iter(model.official_state({key.removeprefix("grad."): torch.zeros(1, 1)})))
        found[key] = grads.get(own)
    return found


def _features(k: int, branches: list[Any]) -> dict[str, Tensor]:
    found = {f"interaction{k}.x{i}": t.x.detach() for i, t in enumerate(branches, 1)}
    return found | {
        f"interaction{k}.cls{i}": t.prefix.detach() for i, t in enumerate(branches, 1) if t.prefix is not None
    }
