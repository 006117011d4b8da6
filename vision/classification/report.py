"""Reports of fine-tuning runs: side by side as text, and each as numbers and as a page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.data import ImageDataset
from mmkit.storage.settings import settings_text
from mmkit.training import FitConfig, FitResult
from mmkit.training.answers import Answers
from mmkit.training.page import report_page
from mmkit.training.reporting import HEADING, thinned
from mmkit.vision.classification.preparing import Prepared

_OURS = ("resume", "progress", "seed")


def report_table(reports: list[dict[str, Any]]) -> str:
    """Reports of several methods as one aligned text table: accuracy of the best (saved) and of the last evaluation."""
    rows = table_rows(reports)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table_rows(reports: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of `report_table`, the heading first."""
    rows = [["method", "best accuracy", "last", "trainable", "of total", "file", "seconds", "merge error"]]
    for r in reports:
        share = r["trainable_parameters"] / r["total_parameters"]
        error = "-" if r["merge_error"] is None else f"{r['merge_error']:.1e}"
        best, last = r["accuracy"], r.get("last", {}).get("accuracy")
        spread = f" ± {100 * r['accuracy_spread']:.1f}" if r.get("accuracy_spread") is not None else ""
        rows.append(
            [
                r["method"], "-" if best is None else f"{100 * best:.1f}{spread} %", "-" if last is None else f"{100 * last:.1f} %",
                f"{r['trainable_parameters']:,}", f"{100 * share:.1f} %", f"{r['file_size'] / 1024:,.0f} kB",
                f"{r['seconds']:.1f}", error,
            ]
        )  # fmt: skip
    return rows


def run_settings(prepared: Prepared, config: FitConfig, output: Path | None) -> str:
    """`run.toml`: all that decides the run, by the names of the command's options."""
    given = dict(prepared.options)
    tables = {"settings": given.pop("settings", {})}
    where = {"output": str(output) if output is not None and given.get("data") else None}
    fitting = {k: v for k, v in vars(config).items() if k not in _OURS}
    return settings_text({**given, **where, **fitting, **tables}, HEADING)


def run_page(
    prepared: Prepared,
    run: FitResult,
    report: dict[str, Any],
    answers: Answers | None,
    data: ImageDataset,
    folder: Path,
) -> str:
    """The page of one run; the thumbnails are of `data`, whose examples `answers` are about."""
    best = report["accuracy"]
    figures = [("best accuracy", "–" if best is None else f"{100 * best:.1f} %")]
    if report["test_accuracy"] is not None:
        figures.insert(0, ("test accuracy", f"{100 * report['test_accuracy']:.1f} %"))
    figures += [
        ("numbers trained", f"{report['trainable_parameters']:,}"),
        ("of all", f"{100 * report['trainable_parameters'] / report['total_parameters']:.2f} %"),
        ("steps", f"{run.steps:,}"),
        ("in training", f"{run.seconds:,.0f} s"),
    ]
    name = "all weights" if prepared.adapter is None else prepared.method
    page = {
        "title": f"{name} on {Path(prepared.backbone['name']).name}",
        "subtitle": f"{len(prepared.train):,} training pictures of {len(prepared.class_names)} classes. "
        + (f"Accuracy is of {len(prepared.val):,} {prepared.measured_on} pictures." if len(prepared.val) else "None held back."),
        "figures": figures,
        "history": run.history,
        "losses": thinned(run.losses),
        "answers": report["answers"],
        "trained": [
            ("method", name),
            ("backbone", prepared.backbone["name"]),
            ("trained", f"{report['trainable_parameters']:,} of {report['total_parameters']:,} parameters"),
            ("training pictures", ", ".join(f"{k} {n:,}" for k, n in report["train_counts"].items())),
            ("start of the classifier", "solved on the backbone's features" if prepared.solve_heads else "random"),
            ("merged = adapted", "–" if report["merge_error"] is None else f"logits differ by {report['merge_error']:.1e} at most"),
        ],
        "sites": report["sites"],
        "settings": report["run"],
        "next": next_commands(prepared, folder),
    }  # fmt: skip
    return report_page(page, thumbnails(answers, data))


def thumbnails(answers: Answers | None, data: ImageDataset) -> list[Image.Image | None]:
    """The pictures of the most wrong answers."""
    raw = data.with_transform(None)
    return [raw[i][0] for i in answers.most_wrong()] if answers is not None else []


def next_commands(prepared: Prepared, folder: Path) -> list[tuple[str, str]]:
    """What to do with the result; a studio's folders are its own affair."""
    run = shlex.quote(str(folder) if prepared.options.get("data") else folder.name)
    commands = [("Ask it", f"mmkit predict photo.jpg --model {run}")]
    if prepared.adapter is not None and prepared.adapter.mergeable:
        commands.append(("Fold the adapter into plain weights", f"mmkit merge {run} --output {run}-merged"))
    commands.append(("Take it elsewhere", f"mmkit export {run} --format onnx --output {run}.onnx"))
    commands.append(("Run it again", f"mmkit finetune --config {run}/run.toml --output {run}-again"))
    return commands
