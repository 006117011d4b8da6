"""UCE cases of rohitgandikota/unified-concept-editing, of both versions of its code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmkit.diffusion.spm import Text, UCEConfig, cross_attention, edit, kept_rows, pair_of, save_edited_weights


def run(case: Path, meta: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    given, tolerance = meta["config"], meta["tolerance"]
    unet = UNet2DConditionModel(**given["unet_config"]).eval().requires_grad_(False)
    unet.load_state_dict(load_file(case / "weights.safetensors"))
    call = (inputs["latents"], inputs["timestep"], inputs["text_embeddings"][:2])
    torch.testing.assert_close(unet(*call).sample, expected["unet_before"], rtol=1e-4, atol=1e-5)

    legacy = given["code"] == "legacy"
    settings = {k: given[k] for k in ("lamb", "erase_scale", "preserve_scale", "with_to_k")}
    settings["technique"] = given.get("technique", "replace")
    config = UCEConfig.legacy(0, **settings) if legacy else UCEConfig(**settings)
    rows = zip(given["texts"], inputs["text_embeddings"], inputs["num_tokens"].tolist(), strict=True)
    texts = {text: Text(embedding, tokens) for text, embedding, tokens in rows}
    guides = [" " if legacy and g == "" else g for g in given["guide_concepts"]]
    pairs = [pair_of(texts[c], texts[g], config) for c, g in zip(given["edit_concepts"], guides, strict=True)]
    kept = kept_rows([texts[k] for k in given["preserve_concepts"]], config)

    paths = cross_attention(unet, config.with_to_k)
    assert sorted(f"{p}.weight" for p in paths) == sorted(meta["edited_keys"])
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    adapter = edit(unet, dict.fromkeys(paths, pairs), dict.fromkeys(paths, kept), config)
    torch.testing.assert_close(unet(*call).sample, expected["unet_after"], rtol=1e-4, atol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        save_edited_weights(adapter, f"{folder}/edited.safetensors")
        written = load_file(f"{folder}/edited.safetensors")
    adapter.merge()
    for key, value in unet.state_dict().items():
        if f"new/{key}" in expected:
            torch.testing.assert_close(value, expected[f"new/{key}"], **tolerance)
        if key in meta["edited_keys"]:
            assert torch.equal(written.pop(key), value)
        else:
            assert torch.equal(value, before[key])
    assert not written
