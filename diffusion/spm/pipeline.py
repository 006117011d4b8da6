"""Facilitated transport: pictures drawn with every eraser as strong as its concept is near to the prompt. arXiv 2312.16145.

draw = ConceptEraser(pipeline)
draw.add("snoopy.safetensors")
draw.permeability("a photo of snoopy")     # {"snoopy": 1.0}
draw(["a photo of snoopy", "a dog"], seed=3).save("pictures.png")

What it is not: a lock. A prompt that names the concept in other words opens the membrane less (`floor` sets the least), and whoever has the
weights takes the adapter off.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmkit.adapters import attached_adapters, forward_context, load_adapter
from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.diffusion.spm.adapter import SPM
from mmkit.diffusion.spm.calls import Calls
from mmkit.diffusion.spm.official import composed, load_lora, load_official_checkpoint
from mmkit.diffusion.spm.permeability import check_gates, cosine_scores, gate, scores, token_scores
from mmkit.errors import InputError, nearest
from mmkit.storage.files import expanded


class ConceptEraser(TextToImagePipeline):
    """A text-to-image pipeline whose erasers open as far as each prompt asks for.

    All attached SPM adapters that name concepts take part. Each prompt of a batch has gates of its own, for both halves of guidance.

    Args:
        model, device, dtype: as in `TextToImagePipeline`.
        matching: how near a prompt is: "clipcos+tokens", "clipcos", "tokens", or a number that holds for all prompts.
        floor: the least permeability, for concepts that must stay out whatever words a prompt uses.
        calibrate: take what the empty prompt scores as 0. Unrelated prompts share padding, so that their cosine is far above 0 otherwise;
            the official code leaves it there.
        composition: "sum" adds up the erasers' changes, each at its gate. "released" does what the official inference does, which makes
            one adapter of all and so squares the gate of a single one; the erasers must be alike. For parity; prompts go one by one.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        matching: str | float = "clipcos+tokens",
        floor: float = 0.0,
        calibrate: bool = False,
        composition: str = "sum",
        **settings: Any,
    ):
        check_gates(matching, floor)
        if composition not in ("sum", "released"):
            raise InputError(f"composition is 'sum' or 'released', not {composition!r}.")
        super().__init__(model, **settings)
        self.matching, self.floor, self.calibrate, self.composition = matching, floor, calibrate, composition

    @property
    def erasers(self) -> dict[str, SPM]:
        """The attached adapters that take part, by name."""
        return erasers_of(self.denoiser)

    def add(
        self, source: str | os.PathLike[str], name: str | None = None, *, concepts: Sequence[str] | None = None
    ) -> str:
        """Attach an eraser from an adapter's folder, or a `.safetensors` file: an SPM, or with `concepts` any LoRA.

        Returns its name on the model, by default that of the file. Raises `CheckpointError` when it does not fit.
        """
        path = expanded(source)
        name = name or path.stem
        if path.is_dir():
            load_adapter(self.denoiser, path, name=name)
        elif concepts is not None:
            load_lora(self.denoiser, path, list(concepts), name=name)
        else:
            load_official_checkpoint(self.denoiser, path, name=name)
        return name

    def remove(self, name: str) -> None:
        """Take an eraser off. Raises `InputError` for an unknown name."""
        adapters = attached_adapters(self.denoiser)
        if name not in adapters:
            raise InputError(f"There is no eraser {name!r}. {nearest(name, adapters)}")
        adapters[name].detach()

    def permeability(self, prompt: str) -> dict[str, float]:
        """How far each eraser opens for `prompt`: 0 leaves the model as it is, 1 erases fully."""
        return {name: float(values[0]) for name, values in self._gates([prompt]).items()}

    def _gates(self, prompts: list[str]) -> dict[str, Tensor]:
        """One value per prompt for each eraser."""
        erasers = self.erasers
        if isinstance(self.matching, int | float):
            return {name: torch.full((len(prompts),), float(self.matching)) for name in erasers}
        concepts = list(dict.fromkeys(c for a in erasers.values() for c in a.config.concepts))
        texts = [*prompts, *concepts, ""]
        rows = _embeddings(Calls(self), texts) if self.matching != "tokens" and concepts else None
        ids = [self.pipe.tokenizer(text, truncation=True).input_ids for text in texts]
        special = self.pipe.tokenizer.all_special_ids

        def near(i: int, own: list[int]) -> Tensor:
            tokens = token_scores(ids[i], [ids[k] for k in own], special)
            cosine = tokens if rows is None else cosine_scores(rows[i], rows[own])
            return scores(cosine, tokens, str(self.matching))

        found = {}
        for name, adapter in erasers.items():
            own = [len(prompts) + concepts.index(c) for c in adapter.config.concepts]
            zero = float(near(len(texts) - 1, own).max()) if self.calibrate else 0.0
            found[name] = torch.tensor([gate(near(i, own), floor=self.floor, zero=zero) for i in range(len(prompts))])
        return found

    def run(self, texts: list[str], *args: Any, **kwargs: Any) -> list[Image.Image]:
        """As in `TextToImagePipeline`, each prompt with its own gates."""
        gates = self._gates(texts)
        if self.composition == "sum" or not gates:
            with opened(self.denoiser, gates, len(texts)):
                return super().run(texts, *args, **kwargs)
        seeds, *rest = args
        pictures = []
        for i, (text, seed) in enumerate(
            zip(texts, seeds, strict=True)
        ):  # one adapter made of all, another for each prompt
            with self._composed({name: float(values[i]) for name, values in gates.items()}):
                pictures += super().run([text], [seed], *rest, **kwargs)
        return pictures

    @contextlib.contextmanager
    def _composed(self, gates: dict[str, float]) -> Iterator[None]:
        """Inside the block the official code's one adapter acts instead of the erasers."""
        erasers = {name: a for name, a in self.erasers.items() if a.enabled}
        if not erasers:
            yield
            return
        tensors = composed({a: gates[name] * float(a.scale) for name, a in erasers.items()})
        with contextlib.ExitStack() as stack:
            for adapter in erasers.values():
                stack.enter_context(adapter.disabled())
            taken = attached_adapters(self.denoiser)
            unused = next(n for n in (f"composed{i}" for i in itertools.count()) if n not in taken)
            one = SPM(next(iter(erasers.values())).config, name=unused).attach(self.denoiser)
            stack.callback(one.detach)
            one.load_state_dict(tensors)
            yield


