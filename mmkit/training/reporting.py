"""What every task leaves beside its model: report.json, report.html and run.toml."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from mmkit.storage import atomic_write
from mmkit.storage.settings import settings_text
from mmkit.training.config import FitConfig, FitResult
from mmkit.training.page import report_page

POINTS = 400
"""The loss curve keeps at most so many points."""
HEADING = "mmkit finetune --config run.toml repeats this run; what the command line says wins."


def thinned(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, loss), means over as many steps as leave at most `POINTS` of them."""
    size = -(-len(losses) // POINTS) or 1
    groups = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [(min((i + 1) * size, len(losses)), round(statistics.mean(g), 5)) for i, g in enumerate(groups)]


def told(run: FitResult, folder: Path | None, held: str, use: str) -> str:
    """What came out and how to use it, for people; `held` is a sentence on what was held back, or empty."""
    where = f"\nSaved to {folder}; look at {folder / 'report.html'}." if folder else ""
    numbers = f"{run.trainable_parameters:,} parameters trained in {run.steps} steps."
    return f"{numbers}{held and f' {held}'}{where} Try it in Python: {use}"


def classes_told(class_names: Sequence[str]) -> str:
    """Number and names of classes, for people."""
    return f"{len(class_names)} classes: {', '.join(class_names)}"


def dry(
    model: nn.Module,
    config: FitConfig,
    count: int,
    held: int,
    of: str,
    adapter: Any = None,
    notes: Sequence[str] = (),
) -> tuple[FitResult, str]:
    """What would be trained, instead of `fit`: a run of no steps, and lines for people.

    `of`: what the examples show, such as `classes_told`. `notes`: further lines on the data.
    """
    named = adapter.trainable_parameters() if adapter is not None else model.named_parameters()
    trainable = sum(p.numel() for _, p in named if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    settings = ", ".join(f"{k}={v!r}" for k, v in vars(config).items() if v is not None and k not in ("resume", "seed"))
    lines = [
        f"{count:,} training examples and {held:,} held back, of {of}.",
        *notes,
        f"{trainable:,} of {total:,} parameters would be trained. Nothing was written.",
        f"settings: {settings}",
    ]
    return FitResult([], [], {}, {}, 0, "dry run", None, 0.0, trainable), "\n".join(lines)


def write_report(
    folder: Path,
    model: nn.Module,
    run: FitResult,
    *,
    title: str,
    subtitle: str,
    score: tuple[str, float | None],
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    trained: Sequence[tuple[str, str]],
    use: str,
    page: Mapping[str, Any] | None = None,
    thumbnails: Sequence[Image.Image | None] = (),
) -> None:
    """Write the three files.

    Args:
        score: name and value in 0..1 of what counts, None when nothing was held back.
        found: what the task adds to report.json. settings: for run.toml. trained: facts for the page.
        use: a line of Python that loads the result. page, thumbnails: what the task adds to the page, see `report_page`.
    """
    total = sum(p.numel() for p in model.parameters())
    text = settings_text(settings, HEADING)
    report = {
        **found, "trainable_parameters": run.trainable_parameters, "total_parameters": total, "steps": run.steps,
        "seconds": round(run.seconds, 2), "stopped": run.stopped, "best": run.best_metrics, "last": run.metrics,
        "history": run.history, "run": text,
    }  # fmt: skip
    name, value = score
    shown = report | {
        "title": title,
        "subtitle": subtitle,
        "figures": [
            (name, "–" if value is None else f"{100 * value:.1f} %"),
            ("numbers trained", f"{run.trainable_parameters:,}"),
            ("steps", f"{run.steps:,}"),
            ("in training", f"{run.seconds:,.0f} s"),
        ],
        "losses": thinned(run.losses),
        "trained": [*trained, ("trained", f"{run.trainable_parameters:,} of {total:,} parameters")],
        "settings": text,
        "next": [("Ask it, in Python", use), ("Run it again", f"mmkit finetune --config {shlex.quote(str(folder))}/run.toml")],
        **(page or {}),
    }  # fmt: skip
    files = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.html": report_page(shown, thumbnails),
        "run.toml": text,
    }
    for file, content in files.items():
        with atomic_write(folder / file) as temporary:
            temporary.write_text(content, encoding="utf-8")
