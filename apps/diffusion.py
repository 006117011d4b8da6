"""New styles: adapt a small text-to-image model to a style or to a few pictures, and compare the same seeds before and after."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.adapters import save_adapter
from mmkit.apps.finetune_work import pack, train_in_thread
from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.apps.handlers import moved, number
from mmkit.apps.limits import of_bytes
from mmkit.apps.look import shows
from mmkit.apps.painting import EVERY, base, loss_curve, pixels, prompts_of, row, words_about
from mmkit.diffusion import Captioned, TextToImagePipeline, draw_domain, finetune
from mmkit.errors import InputError

MINE = "My pictures"
STYLES = {"Washed out": "washed out", "Night": "night", "Negative": "negative", "Canvas": "canvas", MINE: ""}
"""Label -> name of the domain."""
METHODS = {"DiffFit": "difffit", "LoRA": "lora", "IA3": "ia3", "All weights": "full"}
SETTINGS: dict[str, dict[str, Any]] = {"difffit": {"placement": "linear", "scale_blocks": "all"}}
FEWEST, MOST = 10, 50
PROMPTS = (
    "a large red circle\na blue star on a white background\ntwo green squares\na yellow striped ring\n"
    "three purple triangles\na cyan cross"
)

HELP = f"""
**1.** Choose a style, or bring {FEWEST} to {MOST} pictures of your own. **2.** Choose what is trained and press *Adapt*. **3.** Compare:
the upper row is the model as it came, the lower one after training, with the same words and seeds. *DiffFit* trains biases and
scale factors alone, 1.4 % of the parameters, and its file has 46 kB.

The bundled model is tiny: it draws 24 x 24 pixels and knows the words of a small drawn world (shapes, colors, sizes, textures,
places, grounds). Of pictures from outside that world it picks up colors and coarse forms.
"""


@dataclass
class Adapted:
    """What a visitor trained."""

    draw: TextToImagePipeline
    switchable: bool


SESSIONS: Sessions[Adapted] = Sessions(limit=12)
_stops: dict[str, threading.Event] = {}


def pictures_of(style: str, files: list[str] | None, caption: str, seed: int) -> Any:
    """What is trained on, as `finetune` takes it. Raises `InputError` in words for the page."""
    if style not in STYLES:
        raise InputError(f"Style must be one of {', '.join(STYLES)}, not {style!r}.")
    if style != MINE:
        return draw_domain(STYLES[style], MOST, seed=seed)
    paths = [Path(p) for p in files or ()]
    if not FEWEST <= len(paths) <= MOST:
        raise InputError(f"Bring {FEWEST} to {MOST} pictures; {len(paths)} are here.")
    try:
        captioned = Captioned(paths, [str(caption or "").strip()] * len(paths))
        return captioned.tensor(24) / 2 + 0.5, captioned.captions
    except InputError as error:  # without the server's folders
        text = str(error)
        for path in paths:
            text = text.replace(str(path), path.name)
        raise InputError(text) from error


@readable
def first_look(prompts: str, seed: float) -> tuple[Any, ...]:
    """What the model draws as it comes."""
    lines = prompts_of(prompts)
    return row(base(), lines, int(number("Seed", seed, 0, 2**31 - 99, whole=True))), words_about(lines)


@readable
def redraw(key: str, prompts: str, seed: float, strength: float) -> tuple[Any, ...]:
    """Both rows again, for other words, another seed or another strength."""
    before, words = first_look(prompts, seed)
    mine = SESSIONS.find(key)
    if mine is None:  # nothing was trained yet, or something else is being trained and shows itself
        return before, gr.skip(), words
    strength = number("Strength of the adapter", strength, 0, 1.5)
    return (
        before,
        row(mine.draw, prompts_of(prompts), int(seed), {"default": strength} if mine.switchable else None),
        words,
    )


@readable
def adapt(
    style: str, files: list[str] | None, caption: str, method: str, steps: float, prompts: str, seed: float,
    request: gr.Request,
) -> Iterator[tuple[Any, ...]]:  # fmt: skip
    """Train and show the same seeds growing into the style: yields status, loss curve, rows, and at the end figures and file."""
    if method not in METHODS:
        raise InputError(f"Method must be one of {', '.join(METHODS)}, not {method!r}.")
    lines, name = prompts_of(prompts), METHODS[method]
    total = int(number("Steps", steps, 10, 400, whole=True))
    seed = int(number("Seed", seed, 0, 2**31 - 99, whole=True))
    data = pictures_of(style, files, caption, seed)
    SESSIONS.forget()
    stop = _stops[str(request.session_hash)] = threading.Event()
    draw, folder = TextToImagePipeline(), output_folder()
    before = row(base(), lines, seed)
    looks: list[Image.Image] = []
    keep = (gr.skip(),) * 4
    yield f"{method}: reading the pictures ...", loss_curve([], total), before, before, *keep

    def train(on_step: Any, **options: Any) -> Any:
        def look(info: Any) -> None:
            if info.step % EVERY == 0:
                looks.append(row(draw, lines, seed))
            on_step(info)

        return finetune(
            data, draw, name, settings=SETTINGS.get(name), max_steps=total, on_step=look, seed=seed, **options
        )

    losses: list[tuple[int, float]] = []
    started = time.monotonic()
    result: Any = None
    for found, result in train_in_thread(train, stop, output_dir=folder / "run"):
        losses += [(info.step, info.loss) for info in found]
        if result is None and losses:
            status = f"{method}: step {losses[-1][0]} of {total}, loss {losses[-1][1]:.3f}"
            yield status, loss_curve(losses, total), before, looks[-1] if looks else before, *keep
    seconds = time.monotonic() - started
    if result is None or result.folder is None:
        raise InputError("The training was stopped before its first step.")
    key = SESSIONS.add(Adapted(draw, result.adapter is not None))
    kept = result.folder if result.adapter is None else save_adapter(result.adapter, folder / "adapter", half=True)
    size = sum(f.stat().st_size for f in kept.rglob("*.safetensors"))
    file = pack(kept, folder / f"mmkit-{name}-{style.lower().replace(' ', '-')}.zip")
    ended = "Stopped" if result.fit.stopped == "cancelled" else "Done"
    yield (
        f"{ended} after {result.fit.steps} steps. {words_about(lines)}".strip(),
        loss_curve(losses),
        before,
        row(draw, lines, seed),
        figures(result, size, seconds),
        gr.update(value=file, interactive=True),
        key,
        gr.update(interactive=result.adapter is not None, value=1),
    )


def figures(result: Any, size: int, seconds: float) -> str:
    """Parameters trained, size of the file, time and loss, as HTML."""
    shown = {
        f"of {result.total:,} parameters trained ({100 * result.trained / result.total:.2g} %)": f"{result.trained:,}",
        "to store and send": of_bytes(size),
        "to train": f"{seconds:.0f} s",
    }
    if result.fit.metrics:  # a run that was stopped early measured none
        shown["loss on pictures held back"] = f"{result.fit.metrics['loss']:.3f}"
    return (
        f'<div class="ft-figures">{"".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in shown.items())}</div>'
    )


def stop(request: gr.Request) -> str:
    """Ask the visitor's training to end; it does after the step it is in."""
    event = _stops.get(str(request.session_hash))
    if event is not None:
        event.set()
    return "Stopping after this step ..."


