"""Golden cases of SqueezeSAM: the authors' network with random weights, loaded through the official-checkpoint path."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmkit.backbones.model import load_official_checkpoint
from mmkit.vision.clicks.model import SqueezeSAM
from mmkit.vision.clicks.official import config_from_official


def run(case: Path, meta: dict[str, Any]) -> None:
    """Compare every recorded output of `case` with ours."""
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    model = SqueezeSAM(**config_from_official(meta["config"]))
    load_official_checkpoint(model, case / "weights.safetensors")
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    found = _outputs(model, inputs, [k for k in expected if k.startswith("encoder.")])
    tolerance = meta["tolerance"]
    unknown = set(expected) - set(found)
    assert not unknown, f"outputs the loader does not compute: {sorted(unknown)}"
    for name, want in expected.items():
        rtol = tolerance["grad_rtol"] if name.startswith("grad") else tolerance["rtol"]
        atol = tolerance["atol"]
        exact = not want.is_floating_point()
        if name.endswith("_train_mode"):
            # Statistics of a few values magnify rounding: what ours does to our own float64 answer, theirs may do too.
            rounding = (found[name].double() - found[f"{name}_float64"]).abs().max().item()
            atol = max(atol, 3 * rounding)
        torch.testing.assert_close(
            found[name].to(want.dtype),
            want,
            atol=0 if exact else atol,
            rtol=0 if exact else rtol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def _outputs(model: SqueezeSAM, inputs: dict[str, torch.Tensor], levels: list[str]) -> dict[str, torch.Tensor]:
    arguments = (inputs["images"], inputs["points"], inputs["point_labels"])
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        fused = model.early_fusion(*arguments)
        found["early_fusion_rgb_first"] = fused[:1, :3]
        found["early_fusion_prompt_channels"] = fused[:, 3:]
        features = model.encode(fused)
        for name in levels:
            found[name] = features[int(name.split(".")[1])]
        iou_token, mask_tokens, bottleneck = model.get_iou_predictions_and_mask_tokens(features[-1])
        found |= {"iou_token": iou_token, "mask_tokens": mask_tokens, "bottleneck": bottleneck}
        found["low_res_logits_all"], found["iou_all"] = model.forward_fused(fused)
    masks, iou = model(*arguments)
    loss = masks.square().mean() + iou.square().mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    found |= {"masks": masks.detach(), "iou": iou.detach(), "loss_eval": loss.detach()}
    found["grad_norm_eval"] = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    model.train()
    with torch.no_grad(), contextlib.suppress(ValueError):  # one value per channel has no batch statistics
        found["masks_train_mode"], found["iou_train_mode"] = model(*arguments)
        exact = model.double()(*(a.double() for a in arguments))
        found["masks_train_mode_float64"], found["iou_train_mode_float64"] = exact
    return found
