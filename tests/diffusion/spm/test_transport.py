"""Erasers that open as far as each prompt asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkit.adapters import apply_adapter, forward_context, save_adapter
from mmkit.diffusion import TextToImagePipeline
from mmkit.diffusion.spm import SPM, ConceptEraser, composed, save_official_checkpoint
from mmkit.errors import CheckpointError, InputError

LATENT = {"output_type": "latent"}


def eraser(sd: Any, folder: Path, **settings: Any) -> ConceptEraser:
    draw = ConceptEraser(sd, **settings)
    for seed, concept in enumerate(("van gogh", "snoopy")):
        spm = apply_adapter(sd.unet, "spm", concepts=(concept,))
        torch.manual_seed(seed)
        for p in spm.parameters():
            p.data.copy_(0.3 * torch.randn_like(p))
        save_adapter(spm, folder / "snoopy") if seed else save_official_checkpoint(spm, folder / "gogh.safetensors")
        spm.detach()
    assert draw.add(folder / "gogh.safetensors") == "gogh"
    draw.add(folder / "snoopy", "dog")
    return draw


def test_permeability_of_prompts(sd: Any, tmp_path: Path) -> None:
    draw = eraser(sd, tmp_path)
    assert draw.permeability("van gogh")["gogh"] == pytest.approx(1.0)
    assert draw.permeability("a photo of red van gogh")["gogh"] == 1.0, "it has all words"
    assert 0 < draw.permeability("a cat")["gogh"] < 1
    draw.matching = "tokens"
    assert draw.permeability("a van") == {"gogh": 0.5, "dog": 0.0}
    draw.floor = 0.2
    assert draw.permeability("a cat") == pytest.approx({"gogh": 0.2, "dog": 0.2})
    draw.matching, draw.floor, draw.calibrate = "clipcos", 0.0, True
    assert draw.permeability("") == {"gogh": 0.0, "dog": 0.0}
    draw.matching = 0.3
    assert draw.permeability("a cat") == pytest.approx({"gogh": 0.3, "dog": 0.3})


def test_each_prompt_of_a_batch_has_its_own_gates(sd: Any, tmp_path: Path) -> None:
    draw = eraser(sd, tmp_path, matching="tokens")
    prompts, seeds = ["a van", "a cat", "snoopy"], [4, 5, 6]
    together = draw.run(prompts, seeds, 2, 3.0, options=LATENT)
    for i, gates in enumerate(({"gogh": 0.5, "dog": 0.0}, {"gogh": 0.0, "dog": 0.0}, {"gogh": 0.0, "dog": 1.0})):
        with forward_context(gates=gates):
            alone = TextToImagePipeline.run(draw, prompts[i : i + 1], seeds[i : i + 1], 2, 3.0, options=LATENT)
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)
    for name in ("gogh", "dog"):
        draw.remove(name)
    base = draw.run(prompts, seeds, 2, 3.0, options=LATENT)
    assert torch.equal(base[1], together[1])
    assert not torch.equal(base[0], together[0])


def test_released_composition_squares_a_gate_and_mixes_erasers(sd: Any, tmp_path: Path) -> None:
    draw = eraser(sd, tmp_path, matching=0.7, composition="released")
    taken = SPM(replace(draw.erasers["gogh"].config, concepts=()), name="composed0").attach(
        draw.denoiser
    )  # any name may be taken
    taken.enabled = False
    gogh, dog = draw.erasers["gogh"], draw.erasers["dog"]
    mixed = draw.run(["a cat", "snoopy"], [4, 5], 2, 3.0, options=LATENT)
    tensors = composed({gogh: 0.7, dog: 0.7})
    dog.enabled = False
    alone = draw.run(["a cat"], [4], 2, 3.0, options=LATENT)[0]
    assert set(draw.erasers) == {"gogh", "dog"}, "the one adapter came off"
    draw.composition, draw.matching = "sum", 0.49
    torch.testing.assert_close(draw.run(["a cat"], [4], 2, 3.0, options=LATENT)[0], alone, atol=1e-4, rtol=1e-4)
    gogh.load_state_dict(tensors)
    draw.matching = 1.0
    torch.testing.assert_close(draw.run(["snoopy"], [5], 2, 3.0, options=LATENT)[0], mixed[1], atol=1e-4, rtol=1e-4)


def test_wrong_input(sd: Any, tmp_path: Path) -> None:
    for settings in ({"matching": "words"}, {"floor": 2.0}, {"composition": "product"}):
        with pytest.raises(InputError):
            ConceptEraser(sd, **settings)
    draw = ConceptEraser(sd)
    with pytest.raises(CheckpointError):
        draw.add(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="no eraser"):
        draw.remove("cat")
    assert draw.permeability("a cat") == {}


@pytest.mark.parametrize(
    "wrong", [{"matching": float("nan")}, {"matching": True}, {"matching": "x"}, {"floor": "a"}, {"floor": 2}]
)
def test_gates_are_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(wrong))} "):
        ConceptEraser(**wrong)
