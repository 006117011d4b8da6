"""Fine-tune a backbone on a folder of images with any adapter: what `mmkit finetune`, the demo and the studio all call."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters import Adapter, apply_adapter, list_adapters, load_adapter, save_adapter
from mmkit.adapters.files import CONFIG_NAME
from mmkit.backbones import create_backbone, image_info, mark_trained, save_backbone, warn_if_random
from mmkit.data import ImageDataset, ImageTransform, open_dataset, split_dataset
from mmkit.errors import CheckpointError, InputError, RunDiffersError, nearest
from mmkit.storage import folder_lock, new_folder, open_folder, require_folder, write_json
from mmkit.storage.files import absolute
from mmkit.storage.folders import check_free
from mmkit.training import FitConfig, FitResult, StepInfo, fit
from mmkit.training.digest import tensors_digest
from mmkit.vision.classification.probe import start_heads

KINDS = ("finetuned", "adapter", "backbone")
"""What a folder of fine-tuning holds, and the kinds that are read and replaced alike."""


KEPT = ("training",)
"""The state of the run in such a folder."""


LEARNING_RATES = {"linear_probe": 3e-2, "ssf": 2e-2, "bitfit": 2e-2, "lora": 5e-3, "full": 5e-4}
"""Peak learning rates that work on small data sets; other methods start from 2e-3."""

GENTLE_RATES = {"linear_probe": 1e-5, "full": 5e-5}
"""Those from solved classifiers, where there is little left to learn and much to spoil; other methods start from 3e-4."""


def finetune_methods() -> list[str]:
    """Names `finetune` takes as `adapter`: every method that suits pictures, and "full" for all weights."""
    return sorted({*list_adapters(task="image-classification"), "full"})


@dataclass
class Prepared:
    """A model with its adapter attached and its data split, before training; `describe()` says what will be trained.

    Attributes:
        model: the backbone with a classifier for `class_names`.
        adapter: attached, or `None` for full fine-tuning.
        train, val: data sets of (image tensor, label).
        method: as given. backbone: how to build the backbone again.
        keep_backbone: whether its weights must be saved beside the adapter, because that would not bring them back.
        test: the test split of a source that has one beside validation pictures, else `None`; it gives the final score.
        solve_heads: whether training starts from solved classifiers, see `mmkit.vision.classification.probe`.
        measured_on: which pictures `val` holds: "validation", or "test" when the source splits off only such.
        identity: what decides a run beside data, adapter and settings: see `mmkit.training.fit`.
    """

    model: nn.Module
    adapter: Adapter | None
    train: ImageDataset
    val: ImageDataset
    class_names: list[str]
    method: str
    backbone: dict[str, Any]
    keep_backbone: bool
    test: ImageDataset | None = None
    measured_on: str = "validation"
    solve_heads: bool = False
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained, the classifier included."""
        if self.adapter is not None:
            return self.adapter.num_parameters()
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def describe(self) -> dict[str, Any]:
        """Trainable and total parameters, and the module paths the adapter acts at."""
        return {
            "method": self.method,
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            "sites": self.adapter.site_paths if self.adapter is not None else ["(all weights)"],
            "class_names": self.class_names,
            "train_images": len(self.train),
            "val_images": len(self.val),
            "test_images": len(self.test) if self.test is not None else 0,
            "measured_on": self.measured_on,
        }


@dataclass
class FinetuneResult:
    """What fine-tuning produced.

    Attributes:
        prepared: the model with the trained adapter still attached.
        fit: history, metrics, seconds.
        folder: where it was saved, or `None`; also `None` after Ctrl-C or SIGTERM (`fit.stopped` is "interrupted"): then
            only the state of the run is kept, to be continued.
        accuracy: best accuracy on the pictures that `prepared.measured_on` names, 0..1. The saved weights are those of it.
        test_accuracy: of the saved weights on `prepared.test`, which had no say in choosing them; `None` without a test split.
        file_size: bytes of the saved files that are needed beside the backbone.
        merge_error: largest difference of the logits after merging, or `None` when the method cannot be merged.
    """

    prepared: Prepared
    fit: FitResult
    folder: Path | None = None
    accuracy: float = 0.0
    test_accuracy: float | None = None
    file_size: int = 0
    merge_error: float | None = None
    report: dict[str, Any] = field(default_factory=dict)