def forget(request: gr.Request) -> None:
    """The visitor closed the page."""
    event = _stops.pop(str(request.session_hash), None)
    if event is not None:
        event.set()
    SESSIONS.forget(str(request.session_hash))


def nothing() -> tuple[Any, ...]:
    """Outputs of `adapt` when it failed: no answer of before stays beside the new input."""
    off = gr.update(interactive=False)
    return "Nothing was trained: see the message.", loss_curve([], 100), gr.skip(), None, "", off, "", off


def build() -> None:
    """The page."""
    gr.Markdown(HELP, elem_id="diffusion-help")
    key = gr.State("")
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            style = gr.Radio(list(STYLES), value="Night", label="Style", elem_id="diffusion-style")
            with gr.Column(visible=False) as own:
                files = gr.File(
                    label=f"{FEWEST} to {MOST} pictures", file_count="multiple", file_types=["image"], elem_id="diffusion-files"
                )  # fmt: skip
                caption = gr.Textbox("a shape", label="What all of them show", elem_id="diffusion-caption")
            method = gr.Radio(list(METHODS), value="DiffFit", label="What is trained", elem_id="diffusion-method")
            steps = gr.Slider(25, 300, 100, step=25, label="Steps", elem_id="diffusion-steps")
            with gr.Row():
                run = gr.Button(
                    "Adapt", variant="primary", elem_id="diffusion-run", elem_classes=shows("diffusion-status", work=True)
                )  # fmt: skip
                halt = gr.Button("Stop", variant="stop", elem_id="diffusion-stop")
            prompts = gr.Textbox(PROMPTS, lines=6, label="Prompts, one a line", elem_id="diffusion-prompts")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="diffusion-seed")
        with gr.Column(scale=2, min_width=320):
            before = pixels("diffusion-before", "As it came")
            after = pixels("diffusion-after", "Adapted")
            strength = gr.Slider(
                0, 1.5, 1, step=0.1, label="Strength of the adapter", info="0 is the model as it came", interactive=False,
                elem_id="diffusion-strength",
            )  # fmt: skip
            status = gr.Textbox("Press Adapt.", label="Status", interactive=False, elem_id="diffusion-status")
            words = gr.Markdown(elem_id="diffusion-words")
            with gr.Row():
                with gr.Column(min_width=280):
                    curve = gr.HTML(loss_curve([], 100), elem_id="diffusion-loss")
                with gr.Column(min_width=280):
                    shown = gr.HTML(elem_id="diffusion-figures")
                    file = gr.DownloadButton("Download the adapter", interactive=False, elem_id="diffusion-download")
    private: dict[str, Any] = {"api_visibility": "private"}
    style.change(lambda s: gr.update(visible=s == MINE), style, own, queue=False, **private)
    gr.on(None, first_look, [prompts, seed], [before, words], **private)  # once, when the page opens
    asked = gr.on(
        [prompts.blur, *moved(seed, strength)],
        redraw,
        [key, prompts, seed, strength],
        [before, after, words],
        api_visibility="private",
        trigger_mode="always_last",
        show_progress="minimal",
    )
    asked.failure(lambda: (None, None, ""), None, [before, after, words], **private)
    answer: list[Any] = [status, curve, before, after, shown, file, key, strength]
    trained = run.click(
        adapt,
        [style, files, caption, method, steps, prompts, seed],
        answer,
        api_name="diffusion_adapt",
        show_progress="minimal",
        show_progress_on=status,
        concurrency_id="training",
        concurrency_limit=1,
    )
    trained.failure(nothing, None, answer, **private)
    halt.click(stop, None, status, queue=False, show_progress="hidden", **private)


APP = App(
    "diffusion",
    "New styles",
    "Adapt a small text-to-image model to a style or to pictures of yours in a minute, by 1.4 % of its parameters, and compare the same "
    "words and seeds before and after.",
    build,
    forget,
    sample="diffusion-run",
    picture="diffusion-after",
    load=base,
)
