"""Train a segmentation network on a folder of images and masks: what `mmkit finetune --task segmentation` calls."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmkit.backbones import load_weights
from mmkit.backbones.model import create_model, list_models, open_model
from mmkit.data import stratified_split
from mmkit.errors import InputError, nearest
from mmkit.storage.files import absolute, expanded
from mmkit.storage.folders import check_free
from mmkit.training.classifying import config_of, known_method, without
from mmkit.training.config import FitConfig, FitResult
from mmkit.training.digest import short_name
from mmkit.training.loop import fit
from mmkit.training.metrics import weights_of_counts
from mmkit.training.reporting import classes_told, dry, told, write_report
from mmkit.vision.medical.cases import Case, Cases, Pair
from mmkit.vision.medical.familiar import Familiarity
from mmkit.vision.medical.labels import IGNORED, load_labels
from mmkit.vision.medical.metrics import confusions, mean_dice, overlaps
from mmkit.vision.medical.pairs import Pairs, find_pairs
from mmkit.vision.medical.pipeline import MedicalSegmentationPipeline
from mmkit.vision.medical.training import Patches, SegmentationLoss
from mmkit.weights import list_weights, weight_entry

METHODS = ("full", "linear_probe")
FRESH: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {
    "unet": {2: ("unet", {}), 3: ("unet", {"spatial_dims": 3, "channels": (8, 16, 32, 48)})},
    "lightm_unet": {
        2: ("lightm_unet_2d_tiny", {"init_filters": 8, "pad": True}),
        3: ("lightm_unet_3d_tiny", {"init_filters": 8, "pad": True}),
    },
}
"""What is trained from scratch, for pictures and for volumes: a model and its settings."""
_LARGEST = {2: 128, 3: 48}  # of patches that nobody chose: a step takes a CPU a fraction of a second
_STEPS = 50  # of an epoch, at least: a dozen pictures alone would make epochs of a few steps
_FAMILIAR = 5  # training images; fewer say nothing about what is unlike them
_SHOWN = 12
_SETTINGS = ("patch", "mirror", "turn", "touching")


@dataclass
class Segmented:
    """What training brought.

    Attributes:
        model: trained, in eval mode. class_names: background first.
        fit: history, metrics, seconds; `fit.stopped` says how it ended, "dry run" that nothing was trained.
        folder: holds `model/`, `run/`, report.json, report.html and run.toml; None when it was interrupted.
        dice: mean over the classes of what was held back, 0..1, all its pixels taken together; None without.
        per_class: for each class but the background its "class", "pixels" in truth, "dice" and "iou" (None where it is nowhere).
        use: a line of Python that loads it. plan: what would be trained, of a dry run.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    fit: FitResult
    folder: Path | None
    dice: float | None
    per_class: list[dict[str, Any]]
    use: str
    plan: str = ""

    def summary(self, model: str | None = None) -> str:
        """What came out and how to use it, for people."""
        held = "" if self.dice is None else f"Mean Dice {100 * self.dice:.1f} % on what was held back (best epoch)."
        return self.plan or told(self.fit, self.folder, held, self.use)


