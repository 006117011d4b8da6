"""`mmkit finetune`: its options are the fields of `FitConfig` and what the rooms take; `--config` reads them from a file."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from mmkit.errors import InputError, InterruptedRun, in_words, nearest
from mmkit.registry import COMMANDS
from mmkit.storage.files import absolute
from mmkit.storage.settings import read_settings
from mmkit.training.config import FitConfig


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


TASKS = ("image-classification", "text-to-image", "video-classification", "point-cloud-classification", "segmentation")
_HIDDEN = {"resume", "seed"}  # --restart, and an option that all tasks have
_ALSO = {"max_steps": ("--steps",), "max_seconds": ("--time-limit",)}
_CHOSEN = {"lr", "warmup_epochs", "weight_decay", "label_smoothing"}  # where the rooms have their own
_WORDS = {
    "data held back": "--data, held back", "weights at the start": "--checkpoint or --backbone",
    "frozen weights": "--checkpoint or --backbone",
    "fold": "--folds", "adapter": "--adapter", "backbone": "--backbone", "data": "--data", "val": "--val", "seed": "--seed",
    **{name: _option(name) for name in ("augment", "auto_augment", "color_jitter", "erase")},
    "classifiers solved at the start": "--solve-heads",
}  # fmt: skip


@contextlib.contextmanager
def in_words_of_the_command() -> Iterator[None]:
    """A run that differs is told with the names of the command's options."""
    advice = "Use the same to continue, run again with --restart to start over, or choose another --output."
    with in_words({f.name: _option(f.name) for f in dataclasses.fields(FitConfig)} | _WORDS, advice):
        yield


def _from_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """What the file says becomes the options' defaults; each value goes through its option's own checks."""
    if path is None:
        return None
    try:
        values = read_settings(path)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    known = {p.name: p for p in ctx.command.params if p.name not in ("config", "set_", "help", None)}
    settings = values.pop("settings", {})
    if not isinstance(settings, dict):
        raise typer.BadParameter(f"{path}: settings must be a table, [settings].")
    if strange := [name for name in settings if not name or "=" in name]:
        raise typer.BadParameter(f"{path}: {strange[0]!r} in [settings] is no name of a setting.")
    for name, value in values.items():
        if name not in known:
            raise typer.BadParameter(f"{path}: there is no setting {name!r}. {nearest(name, [*known, 'settings'])}")
        flag = bool(getattr(known[name], "is_flag", False))
        if flag != isinstance(value, bool) or isinstance(value, (list, dict)):
            raise typer.BadParameter(f"{path}: {name} = {value!r} is not {'true or false' if flag else 'one value'}.")
        if value == "":
            raise typer.BadParameter(f"{path}: {name} is empty. Leave it out, or give it a value.")
    if settings:
        values["set_"] = [f"{k}={v if isinstance(v, str) else _toml(v)}" for k, v in settings.items()]
    ctx.default_map = {
        **(ctx.default_map or {}),
        **{k: v if isinstance(v, (bool, list)) else str(v) for k, v in values.items()},
    }
    return path


def _toml(value: Any) -> str:
    from mmkit.storage.settings import settings_text

    return settings_text({"x": value}).removeprefix("x = ").strip()