def default_backbone(dataset: ImageDataset) -> str:
    """The bundled backbone that suits the pictures: their first one says how large they are."""
    return "mobilenetv2" if _photographs(dataset) else "tiny_vit"


def _photographs(dataset: ImageDataset) -> bool:
    """Whether the first picture is larger than 64 pixels, so that these are no digits."""
    picture, _ = dataset.with_transform(None)[0]
    return max(picture.size) > 64


def prepare(
    data: str | os.PathLike[str] | ImageDataset,
    backbone: str | os.PathLike[str] = "auto",
    adapter: str = "ssf",
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    val: float = 0.2,
    seed: int = 0,
    augment: bool | None = None,
    solve_heads: bool | None = None,
    on_error: str = "raise",
    settings: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> Prepared:
    """Open and split the data, build the backbone with a fresh classifier, attach the adapter, and check that it acts.

    Args:
        data: a folder with one sub-folder per class, a CSV, a zip of either, or an opened `ImageDataset`.
        backbone: a `create_backbone` name or folder; "auto" is the bundled "mobilenetv2", which knows photographs, or "tiny_vit"
            for pictures of up to 64 pixels, such as digits.
        adapter: a name of `finetune_methods()`.
        checkpoint_path, pretrained, overrides: passed to `create_backbone`.
        val: share of the images kept for validation, unless the data brings a split.
        seed: of the split and of the classifier's and adapter's start.
        augment: random crops and flips; `None`: for photographs, which are pictures of more than 64 pixels (leave off for digits, text
            and everything with a handedness).
        solve_heads: start from classifiers that are solved on the features of the backbone as it is, and train gently from there
            (arXiv 2202.10054); `None`: for photographs, when the backbone's weights are not random.
        on_error: "raise" or "skip" unreadable images.
        settings: the adapter's own settings.

    Raises:
        InputError: unusable data (empty, one class, unreadable files), unknown names or settings.
    """
    if adapter not in finetune_methods():
        raise InputError(f"Unknown adapter {adapter!r}. {nearest(adapter, finetune_methods())}")
    dataset = data if isinstance(data, ImageDataset) else open_dataset(data, on_error=on_error)
    if len(dataset.class_names) < 2:
        raise InputError(f"Training needs at least two classes; found {dataset.class_names}.")
    if backbone == "auto":
        backbone = default_backbone(dataset)
    augment = _photographs(dataset) if augment is None else augment
    train, held = split_dataset(dataset, val, seed)
    splits = set(dataset.splits or ())
    torch.manual_seed(seed)
    is_folder = Path(backbone).expanduser().is_dir()
    spec = {
        "name": str(Path(backbone).expanduser().resolve()) if is_folder else str(backbone),
        "overrides": overrides or {},
    }
    model = create_backbone(
        backbone, checkpoint_path, pretrained=pretrained, num_classes=len(dataset.class_names), **(overrides or {})
    )
    warn_if_random(model)
    info = dataclasses.replace(image_info(model), class_names=tuple(dataset.class_names))
    if not info.heads:
        raise InputError(
            f"{backbone!r} has no classifier that could be trained; choose an image classification backbone."
        )
    model.__dict__["backbone_info"] = info
    if solve_heads is None:
        solve_heads = _photographs(dataset) and info.trained is not False
    attached = None
    if adapter == "full":
        _keep_statistics(model)
    else:
        attached = apply_adapter(model, adapter, **{"modules_to_save": info.heads, **(settings or {})})
        attached.check()
    plain = info.preprocessing()
    return Prepared(
        model=model,
        adapter=attached,
        train=train.with_transform(ImageTransform.of(plain, train=augment)),
        val=held.with_transform(ImageTransform.of(plain)),
        class_names=list(dataset.class_names),
        method=adapter,
        backbone=spec,
        keep_backbone=bool(checkpoint_path) or not (is_folder or info.name.startswith("mmkit:")),
        test=dataset.split("test").with_transform(ImageTransform.of(plain))
        if {"train", "val", "test"} <= splits
        else None,
        measured_on="test" if {"train", "test"} <= splits and "val" not in splits else "validation",
        solve_heads=solve_heads,
        identity={
            "backbone": Path(backbone).name if is_folder else str(backbone),
            "overrides": overrides or None,
            "method": adapter,
            "validation share": None if {"train"} < splits else val,
            "augment": augment,
            "classifiers solved at the start": solve_heads or None,
            "weights at the start": _start(model, info.heads) if attached is None else None,
        },
    )


def _keep_statistics(model: nn.Module) -> None:
    """Batch normalisation of a network that knows something stays as it is: few pictures in small batches tell it worse."""
    if image_info(model).trained is not False:
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.requires_grad_(False)


def _start(model: nn.Module, heads: tuple[str, ...]) -> str:
    """The digest of what full fine-tuning starts from; the classifiers start at random, from the seed."""
    fresh = tuple(f"{head}." for head in heads)
    return tensors_digest((k, v) for k, v in model.state_dict().items() if not k.startswith(fresh))


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
) -> FinetuneResult:
    """Train what `prepare` built; with `output_dir`, save the adapter, `report.json` and logs there.

    Args:
        config: everything at once; else `epochs`, `lr` (`None`: the method's usual), `batch_size`, `seed` and `progress`.
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
    rates, usual = (GENTLE_RATES, 3e-4) if prepared.solve_heads else (LEARNING_RATES, 2e-3)
    peak = lr if lr is not None else rates.get(prepared.method, usual)
    config = config or FitConfig(
        epochs=epochs,
        lr=peak,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        warmup_epochs=1.0,
        weight_decay=0.01,
        label_smoothing=0.1 if prepared.solve_heads else 0.0,
    )
    if not resume:
        config = dataclasses.replace(config, resume=False)
    options = {"config": config, "on_step": on_step, "should_stop": should_stop}
    if output_dir is None:
        return _report(prepared, _fit(prepared, None, options), None)
    folder = absolute(output_dir)
    check_free(folder, KINDS, KEPT)
    main = int(os.environ.get("RANK", "0")) == 0  # of several processes under torchrun one writes
    with folder_lock(folder / KEPT[0]) if main else contextlib.nullcontext():
        run = _fit(prepared, folder, options)
        return _report(prepared, run, folder if main and run.stopped != "interrupted" else None)


def _fit(prepared: Prepared, folder: Path | None, options: dict[str, Any]) -> FitResult:
    """Run `fit` in the words of `finetune`."""
    if prepared.solve_heads:
        plain = prepared.train.with_transform(prepared.val.transform)
        start_heads(prepared.model, prepared.adapter, plain, len(prepared.class_names))
    try:
        return fit(
            prepared.model,
            prepared.train,
            prepared.val,
            output_dir=folder / KEPT[0] if folder else None,
            adapter=prepared.adapter,
            identity=prepared.identity,
            **options,
        )
    except RunDiffersError as error:
        names = {"train": "data", "val": "data held back", "validation share": "val", "method": "adapter"}
        advice = "Use the same to continue, resume=False to start over, or another output_dir."
        raise error.reworded(folder, names, advice) from None


def _report(prepared: Prepared, run: FitResult, folder: Path | None) -> FinetuneResult:
    """Measure and save what came out."""
    mark_trained(prepared.model)
    result = FinetuneResult(prepared, run, folder, accuracy=run.best_metrics.get("accuracy", 0.0))
    result.merge_error = merge_error(prepared) if run.stopped != "interrupted" else None
    result.test_accuracy = test_accuracy(prepared) if run.stopped != "interrupted" else None
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
        result.file_size = _save(prepared, folder, result.report | {"history": run.history})
    else:
        with tempfile.TemporaryDirectory() as temporary:
            result.file_size = _save(prepared, Path(temporary) / "model")
    result.report["file_size"] = result.file_size
    return result


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


def _save(prepared: Prepared, folder: Path, report: dict[str, Any] | None = None) -> int:
    """Save what the backbone's name alone does not bring back, and the report; returns the size of the former in bytes."""
    with new_folder(folder, KINDS[0], keep=KEPT, replaces=KINDS[1:]) as draft:
        backbone = dict(prepared.backbone)
        if prepared.adapter is None:
            save_backbone(prepared.model, draft, class_names=tuple(prepared.class_names))
        else:
            if prepared.keep_backbone:  # the adapter is useless without these very weights
                live = prepared.adapter
                model = live.detach()
                try:
                    save_backbone(model, draft / "backbone")
                finally:
                    live.attach(model)
                backbone = {"name": "backbone", "overrides": {}}
            save_adapter(prepared.adapter, draft, extra={"backbone": backbone, "class_names": prepared.class_names})
        size = sum(f.stat().st_size for f in draft.iterdir() if f.is_file())
        if report is not None:
            write_json(draft / "report.json", report | {"file_size": size})
    return size


