"""Several methods, or several folds, in one go: a folder for each, and one table, report and page above them."""

from __future__ import annotations

import json
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.adapters.api import resolve_config
from mmkit.data import ImageDataset, open_dataset
from mmkit.errors import InputError, InterruptedRun
from mmkit.storage import atomic_write
from mmkit.storage.files import absolute
from mmkit.storage.folders import check_no_saved
from mmkit.storage.settings import settings_text
from mmkit.training.answers import Answers, joined
from mmkit.training.page import report_page
from mmkit.vision.classification.preparing import Prepared, check_method, prepare
from mmkit.vision.classification.report import HEADING, table_rows
from mmkit.vision.classification.training import FinetuneResult, train_prepared


def compare(
    data: str | os.PathLike[str] | ImageDataset,
    methods: Sequence[str],
    backbone: str | os.PathLike[str] = "auto",
    *,
    output_dir: str | os.PathLike[str],
    folds: int | None = None,
    resume: bool = True,
    prepare_options: dict[str, Any] | None = None,
    fit_options: dict[str, Any] | None = None,
    on_prepared: Callable[[Prepared, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Train every method (in every fold) with the same data, split and settings; returns their reports, best first.

    Args:
        output_dir: gets `<method>/` (or `<method>/fold_1/` ...; `fold_1/` ... of a single method), each as `train_prepared` writes it,
            and `report.json`, `report.html` and `run.toml` about all. The same call continues.
        folds: K of a stratified cross validation: accuracy is then the mean over the folds, with its standard deviation.
        prepare_options, fit_options: go to `prepare` and `train_prepared`.
        on_prepared: called with each prepared model and its name ("ssf", "ssf, fold 2") before it is trained.

    Raises:
        InputError: a method given twice, or what the two functions refuse.
        InterruptedRun: Ctrl-C or SIGTERM; the same call goes on.
    """
    if len(set(methods)) != len(methods) or not methods:
        raise InputError(f"Give each method once, and at least one; found {', '.join(methods) or 'none'}.")
    if folds is not None and folds < 2:
        raise InputError(f"Cross validation needs 2 folds or more, not {folds}.")
    options = dict(prepare_options or {})
    for method in methods:  # the last one's mistakes, too, before the first is trained
        check_method(method)
        if method != "full":
            resolve_config(method, dict(options.get("settings") or {}))
    opened = data if isinstance(data, ImageDataset) else open_dataset(data, on_error=options.get("on_error", "raise"))
    folder = absolute(output_dir)
    check_no_saved(folder)
    reports = []
    for method in methods:
        place = folder / method if len(methods) > 1 else folder
        parts: list[FinetuneResult] = []
        for fold in [(k, folds) for k in range(1, folds + 1)] if folds else [None]:
            prepared = prepare(opened, backbone, method, fold=fold, **options)
            if not isinstance(data, ImageDataset):
                prepared.options["data"] = str(absolute(data))
            if on_prepared is not None:
                on_prepared(prepared, f"{method}, fold {fold[0]} of {fold[1]}" if fold else method)
            own = place / f"fold_{fold[0]}" if fold else place
            result = train_prepared(prepared, output_dir=own, resume=resume, **(fit_options or {}))
            if result.fit.stopped == "interrupted":
                raise InterruptedRun(result.fit.steps, result.fit.signal, own / "training")
            parts.append(_light(result, keep=fold is None))
        reports.append(
            _of_folds(method, parts, place, None if len(methods) > 1 else fit_options or {})
            if folds
            else parts[0].report
        )
    reports.sort(key=lambda r: -(r["accuracy"] or 0.0))
    if len(methods) > 1:
        _write_comparison(reports, folder, parts[0].prepared, folds, fit_options or {})
    return reports


def _light(result: FinetuneResult, keep: bool) -> FinetuneResult:
    """The same without the weights, which are on the disk: what is needed further on are figures and pictures."""
    if not keep:
        result.prepared.adapter = None
        result.prepared.model = result.prepared.model.to("meta")
    return result


def _of_folds(
    method: str, parts: Sequence[FinetuneResult], folder: Path, fit_options: dict[str, Any] | None
) -> dict[str, Any]:
    """Write and return the report of a cross validation; with its settings when it stands alone."""
    scores = [r.accuracy or 0.0 for r in parts]
    first = parts[0].report
    last = [r.report["last"]["accuracy"] for r in parts]
    errors = [r.merge_error for r in parts if r.merge_error is not None]
    told = joined([r.answers for r in parts if r.answers is not None])
    report = {
        k: first[k] for k in ("method", "backbone", "trainable_parameters", "total_parameters", "sites", "class_names")
    } | {
        "accuracy": statistics.mean(scores),
        "accuracy_spread": statistics.stdev(scores),
        "folds": scores,
        "last": {"accuracy": statistics.mean(last)},
        "seconds": round(sum(r.report["seconds"] for r in parts), 2),
        "merge_error": max(errors) if errors else None,
        "file_size": max(r.file_size for r in parts),
        "answers": told.report() | {"of": "held-out"},
    }
    page = {
        "title": f"{method} on {Path(report['backbone']).name}, {len(parts)} folds",
        "subtitle": f"Every one of {len(told.labels):,} pictures was held back once. Accuracy ± standard deviation over the folds.",
        "figures": [
            ("mean accuracy", f"{100 * report['accuracy']:.1f} %"),
            ("standard deviation", f"± {100 * report['accuracy_spread']:.1f}"),
            ("numbers trained", f"{report['trainable_parameters']:,}"),
            ("in training", f"{report['seconds']:,.0f} s"),
        ],
        "rows": [["fold", "accuracy"], *([k, f"{100 * s:.1f} %"] for k, s in enumerate(scores, 1))],
        "answers": report["answers"],
        "trained": [("method", method), ("backbone", report["backbone"])],
        "sites": report["sites"],
        "next": [("Ask the best fold", _predict(folder / f"fold_{scores.index(max(scores)) + 1}"))],
    }
    alone = {"folds": len(parts), "output": str(folder)} | (fit_options or {})
    options = None if fit_options is None else parts[0].prepared.options | alone
    _write(folder, report, report_page(page, _pictures(told, parts)), options)
    return report


def _pictures(told: Answers, parts: Sequence[FinetuneResult]) -> list[Image.Image | None]:
    """Thumbnails of the most wrong answers of all folds."""
    from torch.utils.data import ConcatDataset

    judged = [r.prepared.val if r.prepared.test is None else r.prepared.test for r in parts]
    raw: ConcatDataset[Any] = ConcatDataset([data.with_transform(None) for data in judged])
    return [raw[i][0] for i in told.most_wrong()]


def _predict(folder: Path) -> str:
    return f"mmkit predict photo.jpg --model {shlex.quote(str(folder))}"


def _write_comparison(
    reports: list[dict[str, Any]], folder: Path, prepared: Prepared, folds: int | None, fit_options: dict[str, Any]
) -> None:
    best, names = reports[0], [r["method"] for r in reports]
    where = folder / best["method"] / ("fold_1" if folds else "")
    page = {
        "title": f"{len(reports)} methods on {Path(best['backbone']).name}",
        "subtitle": f"{', '.join(names)}: the same pictures, split and settings. Each has a report of its own in its folder.",
        "figures": [
            (f"best: {best['method']}", "–" if best["accuracy"] is None else f"{100 * best['accuracy']:.1f} %"),
            ("smallest file", f"{min(r['file_size'] for r in reports) / 1024:,.0f} kB"),
            ("in training, all", f"{sum(r['seconds'] for r in reports):,.0f} s"),
        ],
        "rows": table_rows(reports),
        "next": [("Ask the best", _predict(where))],
    }
    options = prepared.options | {"adapter": ",".join(names), "folds": folds, "output": str(folder)} | fit_options
    short = [{k: v for k, v in r.items() if k != "answers"} for r in reports]
    _write(folder, {"methods": short, "best": best["method"]}, report_page(page), options)


def _write(folder: Path, report: dict[str, Any], page: str, options: dict[str, Any] | None) -> None:
    files = {"report.json": json.dumps(report, indent=2) + "\n", "report.html": page}
    if options is not None:
        settings = options.pop("settings", {})
        files["run.toml"] = settings_text({**options, "settings": settings}, HEADING)
    for name, text in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # a path may be no UTF-8
