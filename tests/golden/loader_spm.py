"""SPM cases of Con6924/SPM: predictions of a UNet with membranes, one training step, the losses, facilitated transport."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkit.adapters import attached_adapters, merge_adapters
from mmkit.diffusion.spm import (
    anchoring_loss,
    composed,
    cosine_scores,
    erasing_loss,
    load_official_checkpoint,
    save_official_checkpoint,
    scores,
    token_scores,
)


def run(case: Path, meta: dict[str, Any]) -> None:
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    tolerance = {"rtol": meta["tolerance"].get("rtol", 0.0), "atol": meta["tolerance"]["atol"]}
    if "unet_config" in meta:
        run_unet(case, meta, inputs, expected, tolerance)
    elif "concepts" in meta:
        run_transport(meta, inputs, expected, tolerance)
    else:
        for key in [k.removesuffix(".loss") for k in expected if k.endswith(".loss")]:
            scale, weight = map(float, key.removeprefix("gs").split(".la"))
            erase = erasing_loss(inputs["target"], inputs["positive"], inputs["neutral"], scale)
            keep = anchoring_loss(inputs["anchor"], inputs["anchor_orig"])
            for name, value in {"_erase": erase, "_anchoring": keep, "": erase + weight * keep}.items():
                torch.testing.assert_close(value, expected[f"{key}.loss{name}"], **tolerance)


def run_transport(meta: dict[str, Any], inputs: Any, expected: Any, tolerance: Any) -> None:
    concepts, ids = inputs["erased_embeds"], inputs["erased_token_ids"].tolist()
    for i in range(len(meta["prompts"])):
        cosine = cosine_scores(inputs[f"prompt{i}_embeds"][0], concepts)
        tokens = token_scores(inputs[f"prompt{i}_token_ids"][0].tolist(), ids, meta["special_token_ids"])
        for ours, theirs in {"clipcos": "clipcos", "tokens": "tokenuni", "clipcos+tokens": "clipcos_tokenuni"}.items():
            torch.testing.assert_close(scores(cosine, tokens, ours), expected[f"prompt{i}.{theirs}"], **tolerance)


def run_unet(case: Path, meta: dict[str, Any], inputs: Any, expected: Any, tolerance: Any) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**meta["unet_config"]).eval().requires_grad_(False)
    weights = load_file(case / "weights.safetensors")
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.items() if k.startswith("unet.")})
    spms = {n: read(unet, {k[5:]: v for k, v in weights.items() if k.startswith(f"spm{n}.")}, n, meta) for n in "AB"}

    def predict(**scales: float) -> torch.Tensor:
        for name, spm in spms.items():
            spm.scale = scales.get(name, 0.0)
        return unet(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]).sample

    for key, want in expected.items():
        if key.startswith("spm"):
            torch.testing.assert_close(predict(**{key[3]: float(key[6:])}), want, **tolerance)
    torch.testing.assert_close(predict(), expected["base"], **tolerance)
    a, b = meta["compose"]["mA"], meta["compose"]["mB"]
    run_step(unet, spms["A"], inputs, expected, meta, tolerance)

    for gates, key in (({"A": a, "B": b}, f"compose_released_{a}A_{b}B"), ({"A": a}, f"released_single_{a}A")):
        own = {k: v.clone() for k, v in spms["A"].state_dict().items()}
        spms["A"].load_state_dict(composed({spms[n]: g for n, g in gates.items()}))
        torch.testing.assert_close(predict(A=1.0), expected[key], **tolerance)
        spms["A"].load_state_dict(own)

    # the official merge goes by the alpha among the tensors
    alpha = float(next(v for k, v in weights.items() if k.startswith("spmA.") and k.endswith(".alpha")))
    strengths = {n: g * alpha / meta["alpha"] for n, g in {"A": a, "B": b}.items()}
    torch.testing.assert_close(predict(**strengths), expected[f"compose_paper_{a}A_{b}B"], **tolerance)
    merge_adapters(unet, strengths)
    call = (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    torch.testing.assert_close(unet(*call).sample, expected[f"compose_paper_{a}A_{b}B"], **tolerance)


def read(unet: Any, tensors: dict[str, torch.Tensor], name: str, meta: dict[str, Any]) -> Any:
    """The SPM through a file and back again: every name and number stays; alpha is the one that the official code goes by."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/given.safetensors", {"prompts": "cat, a cat", "alpha": str(meta["alpha"])})
        spm = load_official_checkpoint(unet, f"{folder}/given.safetensors", name=name, official_alpha=True)
        save_official_checkpoint(spm, f"{folder}/written.safetensors")
        written = load_file(f"{folder}/written.safetensors")
    assert spm.config.concepts == ("cat", "a cat")
    assert (spm.config.rank, spm.config.alpha) == (meta["rank"], meta["alpha"])
    assert sorted(written) == sorted(tensors)
    for key, value in written.items():
        assert torch.equal(value, torch.tensor(meta["alpha"]) if key.endswith(".alpha") else tensors[key])
    layers = ["lora_unet_" + p.replace(".", "_") for p in spm.own_paths]
    assert layers == meta["spm_layer_names"]
    return spm


def run_step(unet: Any, spm: Any, inputs: Any, expected: Any, meta: dict[str, Any], tolerance: Any) -> None:
    given = {k.removeprefix("train."): v for k, v in inputs.items() if k.startswith("train.")}
    anchors = given["anchor_embeds_interleaved"].chunk(2)[1]  # what the official step makes of them
    texts = {"target": given["target_embeds"], "neutral": given["uncond_embeds"], "anchor": anchors}

    def predict(text: torch.Tensor) -> torch.Tensor:
        return unet(given["latents"].expand(len(text), -1, -1, -1), given["timestep"], text).sample

    for other in attached_adapters(unet).values():
        other.scale = float(other is spm)
    with spm.disabled():
        positive, neutral, frozen = (predict(texts[k]) for k in ("target", "neutral", "anchor"))
    answers = {k: predict(v) for k, v in texts.items()}
    got = {"pred_positive": positive, "pred_neutral": neutral, "pred_anchor_orig": frozen}
    got |= {"pred_target": answers["target"], "pred_anchor": answers["anchor"]}
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], **tolerance)
    erase = erasing_loss(answers["target"], positive, neutral)
    keep = anchoring_loss(answers["anchor"], frozen)
    loss = erase + 1000 * keep
    rtol = meta["tolerance"]["loss_rtol"]
    for key, value in {"loss": loss, "loss_erase": erase, "loss_anchoring": keep}.items():
        assert value.item() == pytest.approx(expected[key].item(), rel=rtol)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in spm.parameters()]).norm()
    assert norm.item() == pytest.approx(expected["grad_norm"].item(), rel=10 * rtol)
    paths = {"lora_unet_" + p.replace(".", "_"): p for p in spm.own_paths}
    for key in [k for k in expected if k.startswith("grad.")]:
        _, layer, part, _ = key.split(".")
        grad = getattr(spm.site(paths[layer]), part).weight.grad
        torch.testing.assert_close(
            grad, expected[key], rtol=10 * rtol, atol=10 * rtol * float(expected[key].abs().max())
        )
