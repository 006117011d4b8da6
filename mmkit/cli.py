"""The `mmkit` command: demo, finetune, merge, predict, list, app, info. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mmkit import __version__
from mmkit.errors import InterruptedRun, MMKitError, RunDiffersError
from mmkit.registry import COMMANDS

app = typer.Typer(
    help="Adapt vision models for images and video.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip


class _Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, so that temporaries are removed."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _command(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Register `fn` (less its trailing underscore) so that what goes wrong ends in one readable line, not a traceback.

    Exit codes: 1 for errors, 130 after Ctrl-C, 143 after SIGTERM.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            fn(*args, **kwargs)
        except InterruptedRun as error:
            typer.secho(str(error), err=True)
            raise typer.Exit(128 + error.number) from None
        except (MMKitError, OSError) as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            terminated = isinstance(error, _Terminated)
            typer.secho("Terminated." if terminated else "Interrupted.", err=True)
            raise typer.Exit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return app.command(fn.__name__.rstrip("_"))(wrapped)


_OPTIONS = {
    "data": "--data", "data held back": "--data, held back", "val": "--val", "adapter": "--adapter", "backbone": "--backbone",
    "weights at the start": "--checkpoint or --backbone", "frozen weights": "--checkpoint or --backbone", "lr": "--lr",
    "epochs": "--epochs", "batch_size": "--batch-size", "seed": "--seed", "augment": "--augment",
}  # fmt: skip


@contextlib.contextmanager
def _in_words_of_the_command() -> Iterator[None]:
    """A run that differs is told with the names of the command's options."""
    try:
        yield
    except RunDiffersError as error:
        advice = "Use the same to continue, run again with --restart to start over, or choose another --output."
        raise error.reworded(error.folder, _OPTIONS, advice) from None


@_command
def demo(
    headless: Annotated[bool, typer.Option("--headless", help="Run the main job without a browser.")] = False,
    output: Annotated[Path, typer.Option(help="Where the headless run writes.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the data for each method (headless).")] = 12,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of continuing in --output.")] = False,
    port: Annotated[int, typer.Option(help="Port of the studio on 127.0.0.1.")] = 7860,
) -> None:
    """Open the studio, or with --headless adapt the bundled ViT to handwritten digits and compare four methods."""
    if headless:
        with _in_words_of_the_command():
            COMMANDS.get("demo")(output, epochs=epochs, resume=not restart)
    else:
        _studio(None, port)


