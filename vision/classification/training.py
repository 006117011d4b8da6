"""Fine-tune a backbone on a folder of images with any adapter: what `mmkit finetune`, the demo and the studio all call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkit.backbones import mark_trained
from mmkit.data import ImageDataset
from mmkit.errors import InputError, RunDiffersError, nearest
from mmkit.storage import folder_lock
from mmkit.storage.files import absolute
from mmkit.storage.folders import check_free
from mmkit.training import FitConfig, FitResult, RateSearch, StepInfo, find_lr, fit
from mmkit.training.answers import Answers
from mmkit.training.reporting import thinned
from mmkit.vision.classification.metrics import answers_on, merge_error
from mmkit.vision.classification.preparing import Prepared, prepare
from mmkit.vision.classification.probe import start_heads
from mmkit.vision.classification.report import run_page, run_settings
from mmkit.vision.classification.saving import KEPT, KINDS, save_run

LEARNING_RATES = {"linear_probe": 3e-2, "ssf": 2e-2, "bitfit": 2e-2, "lora": 5e-3, "full": 5e-4}
"""Peak learning rates that work on small data sets; other methods start from 2e-3."""

GENTLE_RATES = {"linear_probe": 1e-5, "full": 5e-5}
"""Those from solved classifiers, where there is little left to learn and much to spoil; other methods start from 3e-4."""


@dataclass
class FinetuneResult:
    """What fine-tuning produced.

    Attributes:
        prepared: the model with the trained adapter still attached.
        fit: history, metrics, seconds.
        folder: where it was saved, or `None`; also `None` after Ctrl-C or SIGTERM (`fit.stopped` is "interrupted"): then
            only the state of the run is kept, to be continued.
        accuracy: best accuracy on the pictures that `prepared.measured_on` names, 0..1; `None` when none are held back. The saved weights
            are those of it.
        test_accuracy: of the saved weights on `prepared.test`, which had no say in choosing them; `None` without a test split.
        file_size: bytes of the saved files that are needed beside the backbone.
        answers: to the pictures of the test split, else to those held back; `None` when nothing was saved and there is no test split.
        merge_error: largest difference of the logits after merging, or `None` when the method cannot be merged.
    """

    prepared: Prepared
    fit: FitResult
    folder: Path | None = None
    accuracy: float | None = None
    test_accuracy: float | None = None
    file_size: int = 0
    merge_error: float | None = None
    answers: Answers | None = None
    report: dict[str, Any] = field(default_factory=dict)


def fit_config(prepared: Prepared, *, lr: float | None = None, **given: Any) -> FitConfig:
    """How a prepared model is trained when `given` (fields of `FitConfig`) does not say otherwise.

    Raises `InputError` for a setting that does not exist.
    """
    known = [f.name for f in dataclasses.fields(FitConfig)]
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"Training has no setting {unknown[0]!r}. {nearest(unknown[0], known)}")
    rates, usual = (GENTLE_RATES, 3e-4) if prepared.solve_heads else (LEARNING_RATES, 2e-3)
    defaults = {
        "lr": lr if lr is not None else rates.get(prepared.method, usual),
        "warmup_epochs": 1.0,
        "weight_decay": 0.01,
        "label_smoothing": 0.1 if prepared.solve_heads else 0.0,
    }
    return FitConfig(**{**defaults, **given})


def train_prepared(
    prepared: Prepared,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    config: FitConfig | None = None,
    epochs: int = 10,
    lr: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    resume: bool = True,
    on_step: Callable[[StepInfo], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **more: Any,
) -> FinetuneResult:
    """Train what `prepare` built; with `output_dir`, save the adapter, `report.json`, `report.html`, `run.toml` and logs there.

    Args:
        config: everything at once; else `epochs`, `lr` (`None`: the method's usual), `batch_size`, `seed`, `progress`, and `more`: any
            other field of `FitConfig`.
        resume: continue the run that `output_dir` holds, if there is one; a finished run may be given more `epochs` (see
            `mmkit.training.fit`). `False` starts over; what was saved there stays until the new run has ended.
        on_step, should_stop: see `mmkit.training.fit`.

    Returns:
        The result; the adapter stays attached to `result.prepared.model`.

    Raises:
        RunDiffersError: `output_dir` holds a run of other data or settings; what differs is named.
        InputError: `output_dir` holds something else, or another process is training there.
        StorageError: it cannot be written.
    """
    if config is None:
        settings = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "progress": progress, **more}
        config = fit_config(prepared, lr=lr, **settings)
    elif more:
        raise InputError(f"Give config, or {', '.join(more)}, not both.")
    if not resume:
        config = dataclasses.replace(config, resume=False)
    options = {"config": config, "on_step": on_step, "should_stop": should_stop}
    if output_dir is None:
        return _report(prepared, _fit(prepared, None, options), None, config)
    folder = absolute(output_dir)
    check_free(folder, KINDS, KEPT)
    main = int(os.environ.get("RANK", "0")) == 0  # of several processes under torchrun one writes
    with folder_lock(folder / KEPT[0]) if main else contextlib.nullcontext():
        run = _fit(prepared, folder, options)
        return _report(prepared, run, folder if main and run.stopped != "interrupted" else None, config)


def _fit(prepared: Prepared, folder: Path | None, options: dict[str, Any]) -> FitResult:
    """Run `fit` in the words of `finetune`."""
    _start(prepared)
    try:
        return fit(
            prepared.model,
            prepared.train,
            prepared.val if len(prepared.val) else None,
            output_dir=folder / KEPT[0] if folder else None,
            adapter=prepared.adapter,
            identity=prepared.identity,
            **options,
        )
    except RunDiffersError as error:
        names = {"train": "data", "val": "data held back", "validation share": "val", "method": "adapter"}
        advice = "Use the same to continue, resume=False to start over, or another output_dir."
        raise error.reworded(folder, names, advice) from None


def _start(prepared: Prepared) -> None:
    if prepared.solve_heads:
        plain = prepared.train.with_transform(prepared.val.transform)
        start_heads(prepared.model, prepared.adapter, plain, len(prepared.class_names))


def search_rate(prepared: Prepared, *, steps: int = 60, **more: Any) -> RateSearch:
    """A peak learning rate for what `prepare` built, see `mmkit.training.find_lr`; nothing is trained or written.

    Args:
        steps: of the search.
        more: fields of `FitConfig` that the training will have.
    """
    _start(prepared)
    config = fit_config(prepared, **more)
    return find_lr(prepared.model, prepared.train, config=config, adapter=prepared.adapter, steps=steps)


def _report(prepared: Prepared, run: FitResult, folder: Path | None, config: FitConfig) -> FinetuneResult:
    """Measure and save what came out."""
    mark_trained(prepared.model)
    result = FinetuneResult(prepared, run, folder, accuracy=run.best_metrics.get("accuracy"))
    if run.stopped != "interrupted":
        result.merge_error = merge_error(prepared)
        judged = prepared.val if prepared.test is None else prepared.test
        if len(judged) and (folder is not None or prepared.test is not None):
            result.answers = answers_on(prepared, judged)
        result.test_accuracy = result.answers.accuracy if result.answers and prepared.test is not None else None
    result.report = prepared.describe() | {
        "accuracy": result.accuracy,
        "test_accuracy": result.test_accuracy,
        "best": run.best_metrics,
        "last": run.metrics,
        "seconds": round(run.seconds, 2),
        "merge_error": result.merge_error,
        "stopped": run.stopped,
        "steps": run.steps,
    }
    if folder is not None:
        result.file_size = save_run(prepared, folder, lambda size: _documents(result, config, size))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            result.file_size = save_run(prepared, Path(temporary) / "model")
    result.report["file_size"] = result.file_size
    return result


def _documents(result: FinetuneResult, config: FitConfig, size: int) -> dict[str, str]:
    """report.json, report.html and run.toml of a saved run."""
    prepared, answers = result.prepared, result.answers
    assert result.folder is not None
    judged, of = (prepared.val, prepared.measured_on) if prepared.test is None else (prepared.test, "test")
    report = result.report | {
        "history": result.fit.history,
        "losses": thinned(result.fit.losses),
        "answers": None if answers is None else answers.report() | {"of": of},
        "run": run_settings(prepared, config, result.folder),
        "file_size": size,
    }
    page = run_page(prepared, result.fit, report, answers, judged, result.folder)
    return {"report.json": json.dumps(report, indent=2) + "\n", "report.html": page, "run.toml": report["run"]}


def finetune(
    data: str | os.PathLike[str] | ImageDataset,
    backbone: str | os.PathLike[str] = "auto",
    adapter: str = "ssf",
    *,
    output_dir: str | os.PathLike[str] | None = None,
    epochs: int = 10,
    lr: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    resume: bool | str = "auto",
    **options: Any,
) -> FinetuneResult:
    """`prepare` and `train_prepared` in one call; `options` go to `prepare`.

    Args:
        resume: `True` continues the run in `output_dir` and refuses another one, `False` starts over. "auto" continues the same
            run, refuses an unfinished other one, and replaces a finished other one with a warning that names what differs.

    Example:
        >>> from mmkit.data import load_digits
        >>> from mmkit.vision.classification.training import finetune
        >>> result = finetune(load_digits((0, 1)), "tiny_vit", "linear_probe", epochs=1)
        >>> 0 <= result.accuracy <= 1
        True
    """
    if resume not in (True, False, "auto"):
        raise InputError(f"resume must be True, False or 'auto', not {resume!r}.")
    prepared = prepare(data, backbone, adapter, seed=seed, **options)
    settings: dict[str, Any] = {
        "output_dir": output_dir, "epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    try:
        return train_prepared(prepared, resume=bool(resume), **settings)
    except RunDiffersError as error:
        if resume != "auto" or not error.finished:
            raise
        told = "; ".join(f"{k}: {v}" for k, v in error.changes.items())
        warnings.warn(f"{output_dir} holds a finished run that differs ({told}). Starting over.", stacklevel=2)
    return train_prepared(prepared, resume=False, **settings)
