"""The `mmkit` command: demo, finetune, merge, predict, list, app, info, splat, slam, erase. Heavy imports happen inside the commands."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from mmkit import __version__
from mmkit.cli.finetune import finetune, in_words_of_the_command
from mmkit.errors import InputError, InterruptedRun, MMKitError, in_words, nearest
from mmkit.memory import keep_freed_memory
from mmkit.registry import COMMANDS

app = typer.Typer(
    help="Adapt vision models for images, video, point clouds and text-to-image.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip


_Checkpoint = Annotated[Path | None, typer.Option("--checkpoint", help="A weight file for the backbone.")]
_Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained",
        help="Fetch the backbone's published weights; NAME.TAG chooses which (vit_small_patch16_224.augreg_in21k).",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmkit {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    keep_freed_memory()


class _Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, so that temporaries are removed."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


class _Command(TyperCommand):
    """Refuses an empty path: `pathlib` makes the working directory of it, and `--output "$UNSET"` would write there."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {flag: param for param in self.params for flag in param.opts if flag.startswith("-")}
        paths = {name for name, hint in get_type_hints(self.callback).items() if Path in (hint, *get_args(hint))}
        for before, arg in zip(["", *args], args, strict=False):
            name, equals, value = arg.partition("=")
            name = name if equals and not value else before if not arg else ""
            takes = name in options and not getattr(options[name], "is_flag", False)
            if (takes and options[name].name in paths) or (not arg and not takes):
                what = name if takes else "An argument"
                ctx.fail(f"{what} is empty: an unset variable? The working directory is '.'.")
        return super().parse_args(ctx, args)


