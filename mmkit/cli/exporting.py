"""`mmkit export` of what the tasks beside image classification have trained: the model of their pipeline, compared before it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmkit.errors import InputError
from mmkit.storage.settings import read_settings

_PIPELINES = {
    "segmentation": "medical-segmentation",
    "video-classification": "video-classification",
    "point-cloud-classification": "point-cloud-classification",
}
_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def task_of(run: Path) -> str:
    """The task whose result lies in a folder, "" for pictures by class and for whatever is no result of `mmkit finetune`."""
    if (run / "segmentation.json").is_file():
        return "segmentation"
    if not (run / "run.toml").is_file() or not (run / "model").is_dir():
        return ""
    task = str(read_settings(run / "run.toml").get("task", ""))
    return task if task in _PIPELINES else ""


def export_of_task(run: Path, task: str, format: str, output: Path, options: dict[str, Any]) -> str:
    """Write the model of a task's result; returns what to tell.

    Raises `InputError` for `options`, which mean nothing here, for a format of classifiers alone, and for models that no file can hold.
    """
    from mmkit.pipelines import pipeline

    if given := [name for name, value in options.items() if value]:
        raise InputError(
            f"--{given[0]} means nothing for a result of --task {task}: the folder holds the whole model. Leave it out."
        )
    if format not in _SUFFIXES:
        raise InputError(f"A result of --task {task} goes to {' or '.join(_SUFFIXES)}, not to {format!r}.")
    if output.suffix != _SUFFIXES[format]:
        raise InputError(f"--format {format} writes a file that ends in {_SUFFIXES[format]}, not {output.name!r}.")
    ask = pipeline(_PIPELINES[task], run / "model" if (run / "model").is_dir() else run, device="cpu", dtype="float32")
    difference = ask.write_export(output)
    shapes = ", ".join(" x ".join(["B", *map(str, given.shape[1:])]) for given in ask.example())
    return (
        f"Saved to {output}. Read back, its answers differ from the original's by {difference:.1e} at most, over 4 random inputs. "
        f"It takes {shapes}."
    )