def load_finetuned(
    folder: str | os.PathLike[str], *, backbone: str | os.PathLike[str] | None = None, **options: Any
) -> nn.Module:
    """The model of a folder written by `finetune`, with the adapter attached (`attached_adapters(model)["default"]`).

    Args:
        folder: holds an adapter, or a whole model after full fine-tuning.
        backbone: where the backbone is now, if not where the folder says.
        options: `checkpoint_path` and `pretrained` of `create_backbone`, for a backbone that needs them.

    Raises:
        InputError: a whole model was given a backbone.
        CheckpointError: the folder is damaged or does not say which backbone it needs.
    """
    folder = require_folder(folder)
    manifest = open_folder(folder, KINDS, required=False)
    adapted, whole = (folder / CONFIG_NAME).exists(), (folder / "config.json").exists()
    if manifest is None and adapted and whole:
        raise CheckpointError(
            f"{folder} holds an adapter ({CONFIG_NAME}) and a whole model (config.json), and nothing says which is meant. "
            "Move one of them to a folder of its own."
        )
    if not adapted and not whole and (folder / KEPT[0]).is_dir():
        raise CheckpointError(f"{folder} holds a run that has not ended. Run the same command again to finish it.")
    if not adapted:
        if backbone is not None or any(options.values()):
            raise InputError(f"{folder} holds a whole model, which takes no other backbone or weights. Leave them out.")
        return create_backbone(folder).eval()
    extra = (manifest or {}).get("extra") or {}
    spec = extra.get("backbone") or {}
    classes = extra.get("class_names") or []
    if backbone is None:
        if "name" not in spec:
            raise CheckpointError(f"{folder} does not say which backbone it was made for; pass backbone=.")
        name = spec["name"]
        backbone = folder / name if (folder / str(name)).is_dir() else name
    model = create_backbone(backbone, num_classes=len(classes) or None, **options, **spec.get("overrides", {}))
    info = dataclasses.replace(image_info(model), class_names=tuple(classes))
    model.__dict__["backbone_info"] = info
    if load_adapter(model, folder).config.modules_to_save:
        mark_trained(model)
    return model.eval()