@without("mixup")
def finetune(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    adapter: str = "full",
    *,
    output_dir: str | os.PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    val: float = 0.2,
    seed: int = 0,
    resume: bool = True,
    dry_run: bool = False,
    **fit_options: Any,
) -> Segmented:
    """Train on `data/images` and `data/masks` (or `labels`), such folders in `data/train` and `data/val`, or nnU-Net's; see `find_pairs`.

    All files are read before anything is trained; up to 1 GiB of them stays in memory, see `Cases`. Pixels that the masks ignore (255, see
    `find_pairs`) and those beyond the end of an image smaller than the patch count neither in the loss nor in any figure.

    Args:
        model: "unet" (default) or "lightm_unet" from scratch, another name of `list_models("*unet*")`; as a start a bundled name, such
            as `unet_nuclei`, or a folder of `save_pretrained`. A start for another number of classes gets a new head.
        adapter: "full", or "linear_probe": only the head, which needs a start.
        output_dir: gets `model/` (for `mmkit.pipeline("medical-segmentation", ...)`), `run/`, and the report.
        settings: "patch": size of the training patches, one number or one per axis, then also that of the windows in prediction;
            "mirror": axes that may be mirrored, default all of pictures, left and right of volumes; "turn": by 90 degrees;
            "touching": count touching objects one by one, as the pipeline's argument of that name.
        val: share held back where the folder has no "val"; 0: none.
        dry_run: read everything and say what would be trained (`plan`), no more.
        fit_options: fields of `FitConfig`; an epoch has at least 50 steps. `class_weights` and `label_smoothing` act on the cross
            entropy, weights by the pixels of each class; `sampling` "balanced" centres patches on every class equally often; `cutmix`
            pastes a box of another patch with its labels.

    Raises:
        InputError: a folder, file or mask that cannot be read or does not fit, another method, a start that does not fit. Nothing is
            written then.
    """
    known_method(adapter, METHODS, "segmentation")
    plan = _planned(
        data, str(model or "unet"), adapter, output_dir, dict(settings or {}), val, seed, fit_options, resume
    )
    names = plan.pairs.class_names
    if dry_run:
        notes = [plan.ignored] if plan.ignored else []
        planned, told_plan = dry(
            plan.net, plan.config, len(plan.train), len(plan.held), classes_told(names), notes=notes
        )
        return Segmented(plan.net, names, planned, None, None, [], plan.use, told_plan)
    run = _trained(plan)
    if run.stopped == "interrupted":
        return Segmented(plan.net, names, run, None, None, [], plan.use)
    counts = confusions(plan.net, plan.held, plan.patch) if len(plan.held) else None
    dice = None if counts is None else float(mean_dice(counts.sum(0)))
    done = Segmented(plan.net, names, run, plan.folder, dice, _per_class(counts, names), plan.use)
    if plan.folder is not None:
        _write(done, plan, plan.folder, counts)
    return done


@dataclass
class _Plan:
    """All that is decided before a step is taken. `told`: settings for run.toml; `identity`: facts that `fit` cannot see."""

    pairs: Pairs
    train: Cases
    held: Cases
    net: Any
    patch: list[int]
    changes: dict[str, Any]
    touching: bool
    config: FitConfig
    folder: Path | None
    told: dict[str, Any]
    identity: dict[str, Any]

    @property
    def use(self) -> str:
        """A line of Python that asks the result."""
        where = self.folder / "model" if self.folder else "MODEL"
        image = "image.nii.gz" if self.pairs.volumes else "image.png"
        return f'mmkit.pipeline("medical-segmentation", "{where}")("{image}").plot()'

    @property
    def ignored(self) -> str:
        """A sentence on the pixels that do not count, or nothing."""
        parts = [part.ignored for part in (self.train, self.held) if len(part)]
        if not any(parts):
            return ""
        shown = f"{100 * parts[0]:.1f} %" + (f" (held back: {100 * parts[1]:.1f} %)" if len(parts) > 1 else "")
        return f"{shown} of the pixels are ignored: {self.pairs.ignore} in the masks."