def _settings(pairs: list[str]) -> dict[str, Any]:
    """`r=8` as {"r": 8}: values in TOML, anything else is text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set needs NAME=VALUE, such as --set r=8, not {pair!r}.")
        try:
            found[name.strip()] = tomllib.loads(f"x = {value.strip()}")["x"]
        except (ValueError, RecursionError):
            found[name.strip()] = value.strip()
    return found


def finetune(
    data: Annotated[
        Path,
        typer.Option(
            help="Sub-folders per class, CSV or zip; or videos, clouds, captioned pictures, images/ and masks/."
        ),
    ],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "image-classification",
    backbone: Annotated[
        str,
        typer.Option(
            help="Bundled, timm, open_clip or transformers: name, or a folder; auto: bundled, by the pictures' size."
        ),
    ] = "auto",
    adapter: Annotated[
        str | None,
        typer.Option(
            help="One of `mmkit list adapters`, or full; several with commas are compared. Default: the task's own."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the adapter, report and logs go.")] = Path("runs/finetune"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the adapter, NAME=VALUE, such as r=8; can be repeated."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="A weight file for the backbone.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Fetch the backbone's published weights; NAME.TAG chooses which.")
    ] = False,
    val: Annotated[float, typer.Option(help="Share kept for validation; 0 trains on everything.")] = 0.2,
    folds: Annotated[int | None, typer.Option(help="Cross validation: so many runs, each part held back once.")] = None,
    seed: Annotated[int, typer.Option(help="Of split, start, order and augmentation.")] = 0,
    augment: Annotated[
        bool | None, typer.Option(help="Random crops and flips; default: for photographs (above 64 pixels).")
    ] = None,
    auto_augment: Annotated[
        str | None, typer.Option(help="timm's policy, such as rand-m9-mstd0.5 for RandAugment.")
    ] = None,
    color_jitter: Annotated[float, typer.Option(min=0, max=1, help="How far colours may go.")] = 0.0,
    erase: Annotated[float, typer.Option(min=0, max=1, help="How often a random rectangle is erased.")] = 0.0,
    solve_heads: Annotated[
        bool | None, typer.Option(help="Start from a solved classifier; default: for photographs on trained backbones.")
    ] = None,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Search a learning rate and stop; nothing is written.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and stop; nothing is written.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over instead of continuing the run in --output.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unreadable files instead of stopping.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A run.toml, as every result holds one; the command line wins.", is_eager=True, callback=_from_file
        ),
    ] = None,
    **fit: Any,
) -> None:
    """Adapt a model to your own data: pictures, videos or point clouds by class, captioned pictures, or images with masks."""
    given = {k: v for k, v in fit.items() if v is not None}
    output = absolute(output)
    if task not in TASKS:
        raise InputError(f"There is no training of {task!r} by command. {nearest(task, TASKS)}")
    if given.get("steps_per_epoch") is not None:
        raise InputError(
            f"--steps-per-epoch means nothing for --task {task}: files make epochs of their own length. Leave it out."
        )
    common: dict[str, Any] = {"seed": seed, "settings": _settings(set_ or []), "val": val}
    pictures = {
        "augment": augment, "auto_augment": auto_augment, "color_jitter": color_jitter, "erase": erase, "solve_heads": solve_heads,
        "pretrained": pretrained, "skip_bad": skip_bad, "checkpoint": checkpoint,
    }  # fmt: skip
    if task != "image-classification":
        others = {**pictures, "folds": folds, "find_lr": find_lr}
        unused = [_option(k) for k, v in others.items() if v not in (None, False, 0.0)]
        if unused:
            raise InputError(f"{unused[0]} means nothing for --task {task}. Leave it out.")
        flags = {"resume": not restart, "dry_run": dry_run}
        _other(task, data, None if backbone == "auto" else backbone, adapter, output, common | flags, given)
        return
    pictures["on_error"] = "skip" if pictures.pop("skip_bad") else "raise"
    pictures["checkpoint_path"] = pictures.pop("checkpoint")
    methods = [m.strip() for m in ("ssf" if adapter is None else adapter).split(",") if m.strip()]
    if not methods:
        raise InputError(f"--adapter {adapter!r} names no method. `mmkit list adapters` lists them.")
    if dry_run and find_lr:
        raise InputError("--dry-run and --find-lr exclude each other: one trains nothing, the other tries rates.")
    if dry_run or find_lr:
        for method in methods:
            _look(data, backbone, method, common | pictures, given, find_lr, folds)
    elif len(methods) > 1 or folds is not None:
        _several(data, backbone, methods, output, folds, restart, common | pictures, given)
    else:
        _one(data, backbone, methods[0], output, restart, common | pictures, given)


def _say(prepared: Any, name: str) -> dict[str, Any]:
    """Two lines on what is trained; returns `describe()`."""
    about = prepared.describe()
    held = f" and {about['val_images']} {about['measured_on']}" if about["val_images"] else ""
    print(f"{about['train_images']} training{held} images of {len(about['class_names'])} classes.")
    trained = f"{about['trainable_parameters']:,} of {about['total_parameters']:,} parameters"
    print(f"{name} trains {trained} at {len(about['sites'])} places.")
    return about


def _look(
    data: Path,
    backbone: str,
    method: str,
    options: dict[str, Any],
    given: dict[str, Any],
    search: bool,
    folds: int | None,
) -> None:
    """--dry-run and --find-lr: nothing is trained for good, nothing written."""
    job = COMMANDS.get("finetune")
    fold = (1, folds) if folds is not None else None
    prepared = job.prepare(data, backbone, method, fold=fold, **options)
    about = _say(prepared, method)
    if search:
        found = job.search_rate(prepared, seed=options["seed"], **given)
        print(f"\n{found.lines()}\n\nTrain with --lr {found.suggestion:.1e}")
        return
    config = job.fit_config(prepared, seed=options["seed"], **given)
    print(f"backbone {about['backbone']}; classes: " + ", ".join(f"{k} {n}" for k, n in about["train_counts"].items()))
    print(f"training pictures: {prepared.train.transform!r}")
    print("settings: " + ", ".join(f"{k}={v!r}" for k, v in vars(config).items() if v is not None and k not in _HIDDEN))
    print("sites: " + ", ".join(about["sites"]))


def _one(
    data: Path, backbone: str, method: str, output: Path, restart: bool, options: dict[str, Any], given: dict[str, Any]
) -> None:
    job = COMMANDS.get("finetune")
    prepared = job.prepare(data, backbone, method, **options)
    about = _say(prepared, method)
    taken: list[Any] = []
    with in_words_of_the_command():
        result = job.train_prepared(
            prepared, output_dir=output, seed=options["seed"], resume=not restart, on_step=taken.append, **given
        )
    if result.fit.stopped == "interrupted":
        raise InterruptedRun(result.fit.steps, result.fit.signal, output / "training")
    if not taken:
        print(
            "This very run had ended before: nothing was left to train. More --epochs continue it, --restart starts over."
        )
    print("\n" + job.report_table([result.report]))
    if about["val_images"]:
        print(
            f"Accuracy: of the {about['val_images']} {about['measured_on']} images; the epoch that is best on them is saved."
        )
    if result.test_accuracy is not None:
        print(
            f"Test accuracy: {100 * result.test_accuracy:.1f} % of {about['test_images']} images that had no say in it."
        )
    print(f'\nSaved to {output}; look at {output / "report.html"}. Try it: mmkit predict IMAGE --model "{output}"')


def _several(
    data: Path, backbone: str, methods: list[str], output: Path, folds: int | None, restart: bool,
    options: dict[str, Any], given: dict[str, Any],
) -> None:  # fmt: skip
    job = COMMANDS.get("finetune")
    with in_words_of_the_command():
        reports = job.compare(
            data, methods, backbone, output_dir=output, folds=folds, resume=not restart, prepare_options=options,
            fit_options={"seed": options["seed"], **given}, on_prepared=_say,
        )  # fmt: skip
    print("\n" + job.report_table(reports))
    if folds:
        print(f"Accuracy: mean ± standard deviation of {folds} folds.")
    print(f"\nSaved to {output}, a folder each; look at {output / 'report.html'}.")


def _other(
    task: str,
    data: Path,
    model: str | None,
    adapter: str | None,
    output: Path,
    common: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """A task that another room trains: `finetune(data, model, adapter, output_dir=..., ...)` at its door."""
    from mmkit.training.classifying import unused_settings

    train = COMMANDS.get(f"finetune-{task}")
    parameters = inspect.signature(train).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {*parameters, *(fit_fields() if open_ended else ())}
    unused = [k for k in given if k not in known] + unused_settings(train, given)
    if unused:
        usual = ", ".join(_option(k) for k in sorted((known & set(fit_fields())) - {*unused, "steps_per_epoch"}))
        raise InputError(f"{_option(unused[0])} means nothing for --task {task}; it takes {usual}.")
    if not common["settings"]:
        common.pop("settings")
    options = {k: v for k, v in (common | given).items() if k in known}
    with in_words_of_the_command():
        result = train(data, model, *([adapter] if adapter else []), output_dir=output, **options)
    if result.fit.stopped == "interrupted":
        raise InterruptedRun(result.fit.steps, result.fit.signal, output)
    print(result.summary(model))


def fit_fields() -> dict[str, tuple[Any, str]]:
    """Type and help of every field of `FitConfig` that is an option, from its annotations and docstring."""
    told = dict(_told(FitConfig.__doc__ or ""))
    hints = get_type_hints(FitConfig)
    return {
        f.name: (_plain(hints[f.name]), told.get(f.name, ""))
        for f in dataclasses.fields(FitConfig)
        if f.name not in _HIDDEN
    }


def _plain(hint: Any) -> Any:
    """The type of `X | None`, `X` of others."""
    return next((t for t in get_args(hint) if t is not type(None)), hint)


def _told(doc: str) -> Iterator[tuple[str, str]]:
    """(field, what it means) of an Attributes section."""
    for names, text in re.findall(r"^ {8}([\w, ]+): (.*?)(?=^ {8}\S|^ {4}\S|\Z)", doc, re.M | re.S):
        for name in names.split(","):
            yield name.strip(), re.sub(r"[`\s]+", " ", text).strip()


def _with_fit_options() -> None:
    """Give the command one option per field of `FitConfig`; left out, the room decides."""
    hints = get_type_hints(finetune, include_extras=True)
    signature = inspect.signature(finetune)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    annotations = {k: v for k, v in hints.items() if k in {p.name for p in own}}
    for name, (kind, told) in fit_fields().items():
        default = FitConfig.__dataclass_fields__[name].default
        names = [_option(name), *_ALSO.get(name, ())]
        if kind is bool:
            names = [f"{_option(name)}/--no-{name.replace('_', '-')}"]
        usual = "" if default is None or default is False else f" Default: {default}."
        usual = " Default: what suits method and task." if name in _CHOSEN else usual
        annotations[name] = Annotated[
            kind | None, typer.Option(*names, help=f"{told}{usual}", rich_help_panel="Training")
        ]
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    parameters = [p.replace(annotation=annotations[p.name]) for p in own]  # typer reads them here
    finetune.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    finetune.__annotations__ = annotations | {"return": None}


_with_fit_options()
