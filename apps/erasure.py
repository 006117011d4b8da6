"""Forgetting: take concepts out of a small text-to-image model, one membrane each, and compare the same seeds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.adapters import load_adapter, save_adapter
from mmkit.apps.finetune_work import pack, train_in_thread
from mmkit.apps.frame import App, Sessions, output_folder, readable
from mmkit.apps.handlers import moved, number
from mmkit.apps.look import shows
from mmkit.apps.painting import EVERY, base, drawing, loss_curve, pixels, prompts_of, row, words_about
from mmkit.charts import bar_chart
from mmkit.data.drawn.scenes import BACKGROUNDS, COLORS, SHAPES
from mmkit.diffusion import TextToImagePipeline
from mmkit.diffusion.spm import ConceptEraser, erase, export_lora, scene_recipe
from mmkit.errors import InputError

WORDS = (*SHAPES, *COLORS, "striped", "dotted", *BACKGROUNDS)
SLOTS = 3
"""Concepts that a visitor may have erased at once."""
PROMPTS = "a red circle\na blue circle\na red square\na green triangle\ntwo yellow circles\na purple ring on a white background"

HELP = """
**1.** Choose a concept and press *Erase*: a *membrane* of 13,312 numbers learns from words alone, without pictures, what the model shall
no longer draw. **2.** Compare the same words and seeds. Each membrane can be switched off, weakened, and joined by others. **3.** A prompt
opens a membrane as far as it is near the concept; the bars show how far.

It is no lock. Words that nobody trained on may bring a concept back, whoever has the weights takes the membrane off, and what erases most
thoroughly also harms most. The lowest row is *UCE*, which edits the layers that read the text in one step; it needs no training and hits
neighbours more.
"""


@dataclass
class Mine:
    """What a visitor has erased: a model of one's own with its membranes, and the words in the order of the slots."""

    draw: ConceptEraser
    words: list[str] = field(default_factory=list)


SESSIONS: Sessions[Mine] = Sessions(limit=12)
_stops: dict[str, threading.Event] = {}


def rows(mine: Mine | None, prompts: list[str], seed: int, settings: list[float], gated: bool) -> tuple[Any, ...]:
    """As it came, with membranes, with UCE; and the bars."""
    before = row(base(), prompts, seed, {})
    if mine is None:
        return before, None, None, ""
    chosen = dict(zip(mine.words, settings, strict=False))
    mine.draw.matching = "clipcos+tokens" if gated else 1.0
    with drawing:
        opened = {p: mine.draw.permeability(p) for p in prompts}
    bars = "".join(
        bar_chart(word, [(_short(p), opened[p][word] * chosen[word], f"{opened[p][word] * chosen[word]:.2f}") for p in prompts])
        for word in mine.words
    )  # fmt: skip
    erased = row(mine.draw, prompts, seed, {w: s for w, s in chosen.items() if s})
    mine.draw.matching = 1.0  # an edit of the weights knows no gates
    edited = row(mine.draw, prompts, seed, {_uce(w): 1.0 for w, s in chosen.items() if s})
    return before, erased, edited, bars


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 17 else f"{prompt[:16]}…"


def _uce(word: str) -> str:
    return f"{word}, edited"


def strengths_of(on: list[bool], strength: list[float]) -> list[float]:
    """Strength by slot, 0 where a concept is switched off."""
    checked = [number("Strength", s, 0, 1.5) for s in strength]
    return [s if o else 0.0 for o, s in zip(on, checked, strict=True)]


@readable
def first_look(prompts: str, seed: float) -> tuple[Any, ...]:
    """What the model draws as it comes."""
    lines = prompts_of(prompts)
    return row(base(), lines, int(number("Seed", seed, 0, 2**31 - 99, whole=True)), {}), words_about(lines)


@readable
def redraw(key: str, prompts: str, seed: float, gated: bool, *slots: Any) -> tuple[Any, ...]:
    """All rows again, for other words, another seed or other strengths."""
    lines = prompts_of(prompts)
    settings = strengths_of(list(slots[:SLOTS]), list(slots[SLOTS:]))
    found = rows(SESSIONS.find(key), lines, int(number("Seed", seed, 0, 2**31 - 99, whole=True)), settings, bool(gated))
    return *found, words_about(lines)