def _planned(
    data: str | os.PathLike[str], name: str, adapter: str, output_dir: str | os.PathLike[str] | None, settings: dict[str, Any],
    val: float, seed: int, fit_options: dict[str, Any], resume: bool,
) -> _Plan:  # fmt: skip
    pairs = find_pairs(data)
    train, held = _parts(pairs, val, seed)
    first = train.facts[0]
    dims = len(first.shape)
    torch.manual_seed(seed)
    net = _network(name, dims, first.channels, len(pairs.class_names), adapter)
    patch, changes = _settings(settings, np.array([facts.shape for facts in train.facts]), net.multiple)
    touching = settings.get("touching", False)
    if not isinstance(touching, bool):
        raise InputError(f"touching is true or false, not {touching!r}.")
    config = config_of(
        fit_options, ("dice",), lr=_rate(name, adapter), batch_size=4 if dims == 2 else 2, epochs=20, warmup_epochs=1.0,
        weight_decay=1e-4, monitor="dice", seed=seed, resume=resume,
    )  # fmt: skip
    if config.cutmix and config.batch_size == 1:
        raise InputError("cutmix pastes from another patch of the batch: give a batch_size of two or more.")
    folder = None if output_dir is None else absolute(output_dir)
    if folder is not None:
        check_free(folder / "model", ("model",))  # rather than after the training
    told = {
        "task": "segmentation", "data": str(absolute(data)), "backbone": name, "adapter": adapter, "val": val, "output": str(folder),
        **{k: v for k, v in vars(config).items() if k not in ("resume", "progress")}, "settings": settings,
    }  # fmt: skip
    identity = {
        "backbone": name, "method": adapter, "validation share": val, "class names": list(pairs.class_names),
    }  # fmt: skip
    return _Plan(pairs, train, held, net, patch, changes, touching, config, folder, told, identity)


def _parts(pairs: Pairs, val: float, seed: int) -> tuple[Cases, Cases]:
    """Cases to train on, and cases held back. Everything is read before anything is trained."""
    count = len(pairs.train)
    if count < 2:
        raise InputError("Training needs at least two images, better some dozens; there is one.")
    cases = pairs.cases()
    filled = [bool(holds.any()) for holds in cases.pixels[:, 1:]]
    first: Sequence[int] = range(count)
    second: Sequence[int] = range(count, len(cases))
    if pairs.held is None and val:  # each part gets its share of the empty ones
        first, second = stratified_split(filled, val, seed)
        if not first or not second:
            raise InputError(f"{len(cases)} images are too few to hold back {val:.0%}. Give more, or --val 0.")
    for what, part in (("training", first), ("held-back", second)):
        if len(part) and not any(filled[i] for i in part):
            void = f" {pairs.ignore} is ignored; classes are numbered 0, 1, 2 ..." if cases.ignored else ""
            raise InputError(f"No mask of the {len(part)} {what} images holds anything but background.{void}")
    return cases.part(first), cases.part(second)


def _trained(plan: _Plan) -> FitResult:
    config, patch = plan.config, plan.patch
    weights = weights_of_counts(plan.train.pixels.sum(0)) if config.class_weights else None
    length = max(len(plan.train), _STEPS * config.batch_size)
    balanced = config.sampling == "balanced"
    patches = Patches(plan.train, patch, length, **plan.changes, balanced=balanced, margin=IGNORED)

    def measured(network: nn.Module, loader: Iterable[Sequence[Any]]) -> dict[str, float]:
        cases = (case for batch in loader for case in zip(*batch, strict=True))
        return {"dice": float(mean_dice(confusions(network, cases, patch).sum(0)))}

    run = fit(
        plan.net,
        patches,
        plan.held if len(plan.held) else None,
        loss_fn=SegmentationLoss(config.label_smoothing, weights, config.cutmix, config.mixup_prob),
        metrics_fn=measured,
        config=config,
        output_dir=plan.folder and plan.folder / "run",
        collate_fn=_collated,
        identity=plan.identity,
    )
    plan.net.eval()
    return run


