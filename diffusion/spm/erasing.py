"""`erase`: one call for three methods, each of which leaves an adapter that can be weakened, taken off, saved and merged."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkit.adapters import Adapter, save_adapter
from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.diffusion.spm.adapter import SPM, phrases
from mmkit.diffusion.spm.calls import Calls
from mmkit.diffusion.spm.training import EraseConfig, SPMTrainer, check_prompts, concept_prompts, filled
from mmkit.diffusion.spm.uce import Text, UCEConfig, cross_attention, edit, kept_rows, pair_of
from mmkit.errors import InputError
from mmkit.training import FitResult, StepInfo

METHODS = ("spm", "esd", "uce")


@dataclass
class Erasure:
    """What `erase` has done to a pipeline.

    Attributes:
        pipeline: draws with the concepts erased.
        adapters: the erasers on its denoiser by name; `scale`, `disabled()`, `detach()` and `merge()` as of every adapter.
        fits: how those that were trained came about.
    """

    pipeline: TextToImagePipeline
    adapters: dict[str, Adapter]
    fits: dict[str, FitResult] = field(default_factory=dict)


def erase(
    pipeline: Any,
    concepts: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    method: str = "spm",
    *,
    keep: Sequence[str] = (),
    surrogate: str = "",
    templates: Sequence[str] = ("{}",),
    config: EraseConfig | UCEConfig | None = None,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
    resume: bool | str = "auto",
) -> Erasure:
    """Make a text-to-image model forget concepts. No pictures are needed.

    What it is not: a guarantee. Erasing depends on the prompt; words the training did not see, and embeddings searched for by someone who
    has the weights, may bring a concept back.

    Args:
        pipeline: a diffusers pipeline, its folder, a `TextToImagePipeline`, or `None` for the bundled model.
        concepts: phrases such as "snoopy"; "spm" trains one adapter for each, called by it, the others one for all of them. A concept
            with several words is a name with its phrases: `{"snoopy": ["snoopy", "the beagle of peanuts"]}`.
        method: "spm" (membranes, arXiv 2312.16145), "esd" (cross-attention layers trained whole, arXiv 2303.07345; with
            `settings={"layers": "all"}` all linear layers of the transformers), or "uce" (closed form in seconds, arXiv 2308.14761;
            for models with cross-attention).
        keep: prompts that must stay as they are. "esd" has no use for them.
        surrogate: what is drawn instead, for example "a dog".
        templates: prompts of a concept to learn from, with {} in its place.
        config: `EraseConfig`, for "uce" `UCEConfig`; default: the published settings, and for models below ten million parameters
            `EraseConfig.small()`.
        settings: of the adapter (`SPMConfig`).
        options: passed to the pipeline (height, width, ...).
        output_dir: gets a folder for each adapter, with `adapter/` for `load_adapter` and `run/` (the same call continues there).
        on_step, should_stop, progress, resume: see `mmkit.training.fit`.

    Raises:
        InputError: see `SPMTrainer`, an unknown method, or a model that the method is not for. The model is then as it was.
    """
    if method not in METHODS:
        raise InputError(f"method is one of {', '.join(METHODS)}, not {method!r}.")
    if config is not None and isinstance(config, UCEConfig) != (method == "uce"):
        raise InputError(f"{type(config).__name__} is not for method {method!r}.")
    draw = pipeline if isinstance(pipeline, TextToImagePipeline) else TextToImagePipeline(pipeline)
    named, folder = _named(concepts), None if output_dir is None else Path(output_dir).expanduser()
    names = tuple(dict.fromkeys(phrase for own in named.values() for phrase in own))
    concept_prompts(draw, names, keep, templates)  # all of them, before the first is trained
    done = Erasure(draw, {})
    try:
        if method == "uce":
            done.adapters["uce"] = _closed_form(draw, names, keep, surrogate, templates, config or UCEConfig(), options)  # type: ignore[arg-type]
            _save(done, "uce", folder)
            return done
        groups = named if method == "spm" else {"esd": names}
        for name, group in groups.items():
            trainer = SPMTrainer(
                draw, group, surrogate=surrogate, keep=keep, templates=templates, name=name, options=options,
                **_method(draw, method, config, settings),
            )  # fmt: skip
            done.adapters[name] = trainer.adapter
            fit_settings: dict[str, Any] = {
                "on_step": on_step,
                "should_stop": should_stop,
                "progress": progress,
                "resume": resume,
            }
            done.fits[name] = trainer.train(folder and folder / _file_name(name), **fit_settings)
            if done.fits[name].stopped == "interrupted":
                return done
            _save(done, name, folder)
    except BaseException:
        for adapter in done.adapters.values():
            adapter.detach()
        raise
    return done


def _named(concepts: Any) -> dict[str, tuple[str, ...]]:
    """The phrases of each concept by its name."""
    if isinstance(concepts, Mapping):
        names = phrases(list(concepts))
        return dict(zip(names, map(phrases, concepts.values()), strict=True))
    return {name: (name,) for name in phrases(concepts)}


def _method(draw: TextToImagePipeline, method: str, config: Any, settings: dict[str, Any] | None) -> dict[str, Any]:
    """What distinguishes the trained methods."""
    if method == "spm":
        return {"adapter": "spm", "settings": settings, "config": config}
    layers = (settings or {}).get("layers", "cross-attention")
    if layers not in ("cross-attention", "all") or set(settings or ()) - {"layers"}:
        raise InputError(f"ESD takes layers='cross-attention' or 'all', not {settings!r}.")
    paths = SPM().choices(draw.denoiser)
    if layers == "cross-attention":
        cross = [p for p in paths if "attn2." in p]
        paths = cross or [p for p in paths if "attn" in p]  # text and picture share the attention of newer transformers
    if config is None:
        own = EraseConfig.of(draw.denoiser)
        rate = {"lr": 1e-3} if own == EraseConfig.small() else {"lr": 1e-5, "max_steps": 1000}
        config = dataclasses.replace(own, anchor_kind="none", **rate)  # type: ignore[arg-type]
    return {"adapter": "linear_probe", "settings": {"modules_to_save": tuple(paths)}, "config": config}


def _closed_form(
    draw: TextToImagePipeline,
    names: tuple[str, ...],
    keep: Sequence[str],
    surrogate: str,
    templates: Sequence[str],
    config: UCEConfig,
    options: dict[str, Any] | None,
) -> Adapter:
    check_prompts(draw, [surrogate] if surrogate else [])
    paths = cross_attention(draw.denoiser, config.with_to_k)
    if not paths:
        raise InputError(f"UCE edits cross-attention, and {type(draw.denoiser).__name__} has none; use 'spm' or 'esd'.")
    prompts = [(filled(t, n), filled(t, surrogate)) for n in names for t in templates]
    texts = list(dict.fromkeys([*(p for pair in prompts for p in pair), *keep]))
    inputs = _inputs(Calls(draw, options), paths, texts)
    tokenizer = draw.pipe.tokenizer
    counts = [len(tokenizer(text, truncation=True).input_ids) for text in texts]
    pairs, kept, made = {}, {}, {}
    for path in paths:
        rows = inputs[path]
        key = rows.data_ptr()  # one text for all layers is one solve
        if key not in made:
            read = {text: Text(r, n) for text, r, n in zip(texts, rows, counts, strict=True)}
            own = [pair_of(read[c], read[g], config) for c, g in prompts]
            made[key] = own, kept_rows([read[k] for k in keep], config)
        pairs[path], kept[path] = made[key]
    return edit(draw.denoiser, pairs, kept, config, concepts=names, name="uce")


def _inputs(calls: Calls, paths: list[str], texts: list[str]) -> dict[str, Tensor]:
    """What the layers at `paths` read when the denoiser is told `texts`: (N, L, C)."""
    found: dict[str, Tensor] = {}

    def reader(path: str) -> Any:
        def look(module: Any, args: Any) -> None:
            found[path] = args[0]

        return calls.model.get_submodule(path).register_forward_pre_hook(look)

    latents, t = calls.rolled_in(texts, [0] * len(texts), steps=2, at=0, guidance=1.0)
    condition = calls.condition(texts)
    handles = [reader(path) for path in paths]
    try:
        with torch.no_grad():
            calls.answer(latents, t, condition)
    finally:
        for handle in handles:
            handle.remove()
    if unread := [p for p in paths if p not in found or len(found[p]) != len(texts)]:
        raise InputError(f"{unread[:3]} do not read one row per prompt, so that UCE cannot edit them.")
    return found


def _file_name(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)


def _save(done: Erasure, name: str, folder: Path | None) -> None:
    if folder is not None:
        save_adapter(done.adapters[name], folder / _file_name(name) / "adapter")