def _command(fn: Callable[..., Any], group: typer.Typer = app, name: str = "") -> Callable[..., Any]:
    """Register `fn` (as `name`, or its own less a trailing underscore) in `group`; what goes wrong ends in one line, not a
    traceback.

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

    return group.command(name or fn.__name__.rstrip("_"), cls=_Command)(wrapped)


@_command
def demo(
    headless: Annotated[bool, typer.Option("--headless", help="Run the main job without a browser.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where the headless run writes. Default: runs/demo.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data for each method (headless). Default: 12.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of continuing in --output.")] = False,
    port: Annotated[int | None, typer.Option(help="Port of the studio on 127.0.0.1. Default: 7860.")] = None,
) -> None:
    """Open the studio, or with --headless adapt the bundled ViT to handwritten digits and compare four methods."""
    unused = {"--port": port} if headless else {"--output": output, "--epochs": epochs, "--restart": restart or None}
    if given := [name for name, value in unused.items() if value is not None]:
        raise InputError(f"{given[0]} means nothing {'with' if headless else 'without'} --headless. Leave it out.")
    if headless:
        with in_words_of_the_command():
            COMMANDS.get("demo")(
                output or Path("runs/demo"), epochs=12 if epochs is None else epochs, resume=not restart
            )
    else:
        _studio(None, 7860 if port is None else port)


_command(finetune)


@_command
def merge(
    adapter: Annotated[Path, typer.Argument(help="A folder written by `mmkit finetune`.")],
    output: Annotated[Path, typer.Option(help="Where the plain model goes.")],
    backbone: Annotated[str | None, typer.Option(help="The backbone, if not where the folder says.")] = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
) -> None:
    """Fold an adapter into its backbone and save plain weights (config.json + model.safetensors)."""
    from mmkit.adapters import attached_adapters
    from mmkit.backbones import save_backbone
    from mmkit.cli.exporting import task_of

    if task := task_of(adapter):
        raise InputError(
            f"{adapter} is a result of --task {task}, which holds the whole model: there is nothing to merge."
        )
    model = COMMANDS.get("finetune").load_finetuned(
        adapter, backbone=backbone, checkpoint_path=checkpoint, pretrained=pretrained
    )
    adapters = attached_adapters(model)
    if not adapters:
        raise InputError(f"{adapter} holds a whole model, there is nothing to merge.")
    for one in adapters.values():
        one.merge()
    save_backbone(model, output)
    print(f'Merged. Saved to {output}. Try it: mmkit predict IMAGE --model "{output}"')


@_command
def export(
    run: Annotated[Path, typer.Argument(help="A folder written by `mmkit finetune` or `mmkit merge`.")],
    output: Annotated[Path, typer.Option(help="The file (.onnx, .pt2) or folder (timm, peft) to write.")],
    format: Annotated[str, typer.Option(help="onnx, torch-export, timm or peft.")] = "onnx",
    backbone: Annotated[str | None, typer.Option(help="The backbone, if not where the folder says.")] = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
) -> None:
    """Write a fine-tuned model for others to run; what they read from it is compared with the original first."""
    from mmkit.cli.exporting import export_of_task, task_of

    if task := task_of(run):
        options = {"backbone": backbone, "checkpoint": checkpoint, "pretrained": pretrained}
        print(export_of_task(run, task, format, output, options))
        return
    done = COMMANDS.get("finetune").export(
        run, format, output, backbone=backbone, checkpoint_path=checkpoint, pretrained=pretrained
    )
    print(
        f"Saved to {done.path}. Read back, its logits differ from the original's by {done.difference:.1e} at most, over "
        f"{done.pictures} random pictures."
    )


@_command
def predict(
    images: Annotated[list[str], typer.Argument(help="Pictures, folders, wildcards or zips of pictures.")],
    model: Annotated[
        str | None, typer.Option(help="A fine-tuned or merged folder, or a backbone name; default: the bundled one.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="With an adapter's folder: its backbone, if not where the folder says. Alone: --model."),
    ] = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = False,
    allow_random: Annotated[bool, typer.Option("--allow-random", help="Answer with random weights too.")] = False,
    top_k: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: file,label,score,label_2,score_2,...,error.")
    ] = False,
) -> None:
    """Classify pictures. One that cannot be read costs a line; it is an error when none can."""
    from mmkit.data import list_pictures
    from mmkit.pipelines import pipeline

    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other.")
    pictures = list_pictures(images)
    if model is None:
        model, backbone = backbone, None
    classify = pipeline(
        "image-classification",
        model,
        backbone=backbone,
        checkpoint_path=checkpoint,
        pretrained=pretrained,
        device=device,
        allow_random=allow_random,
    )
    rows = _answers(classify, pictures, top_k, batch_size)
    failed = _print_json(rows) if as_json else _print_csv(rows, top_k) if as_csv else _print_lines(rows)
    if failed:
        typer.secho(f"{failed} of {len(pictures)} pictures could not be read.", err=True)
    if failed == len(pictures):
        raise typer.Exit(1)


def _answers(classify: Any, pictures: list[tuple[str, Path]], top_k: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """One row a picture, {"file", "labels", "scores"} or {"file", "error"}, batch by batch."""
    from mmkit.data import load_image

    for first in range(0, len(pictures), batch_size):
        rows, readable = [], []
        for name, path in pictures[first : first + batch_size]:
            row: dict[str, Any] = {"file": name}
            rows.append(row)
            try:
                picture = load_image(path)
                classify.transform(picture)  # a strip may be readable and still too long to be prepared
                readable.append((row, picture))
            except (MMKitError, OSError) as error:
                row["error"] = str(error).replace(str(path), name)  # of a zip: not where it was unpacked
        results = classify([picture for _, picture in readable], top_k=top_k, batch_size=batch_size)
        for (row, _), result in zip(readable, results, strict=True):
            row |= {"labels": result.labels, "scores": [round(s, 4) for s in result.scores]}
        yield from rows


def _print_lines(rows: Iterator[dict[str, Any]]) -> int:
    failed = 0
    for row in rows:
        if "error" in row:
            failed += 1
            named = row["error"] if row["file"] in row["error"] else f"{row['file']}: {row['error']}"
            typer.secho(f"Error: {named}", fg="red", err=True)
        else:
            scores = ", ".join(f"{n} {100 * s:.1f} %" for n, s in zip(row["labels"], row["scores"], strict=True))
            print(f"{row['file']}: {scores}")
    return failed


def _print_json(rows: Iterator[dict[str, Any]]) -> int:
    import json

    answers = list(rows)
    print(json.dumps(answers, indent=2))
    return sum("error" in row for row in answers)


def _print_csv(rows: Iterator[dict[str, Any]], top_k: int) -> int:
    import csv

    writer, failed = csv.writer(sys.stdout, lineterminator="\n"), 0
    numbered = [f"{column}_{k}" for k in range(2, top_k + 1) for column in ("label", "score")]
    writer.writerow(["file", "label", "score", *numbered, "error"])
    for row in rows:
        failed += "error" in row
        cells = [cell for pair in zip(row.get("labels", ()), row.get("scores", ()), strict=True) for cell in pair]
        writer.writerow([row["file"], *cells, *[""] * (2 * top_k - len(cells)), row.get("error", "")])
    return failed


@_command
def list_(what: Annotated[str, typer.Argument(help="adapters, models, tasks, weights or apps.")] = "adapters") -> None:
    """List what is there."""
    from mmkit import registry

    tables = {"adapters": registry.ADAPTERS, "models": registry.MODELS, "tasks": registry.TASKS, "apps": registry.APPS}
    if what == "weights":
        from mmkit.weights import list_weights, weight_entry

        for name in list_weights():
            entry = weight_entry(name)
            print(f"{name}: {entry.summary} License: {entry.license}")
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
    names = [name for name in (CONFIG_NAME, "config.json") if (folder / name).is_file()]
    if not names:
        raise InputError(f"{folder} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json).")
    config = read_json(folder / names[0])
    for file in sorted(folder.glob("*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 1024:,.0f} kB")
    print(json.dumps(config, indent=2))


@_command
def app_(
    name: Annotated[str | None, typer.Argument(help="One page; all pages when left out.")] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; others than 127.0.0.1 need --auth.")] = "127.0.0.1",
    auth: Annotated[Path | None, typer.Option(help="A file of lines user:password.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name under which the studio may be reached; can be repeated.")
    ] = None,
    max_upload: Annotated[str, typer.Option(help="Largest upload, like 64mb.")] = "64mb",
    quota: Annotated[str, typer.Option(help="All uploads and results together, like 2gb.")] = "2gb",
) -> None:
    """Open the studio, or one of its pages."""
    limits = {"allow_hosts": allow_host or [], "max_file_size": max_upload, "quota": quota}
    _studio(name, port, host=host, auth=auth, **limits)


_splat = typer.Typer(help="Scenes of Gaussians: fit, convert, render, info.", no_args_is_help=True)
app.add_typer(_splat, name="splat")
_in_rooms = [_command(COMMANDS.get(name)) for name in ("slam", "erase")]  # declared there; light to import


@functools.partial(_command, group=_splat)
def fit(
    data: Annotated[
        Path,
        typer.Argument(help="COLMAP model, transforms.json, or pictures with a trajectory; 'drawn': a drawn scene."),
    ],
    output: Annotated[Path, typer.Argument(help="Where the scene goes: .ply, .splat, .spz, .sog or .glb.")],
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    gaussians: Annotated[int, typer.Option(min=1, help="As many as the scene may have.")] = 12000,
    longest: Annotated[
        int | None, typer.Option(min=16, help="Longer side of the pictures, in pixels. Default: 256.")
    ] = None,
    sh_degree: Annotated[int, typer.Option(min=0, max=3)] = 2,
    state: Annotated[Path | None, typer.Option(help="Folder that lets an interrupted fit continue.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of continuing in --state.")] = False,
    seed: int = 0,
) -> None:
    """Reconstruct a scene from pictures with known cameras; every eighth picture is held out to judge by."""
    if restart and state is None:
        raise InputError("--restart means nothing without --state: there is nothing to continue. Leave it out.")
    if longest is not None and str(data) == "drawn":
        raise InputError("--longest means nothing for the drawn scene. Leave it out.")
    room = COMMANDS.get("splat")
    room.check_splat_target(output)
    posed = room.drawn_scene() if str(data) == "drawn" else room.load_posed_images(data, longest=longest or 256)
    fitted, held = posed.split() if len(posed) > 3 else (posed, None)
    config = room.FitConfig(
        steps=steps, max_gaussians=gaussians, start_gaussians=min(gaussians, 4000), sh_degree=sh_degree, seed=seed
    )
    words = {
        "steps": "--steps",
        "max_gaussians": "--gaussians",
        "start_gaussians": "--gaussians",
        "sh_degree": "--sh-degree",
    }
    words |= {"seed": "--seed", "pictures": "pictures or --longest"}
    with in_words(words, "Use the same to continue, --restart to start over, or another --state."):
        result = room.fit_images(fitted, config, held_out=held, output_dir=state, resume=not restart)
    room.save_splats(result.model, output)
    print(f"{len(result.model)} Gaussians from {len(fitted)} pictures in {result.seconds:.0f} s. Saved to {output}.")
    if result.scores:
        print(f"Held out: PSNR {result.scores['psnr']:.2f} dB, SSIM {result.scores['ssim']:.3f}.")


@functools.partial(_command, group=_splat)
def convert(source: Path, target: Annotated[Path, typer.Argument(help="Its suffix says the format.")]) -> None:
    """Write a splat file in another format."""
    room = COMMANDS.get("splat")
    room.check_splat_target(target)
    room.save_splats(room.load_splats(source), target)
    about = room.splat_info(target)
    lost = " This format rounds values." if about["lossy"] else ""
    print(f"{about['gaussians']} Gaussians, {about['bytes'] / 1024:,.0f} kB, {about['format']}.{lost}")


@functools.partial(_command, group=_splat)
def render(
    scene: Annotated[Path, typer.Argument(help="A splat file.")],
    output: Annotated[Path, typer.Argument(help=".png: a view; .npz: with depth and alpha; .mp4: once around.")],
    azimuth: Annotated[float | None, typer.Option(help="Of a view, in degrees. Default: 30.")] = None,
    elevation: float = 25.0,
    distance: Annotated[float | None, typer.Option(help="Default: 2.6 times the scene's radius.")] = None,
    size: Annotated[int, typer.Option(min=16, max=2048)] = 512,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a film. Default: 60.")] = None,
) -> None:
    """Render a view of a scene, or a film around it."""
    from mmkit.pipelines import pipeline
    from mmkit.storage.files import check_writable

    film = output.suffix.lower() == ".mp4"
    if output.suffix.lower() not in (".png", ".npz", ".mp4"):
        raise InputError(f"A view goes to .png or .npz, a film to .mp4; {output.name!r} ends in none of them.")
    if film and azimuth is not None:
        raise InputError("--azimuth means nothing for a film, which goes once around. Leave it out.")
    if not film and frames is not None:
        raise InputError("--frames means nothing for a single view; films end in .mp4. Leave it out.")
    check_writable(output)
    views = pipeline("novel-view", scene)
    if film:
        from tqdm import tqdm

        with tqdm(total=frames or 60, desc="rendering", unit="frame") as bar:
            options = {"frames": frames or 60, "size": size, "elevation": elevation, "distance": distance}
            COMMANDS.get("splat").turntable(views.model, output, on_frame=lambda _: bar.update(), **options)
    else:
        angle = 30.0 if azimuth is None else azimuth
        views(azimuth=angle, elevation=elevation, distance=distance, size=size).save(output)
    print(f"Saved to {output}.")


@functools.partial(_command, group=_splat, name="info")
def splat_info(file: Path) -> None:
    """Say what a splat file holds."""
    import json

    print(json.dumps(COMMANDS.get("splat").splat_info(file), indent=2))


@_command
def version() -> None:
    """Print the versions of mmkit, Python and torch."""
    import torch

    print(f"mmkit {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")


def _studio(name: str | None, port: int, *, auth: Path | None = None, **options: Any) -> None:
    from mmkit.errors import BackendUnavailableError

    try:
        launch_studio = COMMANDS.get("studio")
    except ImportError as error:
        raise BackendUnavailableError(f"The studio needs gradio ({error}): pip install 'mmkit[apps]'") from error
    launch_studio([name] if name else None, port=port, auth=auth, **options)