@_command
def finetune(
    data: Annotated[Path, typer.Option(help="Folder with one sub-folder per class, a CSV (path,label), or a zip.")],
    backbone: Annotated[str, typer.Option(help="Bundled, timm or open_clip: name, or a folder.")] = "tiny_vit",
    adapter: Annotated[
        str, typer.Option(help="ssf, lora, bitfit, linear_probe, full, ... (see `mmkit list adapters`).")
    ] = "ssf",
    output: Annotated[Path, typer.Option(help="Where the adapter, report and logs go.")] = Path("runs/finetune"),
    checkpoint: Annotated[Path | None, typer.Option(help="A weight file for the backbone.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the method's usual one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    val: Annotated[float, typer.Option(help="Share of the images kept for validation.")] = 0.2,
    seed: int = 0,
    augment: Annotated[bool, typer.Option("--augment", help="Random crops and flips.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over instead of continuing the run in --output.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unreadable images instead of stopping.")
    ] = False,
) -> None:
    """Adapt a backbone to your own folder of images."""
    job = COMMANDS.get("finetune")
    prepared = job.prepare(
        data, backbone, adapter, checkpoint_path=checkpoint, val=val, seed=seed, augment=augment,
        on_error="skip" if skip_bad else "raise",
    )  # fmt: skip
    about = prepared.describe()
    print(
        f"{about['train_images']} training and {about['val_images']} {about['measured_on']} images of "
        f"{len(about['class_names'])} classes."
    )
    trained = f"{about['trainable_parameters']:,} of {about['total_parameters']:,} parameters"
    print(f"{adapter} trains {trained} at {len(about['sites'])} places.")
    output, steps = output.expanduser().absolute(), []
    with _in_words_of_the_command():
        result = job.train_prepared(
            prepared, output_dir=output, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed, resume=not restart,
            on_step=steps.append,
        )  # fmt: skip
    if result.fit.stopped == "interrupted":
        raise InterruptedRun(result.fit.steps, result.fit.signal, output / "training")
    if not steps:
        print(
            "This very run had ended before: nothing was left to train. More --epochs continue it, --restart starts over."
        )
    print("\n" + job.report_table([result.report]))
    print(
        f"Accuracy: of the {about['val_images']} {about['measured_on']} images; the epoch that is best on them is saved."
    )
    if result.test_accuracy is not None:
        print(
            f"Test accuracy: {100 * result.test_accuracy:.1f} % of {about['test_images']} images that had no say in it."
        )
    print(f'\nSaved to {output}. Try it: mmkit predict IMAGE --model "{output}"')


@_command
def merge(
    adapter: Annotated[Path, typer.Argument(help="A folder written by `mmkit finetune`.")],
    output: Annotated[Path, typer.Option(help="Where the plain model goes.")],
    backbone: Annotated[str | None, typer.Option(help="The backbone, if not where the folder says.")] = None,
) -> None:
    """Fold an adapter into its backbone and save plain weights (config.json + model.safetensors)."""
    from mmkit.adapters import attached_adapters
    from mmkit.backbones import save_backbone
    from mmkit.errors import InputError

    model = COMMANDS.get("finetune").load_finetuned(adapter, backbone=backbone)
    adapters = attached_adapters(model)
    if not adapters:
        raise InputError(f"{adapter} holds a whole model, there is nothing to merge.")
    for one in adapters.values():
        one.merge()
    save_backbone(model, output)
    print(f'Merged. Saved to {output}. Try it: mmkit predict IMAGE --model "{output}"')


@_command
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    model: Annotated[str, typer.Option(help="A fine-tuned or merged folder, or a backbone name.")] = "tiny_vit",
    top_k: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Classify pictures."""
    from mmkit.pipelines import pipeline

    classify = pipeline("image-classification", model)
    for path, result in zip(images, classify(images, top_k=top_k), strict=True):
        scores = ", ".join(f"{n} {100 * s:.1f} %" for n, s in zip(result.labels, result.scores, strict=True))
        print(f"{path}: {scores}")


@_command
def list_(what: Annotated[str, typer.Argument(help="adapters, models, tasks, weights or apps.")] = "adapters") -> None:
    """List what is there."""
    from mmkit import registry
    from mmkit.errors import InputError, nearest

    tables = {"adapters": registry.ADAPTERS, "models": registry.MODELS, "tasks": registry.TASKS, "apps": registry.APPS}
    if what == "weights":
        from mmkit.weights import list_weights, weight_entry

        for name in list_weights():
            print(f"{name}: {weight_entry(name).summary}")
    elif what in tables:
        print("\n".join(tables[what].names()))
    else:
        raise InputError(f"There is no list of {what!r}. {nearest(what, [*tables, 'weights'])}")


@_command
def info(path: Annotated[Path, typer.Argument(help="An adapter or model folder.")]) -> None:
    """Say what an adapter or model folder holds, without loading its tensors."""
    import json

    from mmkit.adapters.files import CONFIG_NAME
    from mmkit.storage import read_json, require_folder

    folder = require_folder(path)
    config = read_json(folder / (CONFIG_NAME if (folder / CONFIG_NAME).exists() else "config.json"))
    for file in sorted(folder.glob("*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 1024:,.0f} kB")
    print(json.dumps(config, indent=2))


@_command
def app_(
    name: Annotated[str | None, typer.Argument(help="One page; all pages when left out.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 7860,
) -> None:
    """Open the studio, or one of its pages."""
    _studio(name, port)


@_command
def version() -> None:
    """Print the versions of mmkit, Python and torch."""
    import torch

    print(f"mmkit {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")


def _studio(name: str | None, port: int) -> None:
    from mmkit.errors import BackendUnavailableError

    try:
        launch_studio = COMMANDS.get("studio")
    except ImportError as error:
        raise BackendUnavailableError(f"The studio needs gradio ({error}): pip install 'mmkit[apps]'") from error
    launch_studio([name] if name else None, port=port)


if __name__ == "__main__":
    app()