def merge_error(prepared: Prepared) -> float | None:
    """Largest absolute difference of the validation logits between the attached and the merged adapter.

    The adapter is attached again afterwards. `None` when the method cannot be merged or there is no adapter.
    """
    adapter = prepared.adapter
    if adapter is None or not adapter.mergeable:
        return None
    images = torch.stack([prepared.val[i][0] for i in range(min(len(prepared.val), 64))])
    images = images.to(next(prepared.model.parameters()).device)
    before = _logits(prepared.model, images)
    adapter.merge()
    try:
        after = _logits(prepared.model, images)
    finally:
        adapter.unmerge()
    return float((before - after).abs().max())


def test_accuracy(prepared: Prepared) -> float | None:
    """Share of right answers on the test pictures, 0..1; `None` without a test split."""
    data = prepared.test
    if data is None:
        return None
    device, right = next(prepared.model.parameters()).device, 0
    for first in range(0, len(data), 32):
        part = range(first, min(first + 32, len(data)))
        answers = _logits(prepared.model, torch.stack([data[i][0] for i in part]).to(device)).argmax(-1).tolist()
        right += sum(answer == data.labels[i] for answer, i in zip(answers, part, strict=True))
    return right / len(data)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    training = model.training
    try:
        with torch.no_grad():
            return model.eval()(images)
    finally:
        model.train(training)