def _network(name: str, dims: int, in_chans: int, num_classes: int, adapter: str) -> Any:
    """A fresh network, or a trained one, with a new head where the number of classes differs."""
    fresh, settings = FRESH.get(name, {}).get(dims, (name, {"pad": True} if name.startswith("lightm") else {}))
    bundled = [w for w in list_weights() if weight_entry(w).model.startswith(("unet", "lightm_unet"))]
    net: Any
    if expanded(name).is_dir():
        net = open_model(name)
    elif name in bundled:
        net = load_weights(name)
    elif fresh in list_models("*unet*"):
        if adapter == "linear_probe":
            raise InputError(
                f"linear_probe trains the head alone; {name!r} is random below it. Start from {', '.join(bundled)}."
            )
        net = create_model(fresh, in_chans=in_chans, num_classes=num_classes, **settings)
    else:
        raise InputError(
            f"No network for segmentation is called {name!r}. {nearest(name, [*FRESH, *bundled, *list_models('*unet*')])}"
        )
    takes = (getattr(net, "spatial_dims", None), getattr(net, "in_chans", None))
    if takes != (dims, in_chans):
        kind = "pictures" if takes[0] == 2 else "volumes"
        shown = f"segments {kind} of {takes[1]} channel(s)" if takes[0] else "does not segment"
        raise InputError(f"{name} {shown}; these data are {dims}D with {in_chans}. Choose another --backbone.")
    if net.num_classes != num_classes:
        other = type(net)(**{**net.config, "num_classes": num_classes})
        wanted = other.state_dict()
        other.load_state_dict({k: v for k, v in net.state_dict().items() if v.shape == wanted[k].shape}, strict=False)
        net = other
    if adapter == "linear_probe":
        net.requires_grad_(False)
        (net.head if hasattr(net, "head") else net.conv_final[-1]).requires_grad_(True)
    return net


def _rate(name: str, adapter: str) -> float:
    """A learning rate: trained weights are moved with more care, a head alone with less."""
    if adapter == "linear_probe":
        return 1e-2
    return 4e-3 if name in (*FRESH, *list_models("*unet*")) else 1e-3


