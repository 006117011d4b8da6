"""How a pipeline calls its denoiser: what it passes for a prompt, and where sampling has come after some steps.

Every pipeline of diffusers prepares text, positions, sizes and guidance in its own way. Instead of repeating that for each, the pipeline
itself is run, and stopped at the call of its denoiser that is wanted. So whatever pipeline draws can be taught to erase.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.errors import InputError

Condition = dict[str, Any]

TEXT = ("encoder_hidden_states", "pooled_projections", "text_embeds", "cap_feats")
"""Arguments that hold embeddings of the prompt, in the denoisers of diffusers."""
_LATENTS, _TIMESTEP = ("sample", "hidden_states", "x"), ("timestep", "t")
_FOR_ALL_ROWS = ("img_ids", "txt_ids")  # positions (N, 3) of Flux, the same for all pictures


class _Enough(Exception):
    """The call that was waited for has come."""


class Calls:
    """The calls of a pipeline's denoiser.

    Args:
        draw: the pipeline.
        options: passed to it (height, width, ...).

    Attributes:
        model: the denoiser.
    """

    def __init__(self, draw: TextToImagePipeline, options: dict[str, Any] | None = None):
        self.draw, self.model, self.options = draw, draw.denoiser, options or {}
        self.signature = inspect.signature(type(self.model).forward)
        names = list(self.signature.parameters)
        try:
            self.latents = next(n for n in names if n in _LATENTS)
            self.timestep = next(n for n in names if n in _TIMESTEP)
        except StopIteration:
            raise InputError(
                f"{type(self.model).__name__} takes {names[1:4]}...: no latents and timestep to go by."
            ) from None

    def condition(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told about `prompts`, without guidance; one row for each (see `rows_of`)."""
        call = self._until(list(prompts), [0] * len(prompts), steps=2, at=0, guidance=1.0)
        if len(call[self.latents]) != len(prompts):
            raise InputError(f"{type(self.draw.pipe).__name__} does not call its denoiser with one row per prompt.")
        return {k: v for k, v in call.items() if k not in (self.latents, self.timestep, "return_dict")}

    def rolled_in(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, at: int, guidance: float
    ) -> tuple[Any, Any]:
        """Noisy latents and timestep after `at` of `steps` steps of sampling, one row per prompt; as the denoiser takes them."""
        call = self._until(list(prompts), list(seeds), steps, at, guidance)
        x, t = call[self.latents], call[self.timestep]
        return rows_of(x, range(len(prompts)), len(x)), t[:1] if isinstance(t, Tensor) and t.dim() else t

    def _until(self, prompts: list[str], seeds: list[int], steps: int, at: int, guidance: float) -> dict[str, Any]:
        """The arguments of the denoiser's first call at the timestep number `at`."""
        seen: list[float] = []
        found: dict[str, Any] = {}

        def look(module: Any, args: Any, kwargs: Any) -> None:
            call = self.signature.bind(module, *args, **kwargs).arguments
            t = call[self.timestep]
            t = float(t.flatten()[0] if isinstance(t, Tensor) else t)
            if t not in seen:
                seen.append(t)
            if len(seen) > at:
                found.update(list(call.items())[1:])
                raise _Enough

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.no_grad():
                TextToImagePipeline.run(
                    self.draw, prompts, seeds, steps, guidance, options=self.options
                )  # without gates
        except _Enough:
            return found
        finally:
            handle.remove()
        raise InputError(f"{type(self.draw.pipe).__name__} did not come to step {at} of {steps}.")

    def answer(self, latents: Any, t: Any, condition: Condition) -> Tensor:
        """The denoiser's answer to latents, one row each."""
        count = len(latents)
        if isinstance(t, Tensor) and t.dim():
            t = t.expand(count)
        out = self.model(**{self.latents: latents, self.timestep: t}, **condition, return_dict=False)[0]
        out = torch.stack(out) if isinstance(out, list) else out
        width = latents.shape[1] if isinstance(latents, Tensor) else out.shape[1]
        return out[:, :width] if out.shape[1] == 2 * width else out  # a variance may come with it


def rows_of(value: Any, index: Sequence[int], count: int, name: str = "") -> Any:
    """Rows `index` of what is given for `count` rows: tensors and lists of that length, also inside dicts."""
    if isinstance(value, dict):
        return {k: rows_of(v, index, count, k) for k, v in value.items()}
    if isinstance(value, list) and len(value) == count:
        return [value[i] for i in index]
    shared = name in _FOR_ALL_ROWS and isinstance(value, Tensor) and value.dim() == 2
    if isinstance(value, Tensor) and value.dim() and len(value) == count and not shared:
        return value[torch.as_tensor(list(index), device=value.device)]
    return value


def with_text(condition: Condition, change: Callable[[Tensor, int], Tensor]) -> Condition:
    """`condition` with `change(embedding, row)` in place of the embeddings of every row's prompt."""
    out: Condition = {}
    for name, value in condition.items():
        if isinstance(value, dict):
            out[name] = with_text(value, change)
        elif name in TEXT and value is not None:
            rows = [change(row, i) for i, row in enumerate(value)]
            out[name] = rows if isinstance(value, list) else torch.stack(rows)
        else:
            out[name] = value
    return out
