"""`erase`: one call for three methods, each of which leaves an adapter that can be weakened, taken off, saved and merged."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkit.adapters import Adapter, save_adapter
from mmkit.diffusion.pipeline import TextToImagePipeline
from mmkit.diffusion.spm.adapter import SPM, phrases
from mmkit.diffusion.spm.closed_form import closed_form_edit
from mmkit.diffusion.spm.templates import concept_prompts
from mmkit.diffusion.spm.training import EraseConfig, SPMTrainer
from mmkit.diffusion.spm.uce import UCEConfig, attach
from mmkit.errors import InputError
from mmkit.storage.files import expanded
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
    superclass: Sequence[str] = (),
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
            for models with cross-attention, Flux and SD3).
        keep: prompts that must stay as they are. "esd" has no use for them.
        surrogate: what is drawn instead, for example "a dog".
        superclass: words that leave the concept open and under which it is drawn all the same ("dog" for a breed): their prompts are edited
            like the concept's, and open its membrane.
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
    named, folder = _named(concepts), None if output_dir is None else expanded(output_dir)
    if folder is not None and method == "spm":
        _require_own_folders(named)
    names = tuple(dict.fromkeys(phrase for own in named.values() for phrase in own))
    open_ = phrases(superclass, allow_none=True)
    concept_prompts(draw, (*names, *open_), keep, templates)  # all of them, before the first is trained
    done = Erasure(draw, {})
    try:
        if method == "uce":
            edited = closed_form_edit(draw, (*names, *open_), keep, surrogate, templates, config, options)  # type: ignore[arg-type]
            done.adapters["uce"] = attach(draw.denoiser, edited, concepts=(*names, *open_), name="uce")
            _save(done, "uce", folder)
            return done
        groups = named if method == "spm" else {"esd": names}
        for name, group in groups.items():
            trainer = SPMTrainer(
                draw, group, surrogate=surrogate, keep=keep, superclass=open_, templates=templates, name=name, options=options,
                **_method(draw, method, config, settings),
            )  # fmt: skip
            done.adapters[name] = trainer.adapter
            fit_settings: dict[str, Any] = {
                "on_step": on_step,
                "should_stop": should_stop,
                "progress": progress,
                "resume": resume,
            }
            done.fits[name] = trainer.train(folder and folder / file_name(name), **fit_settings)
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


def _require_own_folders(names: Iterable[str]) -> None:
    """Raise `InputError` when two erasers would be written to one folder."""
    taken: dict[str, str] = {}
    for name in names:
        if (other := taken.setdefault(file_name(name), name)) != name:
            raise InputError(
                f"{other!r} and {name!r} would both be written to {file_name(name)!r}. Erase one after the other, to other folders."
            )


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


def file_name(name: str) -> str:
    """What the files of an eraser are called: its name with _ for what is no letter, digit or hyphen."""
    return re.sub(r"[^\w-]+", "_", name)


def _save(done: Erasure, name: str, folder: Path | None) -> None:
    if folder is not None:
        save_adapter(done.adapters[name], folder / file_name(name) / "adapter")