@readable
def forget_a_concept(
    key: str, word: str, steps: float, prompts: str, seed: float, gated: bool, request: gr.Request
) -> Iterator[tuple[Any, ...]]:
    """Train one membrane and show the same seeds losing the concept; then everything that is erased by now, at full strength."""
    if word not in WORDS:
        raise InputError(f"Concept must be one of {', '.join(WORDS)}, not {str(word)[:40]!r}.")
    lines, total = prompts_of(prompts), int(number("Steps", steps, 10, 600, whole=True))
    seed = int(number("Seed", seed, 0, 2**31 - 99, whole=True))
    mine = SESSIONS.find(key) or Mine(ConceptEraser(calibrate=True))
    if word not in mine.words and len(mine.words) >= SLOTS:
        raise InputError(f"{SLOTS} concepts are erased already: press Bring all back first.")
    stop = _stops[str(request.session_hash)] = threading.Event()
    draw, folder = TextToImagePipeline(), output_folder()
    before = row(base(), lines, seed, {})
    looks: list[Image.Image] = []
    keep = (gr.skip(),) * (4 + 2 * SLOTS)
    yield f"Erasing {word!r} ...", loss_curve([], total), before, before, *keep

    def train(on_step: Any, **options: Any) -> Any:
        def look(info: Any) -> None:
            if info.step % EVERY == 0:
                looks.append(row(draw, lines, seed, None))
            on_step(info)

        return erase(draw, **scene_recipe(word, max_steps=total, seed=seed), on_step=look, **options)

    losses: list[tuple[int, float]] = []
    started, result = time.monotonic(), None
    for found, result in train_in_thread(train, stop):
        losses += [(info.step, info.loss) for info in found]
        if result is None and losses:
            status = f"Erasing {word!r}: step {losses[-1][0]} of {total}"
            yield status, loss_curve(losses, total), before, looks[-1] if looks else before, *keep
    if result is None or not losses:
        raise InputError("The training was stopped before its first step.")
    file = take_over(mine, word, result.adapters[word], folder)
    new = SESSIONS.add(mine)
    _, erased, edited, bars = rows(mine, lines, seed, [1.0] * len(mine.words), bool(gated))
    ended = "Stopped" if result.fits[word].stopped == "cancelled" else "Done"
    yield (
        f"{ended} after {losses[-1][0]} steps, {time.monotonic() - started:.0f} s. {words_about(lines)}".strip(),
        loss_curve(losses),
        before,
        erased,
        edited,
        bars,
        gr.update(value=file, interactive=True),
        new,
        *slot_updates(mine.words),
    )


def take_over(mine: Mine, word: str, adapter: Any, folder: Path) -> str:
    """Put the membrane and UCE's edit of the same concept on the visitor's model; returns the file with the membrane."""
    kept = save_adapter(adapter, folder / "erasers" / word)
    export_lora(adapter, folder / "erasers" / f"{word}_lora.safetensors")
    for name in (word, _uce(word)):
        if name in mine.draw.adapters:
            mine.draw.remove(name)
    load_adapter(mine.draw.denoiser, kept, name=word)
    plain_model = TextToImagePipeline()
    edited = erase(plain_model, **scene_recipe(word, "uce")).adapters["uce"]
    load_adapter(mine.draw.denoiser, save_adapter(edited, folder / "edits" / word), name=_uce(word))
    if word not in mine.words:
        mine.words.append(word)
    return pack(folder / "erasers", folder / f"mmkit-eraser-{word}.zip")


def slot_updates(words: list[str]) -> list[Any]:
    """Switches, then sliders: one for each erased concept, at full strength."""
    names = [*words, *[""] * (SLOTS - len(words))]
    switches = [gr.update(label=f"Erase {w}", visible=bool(w), value=True) for w in names]
    return switches + [gr.update(label=f"Strength: {w}", visible=bool(w), value=1) for w in names]


def stop(request: gr.Request) -> str:
    """Ask the visitor's training to end; it does after the step it is in."""
    event = _stops.get(str(request.session_hash))
    if event is not None:
        event.set()
    return "Stopping after this step ..."


