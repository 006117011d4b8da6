"""DiffFit cases: facebookresearch/DiT with gammas through diffusers' DiT, and the transformer block of the UNet port."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmkit.diffusion.difffit.official import _GAMMAS, load_mkshing, load_official_checkpoint


def run(case: Path, meta: dict[str, Any]) -> None:
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    tolerance = {k: meta["tolerance"][k] for k in ("atol", "rtol")}
    if "kind" not in meta:
        return run_unet_block(case, meta, inputs, expected["output"], tolerance)
    model, adapter = load_official_checkpoint(case / "weights.safetensors", num_heads=meta["config"]["num_heads"])
    adapter.requires_grad_(True)
    assert adapter.num_parameters() == meta["num_trainable"]

    call = {"hidden_states": inputs["x"], "timestep": inputs["t"], "class_labels": inputs["y"]}
    output = model(**call).sample
    torch.testing.assert_close(output, expected["output"], **tolerance)
    loss = (output - 1).square().mean()
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    loss.backward()
    grad_rtol = meta["tolerance"]["grad_rtol"]
    norm = torch.stack([p.grad.norm() for p in adapter.parameters()]).norm()
    assert norm.item() == pytest.approx(expected["grad_norm_trainable"].item(), rel=grad_rtol)
    for key in [k for k in expected if k.startswith("grad.")]:
        _, _, block, kind = key.split(".", 3)
        paths = [f"transformer_blocks.{block}.{place}" for place in _GAMMAS[kind]]
        got = torch.cat([adapter.site(p).gamma_delta.grad for p in paths])
        assert (got - expected[key]).norm() <= grad_rtol * expected[key].norm()

    adapter.merge()
    torch.testing.assert_close(model(**call).sample, expected["output"], **tolerance)
    adapter.unmerge()
    with adapter.disabled():
        torch.testing.assert_close(model(**call).sample, expected["output_gamma_one"], **tolerance)


def run_unet_block(case: Path, meta: dict[str, Any], inputs: Any, expected: torch.Tensor, tolerance: Any) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    weights = load_file(case / "weights.safetensors")
    block = BasicTransformerBlock(
        meta["dim"], meta["heads"], meta["head_dim"], cross_attention_dim=meta["cross_attention_dim"],
        attention_bias=meta["attention_bias"],
    ).eval()  # fmt: skip
    block.load_state_dict({k: v for k, v in weights.items() if "gamma" not in k})
    with torch.no_grad():  # the port stores trained values of biases and norms, not differences
        for key in (own := [k for k in meta["trainable_keys"] if "gamma" not in k]):
            block.get_parameter(key).add_(0.1)
    adapter = load_mkshing(block, {k: v for k, v in weights.items() if "gamma" in k or k in own})
    call = (inputs["hidden_states"], None, inputs["encoder_hidden_states"])
    torch.testing.assert_close(block(*call), expected, **tolerance)
    adapter.merge()
    torch.testing.assert_close(block(*call), expected, **tolerance)
