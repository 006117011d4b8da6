"""What `mmkit erase` does. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

PICTURE = "before_after.png"


def erase(
    concepts: Annotated[list[str], typer.Argument(help="What the model shall forget: 'snoopy', 'van gogh'.")],
    output: Annotated[Path, typer.Option(help="Where erasers, LoRA files and pictures go.")] = Path("runs/erased"),
    model: Annotated[
        Path | None, typer.Option(help="A folder of a diffusers pipeline; default: the bundled model.")
    ] = None,
    method: Annotated[str, typer.Option(help="spm, esd or uce.")] = "spm",
    keep: Annotated[list[str] | None, typer.Option(help="A prompt that must stay as it is; can be repeated.")] = None,
    surrogate: Annotated[str | None, typer.Option(help="What is drawn instead.")] = None,
    expand: Annotated[
        str | None, typer.Option(help="object or art: learn from common prompts of such concepts.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps for each concept.")] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Say how often the concepts are drawn before and after (bundled model).")
    ] = False,
    clip: Annotated[
        str | None,
        typer.Option(help="MODEL=FILE of open_clip, ViT-B-32=weights.safetensors: CLIPScore before and after."),
    ] = None,
    seed: int = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of continuing in --output.")] = False,
) -> None:
    """Make a text-to-image model forget concepts; needs no pictures. It is no guarantee: other words may bring them back."""
    from mmkit.diffusion import TextToImagePipeline
    from mmkit.diffusion.spm import erase as run, scene_rates
    from mmkit.errors import InputError, InterruptedRun, in_words
    from mmkit.storage.files import absolute, check_writable

    if evaluate and model is not None:
        raise InputError("--evaluate judges drawn scenes: leave --model out, or look at before_after.png.")
    scorer = None if clip is None else _scorer(clip)
    output, concepts = absolute(output), list(dict.fromkeys(c.strip() for c in concepts))
    check_writable(output / PICTURE)
    draw = TextToImagePipeline(model)
    jobs = _jobs(concepts, model is None, method, keep, surrogate, expand, steps, seed, draw)
    done: dict[str, Any] = {}
    advice = "Use the same to continue, --restart to start over, or another --output."
    for job in jobs:
        with in_words({"max_steps": "--steps", "seed": "--seed", "loss_fn": "concept and prompts"}, advice):
            erased = run(draw, **job, output_dir=output, resume=not restart)
        done |= erased.adapters
        for fit in erased.fits.values():
            if fit.stopped == "interrupted":
                raise InterruptedRun(fit.steps, fit.signal, output)
    before, after = _save(draw, concepts, done, output, seed)
    if scorer is not None:
        for name, pictures in (("before", before), ("after", after)):
            print(f"CLIPScore {name}: {float(scorer(pictures.images, pictures.prompts).mean()):.3f}")
    for word in concepts if evaluate else ():
        print(f"{word}: {scene_rates(draw, word, seed=seed)}.")
    print(f"Saved to {output}: a folder for each eraser, {PICTURE}.")


def _jobs(
    concepts: list[str], bundled: bool, method: str, keep: list[str] | None, surrogate: str | None, expand: str | None,
    steps: int | None, seed: int, draw: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Keywords for `erase`, once for each concept where the bundled model has prompts of its own for each."""
    from mmkit.diffusion.spm import EraseConfig, expand_prompts, scene_recipe
    from mmkit.errors import InputError

    more = {} if steps is None else {"max_steps": steps}
    if method == "uce" and more:
        raise InputError("--steps means nothing for uce, which solves in one step. Leave it out.")
    if method == "esd" and keep:
        raise InputError("--keep means nothing for esd, which holds no prompts. Leave it out, or use spm or uce.")
    if bundled and expand is None:
        if method != "spm" and len(concepts) > 1:
            raise InputError(f"{method} erases one concept of the bundled model at a time; use spm for several.")
        fixed: dict[str, Any] = {} if keep is None else {"keep": keep}
        fixed |= {} if surrogate is None else {"surrogate": surrogate}
        settings: dict[str, Any] = {} if method == "uce" else {"seed": seed, **more}
        return [scene_recipe(word, method, **settings) | fixed for word in concepts]
    config = None if method != "spm" else EraseConfig.of(draw.denoiser, seed=seed, **more)
    if method == "esd" and more:
        raise InputError("--steps is for spm; call mmkit.diffusion.spm.erase with a config for esd.")
    templates = ("{}",) if expand is None else expand_prompts(expand)
    job = {"concepts": concepts, "method": method, "keep": keep or [], "surrogate": surrogate or "", "config": config}
    return [job | {"templates": templates}]


def _scorer(clip: str) -> Any:
    from mmkit.diffusion.spm import ClipScorer
    from mmkit.errors import InputError
    from mmkit.storage.files import expanded

    name, _, file = clip.partition("=")
    if not file:
        raise InputError(f"--clip is a model of open_clip and its weights, ViT-B-32=weights.safetensors; not {clip!r}.")
    return ClipScorer(name, expanded(file))


def _save(draw: Any, concepts: list[str], adapters: dict[str, Any], output: Path, seed: int) -> tuple[Any, Any]:
    """LoRA files beside the membranes, and the same seeds before and after, which are returned."""
    from mmkit.diffusion.spm import SPM, export_lora
    from mmkit.diffusion.spm.erasing import file_name

    for name, adapter in adapters.items():
        if isinstance(adapter, SPM):
            export_lora(adapter, output / f"{file_name(name)}_lora.safetensors")
    prompts = [c for c in concepts for _ in range(4)][:16]
    before, after = draw(prompts, seed=seed, strengths={}), draw(prompts, seed=seed)
    pair = type(before)(before.images + after.images, before.prompts * 2, before.seeds * 2, before.settings, 0.0)
    pair.save(output / PICTURE)
    return before, after
