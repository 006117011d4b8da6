"""Vision models of transformers: by model type, by class name, or from a folder that transformers wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.backbones.builder import Builder, ClassifierOnTower, attach_info, read_weights, refused
from mmkit.backbones.info import BackboneInfo, ImageBackboneInfo, describe, per_channel
from mmkit.errors import CheckpointError, InputError, MMKitError, nearest
from mmkit.lazy import library
from mmkit.storage import read_json, read_tensors, write_json, write_safetensors

logger = logging.getLogger(__name__)

_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "sam": "sam_vision_model"}
"""Model types with several towers -> the type of the visual one."""
_PROCESSORS = {v: k for k, v in _TOWERS.items()} | {"dinov2_with_registers": "dinov2", "dinov3_convnext": "dinov3_vit"}
"""Types without an image processor of their own -> the type whose processor they use."""
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_HEAD_FILE = "classifier.safetensors"


class ImageClassifier(nn.Module):
    """A classification model of transformers that takes pictures and returns logits."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.num_classes: int = model.config.num_labels

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, C, H, W), or clips (B, T, C, H, W) for a video model -> (B, num_classes)."""
        return self.model(pixel_values=pixel_values)[0]  # without labels there is no loss before the logits


class TransformersBuilder(Builder):
    """`create_backbone("transformers:dinov2", num_classes=5, num_hidden_layers=6)`; settings are those of its configuration.

    With `num_classes` the model returns logits: through the library's own classification class where there is one, else
    through a linear classifier on the pooled output. Without it the library's own object is returned.
    """

    library = "transformers"

    def build(self, name: str, pretrained: bool | str, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
        if pretrained:
            raise InputError(
                f"transformers:{name} names an architecture. Download a model and give its folder instead."
            )
        cls = _class(name, bool(num_classes))
        config = cls.config_class()
        _set(config, overrides)
        if num_classes:
            config.num_labels = num_classes
        try:
            model = cls(config)
        except Exception as error:
            raise refused(f"transformers:{name}", overrides, error) from error
        return _finish(model, num_classes, _default_processor(config.model_type), overrides, trained=False)

    def describe(self, model: nn.Module) -> BackboneInfo:
        if getattr(model, "main_input_name", "") != "pixel_values":
            return super().describe(model)
        return _describe(model, model, _default_processor(model.config.model_type))

    def own_keys(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Files of transformers, also older ones and those of a larger or smaller class: it translates the names itself."""
        prefix = _prefix(model)
        if prefix and all(k in model.state_dict() for k in state):
            return state
        inner: Any = model.get_submodule(prefix[:-1]) if prefix else model
        if hasattr(inner, "vision_model") and not any("vision_model." in k for k in state):
            state = {f"vision_model.{k}": v for k, v in state.items()}  # a file of the visual tower alone
        with _quiet():
            filled, report = type(inner).from_pretrained(
                None,
                config=inner.config,
                state_dict=dict(state),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        wrong_size, missing = {key for key, *_ in report["mismatched_keys"]}, set(report["missing_keys"])
        base = inner.base_model_prefix
        beside = {k for k in missing if hasattr(inner, base) and k.partition(".")[0] != base}
        heads = tuple(f"{name}." for name in _classifiers(inner))
        if any(k.startswith(heads) for k in beside):
            # a file of the bare model: what the class adds beside its classifier (a norm) starts fresh with it
            missing -= {k for k in beside if not k.startswith(heads)}
        known = {k: v for k, v in filled.state_dict().items() if k not in missing | wrong_size}
        known |= {k: state[k] for k in wrong_size if k in state}
        parts = {name for name, _ in inner.named_children()}
        left = {k for k in report["unexpected_keys"] if k.partition(".")[0] not in parts}
        if left:  # the other towers, decoders and heads of a larger model
            names = sorted({k.partition(".")[0] for k in left})
            logger.warning(
                "%d tensors belong to parts that %s does not have: %s", len(left), type(inner).__name__, names
            )
        known |= {k: state[k] for k in report["unexpected_keys"] - left}
        return {f"{prefix}{k}": v for k, v in known.items()}

    def reads(self, config: dict[str, Any]) -> bool:
        return isinstance(config.get("model_type"), str)

    def open(
        self, folder: Path, config: dict[str, Any], num_classes: int | None, overrides: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        written = str(next(iter(config.get("architectures") or ()), ""))
        ours, head = config.get("mmkit"), folder / _HEAD_FILE
        classifies = "Classification" in written or head.is_file()
        if num_classes is None and isinstance(ours, dict) and head.is_file():
            num_classes = ours.get("num_classes")
        whole = num_classes is None and classifies
        cls = _class(written if whole else config["model_type"], bool(num_classes) or whole)
        if config.get("use_pretrained_backbone"):
            raise CheckpointError(
                f"{folder}/config.json asks for weights from the hub (use_pretrained_backbone). Set it to false."
            )
        try:
            theirs = cls.config_class.from_pretrained(folder, local_files_only=True)
            _set(theirs, overrides)
            if num_classes:
                theirs.num_labels = num_classes
            classes = theirs.num_labels if whole else num_classes
            model = _finish(cls(theirs), classes, _read_processor(folder, config), overrides, trained=True)
        except MMKitError:
            raise
        except Exception as error:
            raise CheckpointError(f"The JSON files of {folder} do not make a {cls.__name__}: {error}") from error
        state = self.own_keys(model, read_weights(folder))
        return model, state | (read_tensors(head) if head.is_file() and isinstance(model, ClassifierOnTower) else {})

    def write(self, model: nn.Module, info: BackboneInfo, folder: Path) -> None:
        """As transformers writes it, with our facts in `config.json` and a classifier of ours in a file beside."""
        prefix = _prefix(model)
        inner = model.get_submodule(prefix[:-1]) if prefix else model
        if isinstance(info, ImageBackboneInfo) and len(info.class_names) == inner.config.num_labels:
            inner.config.id2label = dict(enumerate(info.class_names))
            inner.config.label2id = {name: i for i, name in enumerate(info.class_names)}
        with _quiet():
            inner.save_pretrained(folder)
        write_json(folder / "config.json", {**read_json(folder / "config.json"), "mmkit": dataclasses.asdict(info)})
        if isinstance(model, ClassifierOnTower):
            write_safetensors(folder / _HEAD_FILE, {f"head.{k}": v for k, v in model.head.state_dict().items()})
        if isinstance(info, ImageBackboneInfo):
            write_json(folder / "preprocessor_config.json", _processor_config(info))


def _prefix(model: nn.Module) -> str:
    """Where the library's own object sits in what we return."""
    return {ImageClassifier: "model.", ClassifierOnTower: "tower."}.get(type(model), "")


# --- which class, which configuration ----------------------------------------------------------------------------------


def _class(name: str, classify: bool) -> Any:
    """The class behind a model type ("vit") or a class name. Raises `InputError` with the nearest names."""
    transformers = library("transformers")
    from transformers.models.auto import modeling_auto as auto

    if name[:1].isupper():
        cls = getattr(transformers, name, None)
    else:
        tower = _TOWERS.get(name, name)
        tables: list[Any] = [auto.MODEL_MAPPING_NAMES]
        if classify:
            tables = [
                auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
                auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
                *tables,
            ]
        found = next(
            (t[n] for t in tables for n in ((name, tower) if t is not tables[-1] else (tower,)) if n in t), None
        )
        cls = getattr(transformers, found if isinstance(found, str) else found[0], None) if found else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        types = {*auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *_TOWERS, *_PROCESSORS, "videomae", "dinov3_vit"}
        classes = [n for n in dir(transformers) if n.endswith(("Model", "ForImageClassification"))]
        raise InputError(
            f"transformers has no model {name!r}. {nearest(name, classes if name[:1].isupper() else types)}"
        )
    if cls.__name__.startswith("TimmWrapper"):
        raise InputError(
            f"transformers:{name} wraps a timm model; give that model's own name, such as 'timm:resnet18'."
        )
    model: Any = cls
    if model.main_input_name != "pixel_values" or "spatial_shapes" in inspect.signature(model.forward).parameters:
        raise InputError(
            f"transformers:{name} does not take pictures alone (its first input is {model.main_input_name!r})."
        )
    return model


def _visual(config: Any) -> Any:
    """The configuration of the visual part, where a model has several."""
    return getattr(config, "vision_config", config)


def _set(config: Any, settings: dict[str, Any]) -> None:
    """Set known settings in place, checked by the library. Raises `InputError` for unknown or impossible ones."""
    if not settings:
        return
    visual = _visual(config)
    known = visual.to_dict()
    unknown = sorted(k for k in settings if k not in known)
    if unknown:
        raise InputError(f"{type(visual).__name__} has no setting {unknown[0]!r}. {nearest(unknown[0], known)}")
    default, derived = type(visual)().to_dict(), ("transformers_version", "out_features", "out_indices", "stage_names")
    stated = {k: v for k, v in known.items() if k not in derived and v != default.get(k)}
    try:
        new = type(visual)(**{**stated, **settings})
    except Exception as error:
        raise refused(type(visual).__name__, settings, error) from error
    visual.__dict__.update(new.__dict__)


# --- what is known about the model ---------------------------------------------------------------------------------------


def _finish(
    model: nn.Module, num_classes: int | None, processor: dict[str, Any], overrides: dict[str, Any], *, trained: bool
) -> nn.Module:
    """Wrap a model that is to return logits, and attach its info."""
    inner, outer = model, model
    if num_classes and "Classification" in type(model).__name__:
        outer = ImageClassifier(model)
    elif num_classes:
        outer = ClassifierOnTower(model, _num_features(model), num_classes)
    return attach_info(outer, _describe(outer, inner, processor, overrides=overrides, trained=trained))


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """The classifiers of a classification class; distilled models have two."""
    if "Classification" not in type(model).__name__:
        return ()
    children = {n: c for n, c in model.named_children() if n.endswith(("classifier", "head", "fc"))}
    return tuple(n for n, c in children.items() if any(True for _ in c.parameters()))


def _num_features(model: nn.Module) -> int:
    """Width of what the classifier reads (DINOv2's reads two vectors), else of the pooled output."""
    for head in _classifiers(model):
        for module in model.get_submodule(head).modules():
            if isinstance(module, nn.Linear):
                return module.in_features
    config = _visual(model.config)
    widths = getattr(config, "hidden_sizes", None)
    return int(
        getattr(config, "output_channels", None) or (widths[-1] if widths else getattr(config, "hidden_size", 0))
    )


def _describe(outer: nn.Module, inner: nn.Module, processor: dict[str, Any], **known: Any) -> BackboneInfo:
    config, prefix = _visual(inner.config), _prefix(outer)
    classes = getattr(outer, "num_classes", inner.config.num_labels if "Classification" in type(inner).__name__ else 0)
    labels = tuple((inner.config.id2label or {}).values())
    named = len(labels) == classes and not all(str(v).startswith("LABEL_") for v in labels)
    facts = _preprocessing(processor, getattr(config, "num_channels", 3), getattr(config, "image_size", None))
    heads = ("head",) if prefix == "tower." else tuple(f"{prefix}{name}" for name in _classifiers(inner))
    return describe(
        outer, f"transformers:{type(inner).__name__}", **known, **facts, **_patches(inner, config), heads=heads,
        num_features=_num_features(inner), num_frames=int(getattr(config, "num_frames", 0) or 0), num_classes=classes,
        class_names=labels if named else (),
    )  # fmt: skip


def _patches(model: nn.Module, config: Any) -> dict[str, Any]:
    """Grid and prefix tokens of models that keep one resolution."""
    size, patch = _pair(getattr(config, "image_size", None)), _pair(getattr(config, "patch_size", None))
    if not size or not patch or hasattr(config, "depths"):
        return {}
    tokens = any(n.endswith(("cls_token", "class_embedding")) for n, _ in model.named_parameters())
    return {
        "grid": (size[0] // patch[0], size[1] // patch[1]),
        "num_prefix_tokens": int(tokens) + int(getattr(config, "num_register_tokens", 0) or 0),
    }


def _pair(value: Any) -> tuple[int, int] | None:
    return (value, value) if isinstance(value, int) else tuple(value) if value else None


# --- preprocessing -----------------------------------------------------------------------------------------------------------


def _default_processor(model_type: str) -> dict[str, Any]:
    """Settings of the image processor that goes with a model type; empty when there is none."""
    transformers = library("transformers")
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as names

    backends = names.get(_PROCESSORS.get(model_type, model_type)) or {}
    cls = next((getattr(transformers, backends[b], None) for b in ("torchvision", "pil") if b in backends), None)
    return cls().to_dict() if cls else {}


def _read_processor(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The folder's own image processor, else the default of its model type."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            saved = read_json(folder / name)
            saved = saved.get(key) if key else saved
            if isinstance(saved, dict):
                return saved | {"stated": True}
    return _default_processor(config["model_type"])


def _preprocessing(processor: dict[str, Any], channels: int, image_size: Any) -> dict[str, Any]:
    """An image processor's settings as ours. A folder's processor decides the size, else the model's configuration."""
    factor = 255 * (processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 255.0
    normalised = processor.get("do_normalize", True) and processor.get("image_mean") is not None
    mean, std = (
        (processor["image_mean"], processor["image_std"]) if normalised else ((0.0,) * channels, (1.0,) * channels)
    )
    size, crop_pct, crop_mode = _geometry(processor, _pair(image_size) or (224, 224))
    if not processor.get("stated") and image_size:
        size = _pair(image_size) or size
    return {
        "input_size": (channels, *size),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": _RESAMPLING[int(processor.get("resample", 3))],
        "mean": per_channel([v / factor for v in mean], channels),
        "std": per_channel([v / factor for v in std], channels),
    }


def _geometry(processor: dict[str, Any], fallback: tuple[int, int]) -> tuple[tuple[int, int], float, str]:
    """((H, W), crop_pct, crop_mode) of an image processor."""
    size, crop = processor.get("size") or {}, processor.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    target = _edges(crop) if processor.get("do_center_crop") and crop else None
    if "height" in size:
        edges = (size["height"], size["width"])
        if target and edges[0] * target[1] != edges[1] * target[0]:
            logger.warning(
                "resize %s with crop %s: one crop_pct cannot say it; that of the height is taken", edges, target
            )
        return target or edges, _share(target[0], edges[0]) if target else 1.0, "squash"
    if "longest_edge" in size:
        edge = size["longest_edge"]
        return _edges(processor.get("pad_size")) or (edge, edge), 1.0, "pad"
    edge = size.get("shortest_edge")
    if edge and processor.get("crop_pct"):  # ConvNeXt's processor: small pictures are cropped, large ones squashed
        return (edge, edge), processor["crop_pct"] if edge < 384 else 1.0, "center" if edge < 384 else "squash"
    target = target or fallback
    return target, _share(min(target), edge) if edge else 1.0, "center"


def _edges(size: Any) -> tuple[int, int] | None:
    return (size["height"], size["width"]) if isinstance(size, dict) else _pair(size)


def _share(inner: int, outer: int) -> float:
    """crop_pct that makes a transform resize to exactly `outer` before it crops to `inner`."""
    share = inner / outer
    while math.floor(inner / share) < outer:
        share = math.nextafter(share, 0.0)
    return share


def _processor_config(info: ImageBackboneInfo) -> dict[str, Any]:
    """`preprocessor_config.json` in the vocabulary of the CLIP processor (SAM's where the picture is padded)."""
    height, width = info.input_size[-2:]
    outer = [math.floor(side / info.crop_pct) for side in (height, width)]
    edges = {"height": outer[0], "width": outer[1]}
    size = {"center": {"shortest_edge": min(outer)}, "squash": edges}.get(info.crop_mode, {"longest_edge": max(outer)})
    padded = {"do_pad": True, "pad_size": {"height": height, "width": width}}
    cropped = {
        "do_center_crop": info.crop_mode == "center" or outer != [height, width],
        "crop_size": {"height": height, "width": width},
    }
    return {
        "image_processor_type": "SamImageProcessor" if "longest_edge" in size else "CLIPImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": size, "resample": _RESAMPLING.index(info.interpolation),
        **(padded if "longest_edge" in size else cropped),
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(info.mean), "image_std": list(info.std),
    }  # fmt: skip


# --- files ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and load reports: what differs is reported by us."""
    from transformers.utils import logging as theirs

    before, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):  # a model built only to translate names must not move the caller's seed
            yield
    finally:
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()