def erasers_of(model: nn.Module) -> dict[str, SPM]:
    """The SPM adapters on `model` that name concepts, by their names."""
    found = attached_adapters(model)
    return {k: a for k, a in found.items() if isinstance(a, SPM) and a.config.concepts and a.attached}


@contextlib.contextmanager
def opened(model: nn.Module, gates: dict[str, Tensor], rows: int) -> Iterator[None]:
    """Inside the block every call of `model` has its erasers' `gates`, one value for each of `rows` pictures; guidance repeats those."""

    def fit(module: Any, given: Any, named: Any) -> None:
        first = given[0] if given else next(v for k, v in named.items() if k in ("sample", "hidden_states", "x"))
        context.gates = {name: values.repeat(len(first) // rows) for name, values in gates.items()}

    handle = model.register_forward_pre_hook(fit, prepend=True, with_kwargs=True)
    try:
        with forward_context() as context:
            yield
    finally:
        handle.remove()


def _embeddings(calls: Calls, texts: list[str]) -> Tensor:
    """What the text encoder makes of `texts`: (N, L, C); shorter ones are filled up with zeros."""
    told = calls.condition(texts)
    rows = told.get("encoder_hidden_states", told.get("cap_feats"))
    if rows is None:
        raise InputError(
            "The pipeline gives its denoiser no embedding of the prompt; use matching='tokens' or a number."
        )
    return rows if isinstance(rows, Tensor) else torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
