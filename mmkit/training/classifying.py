"""Train a classifier of anything (clips, clouds) from a command: the run, its report and page, and the model, in one folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from PIL import Image
from torch import nn

from mmkit.errors import InputError
from mmkit.training.answers import Answers
from mmkit.training.config import FitConfig, FitResult
from mmkit.training.loop import fit
from mmkit.training.reporting import classes_told, dry, told, write_report


@dataclass
class Classified:
    """What training brought.

    Attributes:
        model: trained, its adapter attached. adapter: it, or None. fit: history, metrics, seconds; `fit.stopped` says how it ended,
            "dry run" that nothing was trained.
        folder: holds `model/` (and `adapter/`), `run/`, report.json, report.html and run.toml; None when it was interrupted.
        accuracy: best on what was held back, 0..1; None without. answers: to what was held back.
        use: a line of Python that loads it. plan: what would be trained, of a dry run.
    """

    model: nn.Module
    adapter: Any
    fit: FitResult
    folder: Path | None
    accuracy: float | None
    answers: Answers | None
    use: str
    plan: str = ""

    def summary(self, model: str | None = None) -> str:
        """What came out and how to use it, for people."""
        held = (
            "" if self.accuracy is None else f"{100 * self.accuracy:.1f} % of what was held back is right (best epoch)."
        )
        return self.plan or told(self.fit, self.folder, held, self.use)


def config_of(given: Mapping[str, Any], metrics: Sequence[str] = ("accuracy", "loss"), **usual: Any) -> FitConfig:
    """`usual` settings, and what was `given`. Raises `InputError` for a value that makes no sense.

    `metrics`: those that `monitor` may name; found out only after an epoch, a slip would cost it.
    """
    config = FitConfig(**{"progress": True, **usual, **{k: v for k, v in given.items() if v is not None}})
    if config.monitor.lstrip("-") not in metrics:
        raise InputError(
            f"monitor is one of {', '.join(metrics)}, with a - in front where less is better, not {config.monitor!r}."
        )
    return config


def train_classifier(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    title: str,
    class_names: Sequence[str],
    names: Sequence[str],
    labels: Sequence[int],
    config: FitConfig,
    output_dir: Path | None,
    settings: Mapping[str, Any],
    use: str,
    save: Callable[[Path], None],
    adapter: Any = None,
    trained: Sequence[tuple[str, str]] = (),
    picture: Callable[[int], Image.Image] | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Classified:
    """`fit` with a report.

    Args:
        train, val, adapter, options: as for `fit`; `val` may be None.
        names, labels: of the examples of `val`.
        output_dir: gets `run/`, what `save(output_dir)` writes, and the report. None writes nothing.
        settings: for run.toml. trained: facts for the page. picture: of a held-back example, for the page.
        dry_run: train and write nothing.
    """
    if dry_run:
        planned, plan = dry(model, config, len(train), len(labels), classes_told(class_names), adapter)
        return Classified(model, adapter, planned, None, None, None, use, plan)
    run = fit(
        model, train, val, config=config, adapter=adapter, output_dir=output_dir and output_dir / "run", **options
    )
    if run.stopped == "interrupted":
        return Classified(model, adapter, run, None, None, None, use)
    answers = _answers(model, val, labels, class_names, names) if val is not None else None
    done = Classified(model, adapter, run, output_dir, run.best_metrics.get("accuracy"), answers, use)
    if output_dir is not None:
        save(output_dir)
        sites = adapter.site_paths if adapter is not None else ["(all that requires a gradient)"]
        held = f", {len(answers.labels):,} held back." if answers else "; none held back."
        write_report(
            output_dir,
            model,
            run,
            title=title,
            subtitle=f"{len(train):,} training examples{held}",
            score=("best accuracy", done.accuracy),
            found={
                "accuracy": done.accuracy,
                "sites": sites,
                "answers": answers and answers.report() | {"of": "validation"},
            },
            settings=settings,
            trained=trained,
            use=use,
            thumbnails=[picture(i) for i in answers.most_wrong()] if answers and picture else [],
        )
    return done


@torch.no_grad()
def _answers(
    model: nn.Module, val: Any, labels: Sequence[int], class_names: Sequence[str], names: Sequence[str]
) -> Answers:
    model.eval()
    device = next(model.parameters()).device
    found = [model(torch.as_tensor(val[i][0])[None].to(device)).float().softmax(-1).cpu() for i in range(len(val))]
    return Answers(torch.cat(found), torch.tensor(labels), class_names, names)


P = ParamSpec("P")
R = TypeVar("R")


def without(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a `finetune` function for which these settings of `FitConfig` mean nothing: it refuses them before it reads or writes anything.

    Their default values may be given, as every run.toml has them. The command asks `unused_settings` and names its options.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if wrong := unused_settings(checked, kwargs):
                raise InputError(f"{wrong[0]} means nothing here. Leave it out.")
            return function(*args, **kwargs)

        checked.without = frozenset(names)  # type: ignore[attr-defined]
        return checked

    return mark


def unused_settings(function: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    """Which of the settings `given` mean nothing to a function marked by `without`."""
    usual = FitConfig()
    without = getattr(function, "without", ())
    return [k for k, v in given.items() if k in without and v is not None and v != getattr(usual, k)]


def no_settings(settings: Mapping[str, Any] | None, method: str) -> None:
    """Raise `InputError` when settings are given to a method that has none."""
    if settings:
        raise InputError(f"{method} has no settings; {', '.join(settings)} cannot be set.")


def known_method(method: str, methods: Sequence[str], task: str) -> None:
    """Raise `InputError` unless `method` is one of `methods`."""
    if method not in methods:
        raise InputError(f"{method!r} cannot be trained for {task}. Known: {', '.join(methods)}.")