def bring_back() -> tuple[Any, ...]:
    """Drop all membranes of the visitor."""
    SESSIONS.forget()
    off = gr.update(value=None, interactive=False)
    return "Nothing is erased.", loss_curve([], 100), None, None, "", off, "", *slot_updates([])


def forget(request: gr.Request) -> None:
    """The visitor closed the page."""
    event = _stops.pop(str(request.session_hash), None)
    if event is not None:
        event.set()
    SESSIONS.forget(str(request.session_hash))


def build() -> None:
    """The page."""
    gr.Markdown(HELP, elem_id="erasure-help")
    key = gr.State("")
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            word = gr.Dropdown(list(WORDS), value="circle", label="Concept", elem_id="erasure-concept")
            steps = gr.Slider(25, 600, 450, step=25, label="Steps", elem_id="erasure-steps")
            with gr.Row():
                run = gr.Button(
                    "Erase", variant="primary", elem_id="erasure-run", elem_classes=shows("erasure-status", work=True)
                )  # fmt: skip
                halt = gr.Button("Stop", variant="stop", elem_id="erasure-stop")
            back = gr.Button("Bring all back", elem_id="erasure-back")
            switches, sliders = [], []
            for i in range(SLOTS):
                switches.append(gr.Checkbox(True, label=f"Erase {i + 1}", visible=False, elem_id=f"erasure-on-{i}"))
                sliders.append(
                    gr.Slider(0, 1.5, 1, step=0.1, label=f"Strength: {i + 1}", visible=False, elem_id=f"erasure-strength-{i}")
                )  # fmt: skip
            gated = gr.Checkbox(
                True, label="Open by the prompt", info="Off: every membrane acts on every prompt", elem_id="erasure-gated"
            )  # fmt: skip
            prompts = gr.Textbox(PROMPTS, lines=6, label="Prompts, one a line", elem_id="erasure-prompts")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="erasure-seed")
        with gr.Column(scale=2, min_width=320):
            before = pixels("erasure-before", "As it came")
            after = pixels("erasure-after", "Erased by membranes")
            edited = pixels("erasure-edited", "Erased by UCE instead")
            status = gr.Textbox("Press Erase.", label="Status", interactive=False, elem_id="erasure-status")
            words = gr.Markdown(elem_id="erasure-words")
            with gr.Row():
                with gr.Column(min_width=280):
                    curve = gr.HTML(loss_curve([], 100), elem_id="erasure-loss")
                    file = gr.DownloadButton("Download the eraser", interactive=False, elem_id="erasure-download")
                with gr.Column(min_width=280):
                    gr.Markdown("#### How far the membranes open")
                    bars = gr.HTML(elem_id="erasure-bars")
    private: dict[str, Any] = {"api_visibility": "private"}
    gr.on(None, first_look, [prompts, seed], [before, words], **private)  # once, when the page opens
    asked = gr.on(
        [prompts.blur, *moved(seed, gated, *switches, *sliders)],
        redraw,
        [key, prompts, seed, gated, *switches, *sliders],
        [before, after, edited, bars, words],
        api_visibility="private",
        trigger_mode="always_last",
        show_progress="minimal",
    )
    asked.failure(lambda: (None, None, None, "", ""), None, [before, after, edited, bars, words], **private)
    answer: list[Any] = [status, curve, before, after, edited, bars, file, key, *switches, *sliders]
    trained = run.click(
        forget_a_concept,
        [key, word, steps, prompts, seed, gated],
        answer,
        api_name="erasure_erase",
        show_progress="minimal",
        show_progress_on=status,
        concurrency_id="training",
        concurrency_limit=1,
    )
    trained.failure(
        lambda: ("Nothing was erased: see the message.", loss_curve([], 100)), None, [status, curve], **private
    )
    halt.click(stop, None, status, queue=False, show_progress="hidden", **private)
    back.click(bring_back, None, [status, curve, after, edited, bars, file, key, *switches, *sliders], **private)


APP = App(
    "erasure",
    "Forgetting",
    "Make a small text-to-image model forget a shape, a color or a texture in a minute, without a picture, and see what stays and how far "
    "each prompt opens the membrane.",
    build,
    forget,
    sample="erasure-run",
    picture="erasure-after",
    load=base,
)