def _settings(given: dict[str, Any], sizes: np.ndarray, multiple: int) -> tuple[list[int], dict[str, Any]]:
    """The size of patches, and how they are changed, for images of `sizes` (N, axes)."""
    if unknown := [k for k in given if k not in _SETTINGS]:
        raise InputError(f"There is no setting {unknown[0]!r}. {nearest(unknown[0], _SETTINGS)}")
    dims, least = sizes.shape[1], 2 * multiple  # smaller ones come down to a single point, which has no norm
    if int(sizes.max(1).min()) < least:
        raise InputError(
            f"An image of {' x '.join(map(str, sizes[sizes.max(1).argmin()]))} is too small; {least} pixels are needed."
        )
    patch = given.get("patch", [min(_LARGEST[dims], int(s)) for s in np.median(sizes, 0)])
    patch = [patch] * dims if isinstance(patch, int) else patch
    whole = isinstance(patch, (list, tuple)) and all(isinstance(s, int) and s > 0 for s in patch)
    if not whole or len(patch) != dims:
        raise InputError(f"patch is one positive size or {dims} of them, not {given['patch']!r}.")
    patch = [max(least, s // multiple * multiple) for s in patch]
    mirror, turn = given.get("mirror", list(range(dims)) if dims == 2 else [0]), given.get("turn", False)
    if not isinstance(mirror, (list, tuple)) or not all(axis in range(dims) for axis in mirror):
        raise InputError(f"mirror is a list of axes in 0..{dims - 1}, not {mirror!r}.")
    if not isinstance(turn, bool) or (turn and patch[0] != patch[1]):
        raise InputError(f"turn is true or false, and needs patches whose first two sizes are equal, not {patch}.")
    return patch, {"mirror": mirror, "turn": turn}


def _collated(cases: Sequence[Case]) -> tuple[Any, Any]:
    """Patches stacked; whole images of different sizes stay lists."""
    images, labels = zip(*cases, strict=True)
    if len({x.shape for x in images}) > 1:
        return list(images), list(labels)
    return torch.stack(images), torch.stack(labels)


def _per_class(counts: np.ndarray | None, names: Sequence[str]) -> list[dict[str, Any]]:
    if counts is None:
        return []
    whole = counts.sum(0)
    dice, iou = ([None if np.isnan(v) else round(float(v), 4) for v in values] for values in overlaps(whole))
    pixels = whole.sum(1).tolist()
    return [{"class": name, "pixels": pixels[i], "dice": dice[i], "iou": iou[i]} for i, name in enumerate(names) if i]


def _write(done: Segmented, plan: _Plan, folder: Path, counts: np.ndarray | None) -> None:
    """The model with all that is known of it, and the report, with the images that came out worst."""
    known = Familiarity.measure(image for image, _ in plan.train) if len(plan.train) >= _FAMILIAR else None
    ask = MedicalSegmentationPipeline(
        plan.net, class_names=done.class_names, window=plan.patch, familiarity=known, touching=plan.touching
    )
    ask.save_pretrained(folder / "model")
    worst, page = ([], {"measure": "dice"}) if counts is None else _pages(done, plan, counts, ask)
    held = f"{len(plan.held):,}" if counts is not None else "none"
    how = "all weights" if plan.told["adapter"] == "full" else "the head alone"
    name = plan.told["backbone"]
    write_report(
        folder,
        done.model,
        done.fit,
        title=f"Segmentation with {Path(name).name}",
        subtitle=f"{len(plan.train):,} training images, {held} held back.",
        score=("mean Dice", done.dice),
        found={"dice": done.dice, "per_class": done.per_class, "worst": worst, "class_names": list(done.class_names)},
        settings=plan.told,
        trained=[
            ("method", how), ("backbone", name), ("patches and windows", " x ".join(map(str, plan.patch))),
            ("classes", ", ".join(done.class_names)), *([("not counted", plan.ignored)] if plan.ignored else []),
        ],
        use=done.use,
        page=page,
    )  # fmt: skip


def _pages(
    done: Segmented, plan: _Plan, counts: np.ndarray, ask: MedicalSegmentationPipeline
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The worst images by name, and what the report's page shows of those held back."""
    unit = "voxels" if plan.pairs.volumes else "pixels"
    rows = [
        [r["class"], f"{r['pixels']:,}", *("–" if r[k] is None else f"{100 * r[k]:.1f} %" for k in ("dice", "iou"))]
        for r in done.per_class
    ]
    note = (
        "Dice: twice what truth and answer share over the sum of both. IoU: what they share over what either covers. All held-back "
        "images taken together."
    )
    each, paths = mean_dice(counts), plan.held.samples
    order = [int(i) for i in np.argsort(each, kind="stable")[:_SHOWN] if not np.isnan(each[i])]
    worst: list[dict[str, Any]] = [{"file": short_name(paths[i][0]), "dice": round(float(each[i]), 4)} for i in order]
    shown = [
        (f"Dice {100 * row['dice']:.0f} %", row["file"], _beside(ask, paths[i], plan.pairs.ignore))
        for i, row in zip(order, worst, strict=True)
    ]
    page = {
        "measure": "dice",
        "table": (f"Class by class, of {len(paths)} held-back images", [["class", unit, "Dice", "IoU"], *rows], note),
        "pictures": ("The worst, lowest Dice first: image, truth, answer", shown),
    }
    return worst, page


def _beside(ask: MedicalSegmentationPipeline, pair: Pair, ignore: int | None) -> Image.Image:
    """An image alone, with the truth, and with the answer, side by side. What is ignored looks like background in the truth."""
    result = ask(pair[0], progress=False)
    truth = load_labels(pair[1], len(ask.class_names), ignore).clip(min=0)
    options: dict[str, Any] = {"opacity": 0.0, "outline": result.outline_width} if result.stained else {}
    panels = [result.overlay(0.0), result.overlay(**options, labels=truth), result.overlay(**options)]
    for panel in panels:
        panel.thumbnail((320, 320))
    width, height = panels[0].size
    strip = Image.new("RGB", (3 * width + 8, height), "white")
    for i, panel in enumerate(panels):
        strip.paste(panel, (i * (width + 4), 0))
    return strip
