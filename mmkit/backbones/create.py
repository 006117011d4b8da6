"""Create, save and restore backbones. The object returned is the library's own `nn.Module`: keys and behaviour stay its own."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmkit.backbones.info import BackboneInfo, ImageBackboneInfo, backbone_info, describe, image_info
from mmkit.backbones.model import create_model
from mmkit.errors import CheckpointError, InputError, nearest
from mmkit.storage import load_state, read_json, read_tensors, write_json, write_safetensors
from mmkit.weights import list_weights, load_tensors, weight_entry

logger = logging.getLogger(__name__)


def create_backbone(
    name: str | os.PathLike[str],
    checkpoint_path: str | os.PathLike[str] | None = None,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a backbone; it tells its preprocessing, grid, blocks and head as `model.backbone_info`.

    Args:
        name: "vit_small_patch16_224" or "timm:...", "open_clip:ViT-B-32" (the visual tower), "diffusers:UNet2DModel" (with its
            settings as keywords), "mmkit:tiny_vit" (bundled weights), or a folder written by `save_backbone`, timm or diffusers.
        checkpoint_path: a weight file to load. A classifier of another size stays fresh when `num_classes` is given; position
            embeddings of another image size are interpolated; both are logged. Anything else that differs is an error.
        pretrained: fetch the library's own weights from the hub (needs the network).
        num_classes: outputs of a classifier; `None` keeps the library's default (open_clip: no classifier).
        overrides: passed to the library's constructor.

    Raises:
        InputError: unknown name (the nearest are offered) or setting.
        CheckpointError: a wrong, partial or damaged weight file (its keys are listed), or the hub cannot be reached.
    """
    if num_classes is not None and num_classes < 0:
        raise InputError(f"num_classes must be at least 0, not {num_classes}.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        model = _from_folder(folder, num_classes, overrides)
    else:
        source, plain = split_name(str(name))
        model = _BUILDERS[source](plain, pretrained, num_classes, overrides)
    if checkpoint_path is not None:
        load_backbone_state(
            model, read_tensors(checkpoint_path), str(checkpoint_path), new_head=num_classes is not None
        )
    return model


def split_name(name: str) -> tuple[str, str]:
    """("timm", "vit_...") from "timm:vit_..." or from a bare name. Raises `InputError` with the nearest names."""
    source, colon, plain = name.partition(":")
    if colon:
        if source not in _BUILDERS:
            raise InputError(f"Unknown library {source!r} in {name!r}; known: {sorted(_BUILDERS)}.")
        return source, plain
    if name in list_weights():
        return "mmkit", name
    if os.sep in name or name.startswith("."):
        raise InputError(f"{name!r} is not a folder. Give a folder, or a model name such as 'vit_small_patch16_224'.")
    return "timm", name


def _build_timm(name: str, pretrained: bool, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
    import timm

    if name.partition(".")[0] not in timm.list_models():
        raise InputError(f"timm has no model {name!r}. {nearest(name, [*timm.list_models(), *list_weights()])}")
    kwargs = overrides if num_classes is None else {**overrides, "num_classes": num_classes}
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise InputError(f"timm:{name}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        raise _offline(f"timm:{name}", error) from error
    return _attach_info(model, describe(model, f"timm:{name}", kwargs))


def _build_open_clip(
    name: str, pretrained: bool | str, num_classes: int | None, overrides: dict[str, Any]
) -> nn.Module:
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None and "vision_cfg" not in overrides:
        raise InputError(f"open_clip has no model {name!r}. {nearest(name, open_clip.list_models())}")
    if pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        try:
            tower = open_clip.create_model(
                name, pretrained=pretrained if isinstance(pretrained, str) else tags[0]
            ).visual
        except Exception as error:
            raise _offline(f"open_clip:{name}", error) from error
    else:
        from open_clip.model import _build_vision_tower

        config = config or {"embed_dim": 512, "vision_cfg": {}}
        vision = {**config["vision_cfg"], **overrides.get("vision_cfg", {})}
        tower = _build_vision_tower(
            overrides.get("embed_dim", config["embed_dim"]), vision, config.get("quick_gelu", False)
        )
    size = tower.image_size if isinstance(tower.image_size, (tuple, list)) else (tower.image_size,) * 2
    facts: dict[str, Any] = {
        "mean": tuple(open_clip.OPENAI_DATASET_MEAN),
        "std": tuple(open_clip.OPENAI_DATASET_STD),
        "input_size": (3, *size),
        "num_prefix_tokens": 1 if hasattr(tower, "class_embedding") else 0,
        "grid": tuple(tower.grid_size) if hasattr(tower, "grid_size") else None,
    }
    model: nn.Module = tower
    if num_classes:
        model = ClassifierOnTower(tower, tower.output_dim, num_classes)
        facts.update(num_classes=num_classes)
    kwargs = overrides if num_classes is None else {**overrides, "num_classes": num_classes}
    return _attach_info(model, describe(model, f"open_clip:{name}", kwargs, **facts))


class ClassifierOnTower(nn.Module):
    """A visual tower with a linear classifier on its embedding: (B, 3, H, W) -> (B, num_classes)."""

    def __init__(self, tower: nn.Module, embed_dim: int, num_classes: int):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(embed_dim, num_classes)
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, embed_dim)."""
        return self.tower(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        return self.head(self.tower(x))


def _build_diffusers(name: str, pretrained: bool, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        models = [
            n
            for n in dir(diffusers)
            if n.endswith(("Model", "ModelMixin", "Transformer2DModel")) or n.startswith("Autoencoder")
        ]
        raise InputError(f"diffusers has no model class {name!r}. {nearest(name, models)}")
    if pretrained or num_classes:
        raise InputError(f"diffusers:{name}: give a folder to load weights from; num_classes does not apply.")
    try:
        model = cls(**overrides)
    except (TypeError, ValueError) as error:
        raise InputError(f"diffusers:{name}: {error}") from error
    return _attach_info(model, describe(model, f"diffusers:{name}", overrides))


def _build_bundled(name: str, pretrained: bool, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
    entry = weight_entry(name)
    settings = {**entry.config, **overrides, **({} if num_classes is None else {"num_classes": num_classes})}
    model = create_backbone(entry.model, **settings)
    known = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in entry.extra.items()
        if k in ImageBackboneInfo.__dataclass_fields__
    }
    load_backbone_state(model, load_tensors(name), f"bundled weights {name!r}", new_head=num_classes is not None)
    info = dataclasses.replace(image_info(model), name=f"mmkit:{name}", **known)
    if info.class_names and len(info.class_names) != info.num_classes:
        info = dataclasses.replace(info, class_names=())
    return _attach_info(model, info)


def load_weights(name: str) -> nn.Module:
    """Build the bundled model `name` (see `mmkit.list_weights`) with its trained weights, in eval mode on the CPU.

    Raises:
        InputError: unknown name.
        CheckpointError: the file is missing or damaged.
    """
    entry = weight_entry(name)
    if ":" in entry.model:
        return create_backbone(f"mmkit:{name}").eval()
    model = create_model(entry.model, **entry.config)
    load_state(model, load_tensors(name), source=str(entry.path))
    return model.eval()


_BUILDERS: dict[str, Any] = {
    "timm": _build_timm,
    "open_clip": _build_open_clip,
    "diffusers": _build_diffusers,
    "mmkit": _build_bundled,
}


def load_backbone_state(model: nn.Module, state: dict[str, Tensor], source: str, *, new_head: bool = False) -> None:
    """Load `state` strictly, except for what is logged: resized position embeddings and, with `new_head`, a head of another size.

    Raises `CheckpointError` listing missing, unexpected and misshapen keys; nothing is loaded then.
    """
    info = backbone_info(model)
    own = model.state_dict()
    state = dict(state)
    heads = tuple(f"{head}." for head in info.heads)
    if new_head and heads:
        ours = {k: v for k, v in own.items() if k.startswith(heads)}
        theirs = {k: v for k, v in state.items() if k.startswith(heads)}
        if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
            logger.warning("%s: the classifier has other classes; it starts untrained", source)
            state = {k: v for k, v in state.items() if k not in theirs} | ours
    for key in [k for k in state if k.endswith("pos_embed") and k in own and state[k].shape != own[k].shape]:
        state[key] = _resize_pos_embed(state[key], own[key], info, key, source)
    buffers = {
        k
        for k, _ in model.named_buffers()
        if k in own and k not in state and k.endswith(("relative_position_index", "attn_mask"))
    }
    load_state(model, state, source=source, ignore=tuple(buffers))


def _resize_pos_embed(theirs: Tensor, ours: Tensor, info: ImageBackboneInfo, key: str, source: str) -> Tensor:
    prefix = info.num_prefix_tokens if theirs.dim() == 3 else 0
    patches = theirs.shape[1] - prefix if theirs.dim() == 3 else 0
    if info.grid is None or theirs.shape[-1] != ours.shape[-1] or patches < 1 or int(patches**0.5) ** 2 != patches:
        return theirs  # load_state will name the mismatch
    from timm.layers import resample_abs_pos_embed

    logger.warning("%s: %s is interpolated from a %d-token to a %s grid", source, key, patches, info.grid)
    return resample_abs_pos_embed(theirs, list(info.grid), num_prefix_tokens=prefix)


def save_backbone(model: nn.Module, folder: str | os.PathLike[str], *, class_names: tuple[str, ...] = ()) -> Path:
    """Write `config.json` (architecture, settings, preprocessing, class names) and `model.safetensors`.

    `create_backbone(folder)` restores the model with its preprocessing; for timm models `timm.create_model("local-dir:FOLDER")`
    reads the same folder. Attached adapters are not saved here: merge them first, or use `save_adapter`.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save the model in.")
    adapters = model.__dict__.get("_mmkit_adapters")
    if adapters and (live := adapters.live()):
        raise InputError(
            f"Adapters {live} are attached and would be lost; call adapter.merge() or adapter.detach() first."
        )
    info = backbone_info(model)
    if class_names:
        info = dataclasses.replace(info, class_names=tuple(class_names))
    config: dict[str, Any] = {"mmkit": dataclasses.asdict(info)}
    if info.name.startswith(("timm:", "mmkit:")) and hasattr(model, "pretrained_cfg"):
        settings = {k: v for k, v in _timm_overrides(info).items() if k != "num_classes"}
        config.update(
            architecture=_timm_architecture(info).partition(".")[0],
            num_classes=info.num_classes,
            num_features=getattr(model, "num_features", None),
            pretrained_cfg=info.preprocessing()
            | {"num_classes": info.num_classes, "classifier": model.pretrained_cfg.get("classifier")},
            model_args=settings,
        )
    write_safetensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", config)
    return folder


def _timm_architecture(info: BackboneInfo) -> str:
    source, name = info.name.split(":", 1)
    return weight_entry(name).model.partition(":")[2] if source == "mmkit" else name


def _timm_overrides(info: BackboneInfo) -> dict[str, Any]:
    return info.overrides


def _from_folder(folder: Path, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
    config = read_json(folder / "config.json")
    if "mmkit" in config:
        try:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in config["mmkit"].items() if k != "head"}
            saved = ImageBackboneInfo(**values)
        except TypeError as error:
            raise CheckpointError(f"{folder}/config.json is not one that save_backbone writes: {error}") from error
        source, name = split_name(saved.name)
        if source == "mmkit":
            source, name = "timm", _timm_architecture(saved)
        settings = {**saved.overrides, **overrides}
        classes = settings.pop("num_classes", None) if num_classes is None else num_classes
        settings.pop("num_classes", None)
        model = _BUILDERS[source](name, False, classes, settings)
        keep = {f: getattr(saved, f) for f in ("mean", "std", "interpolation", "crop_pct")}
        if num_classes is None:
            keep["class_names"] = saved.class_names
        _attach_info(model, dataclasses.replace(backbone_info(model), **keep))
    elif "architecture" in config:
        classes = config.get("num_classes") if num_classes is None else num_classes
        model = _build_timm(config["architecture"], False, classes, {**config.get("model_args", {}), **overrides})
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in config.get("pretrained_cfg", {}).items()}
        keep = {k: cfg[k] for k in ("mean", "std", "interpolation", "crop_pct") if k in cfg}
        _attach_info(model, dataclasses.replace(backbone_info(model), **keep))
    elif "_class_name" in config:
        settings = {k: v for k, v in config.items() if not k.startswith("_")}
        model = _build_diffusers(config["_class_name"], False, None, {**settings, **overrides})
        file = folder / "diffusion_pytorch_model.safetensors"
        load_state(model, read_tensors(file), source=str(file))
        return model
    else:
        raise CheckpointError(
            f"{folder}/config.json names no architecture; expected a folder of save_backbone, timm or diffusers."
        )
    file = folder / "model.safetensors"
    load_backbone_state(model, read_tensors(file), str(file), new_head=num_classes is not None)
    return model


def _attach_info(model: nn.Module, info: BackboneInfo) -> nn.Module:
    model.__dict__["backbone_info"] = info
    return model


def _offline(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The weights of {name} could not be fetched ({type(error).__name__}). mmkit works offline: download them on a machine with a "
        "network and pass checkpoint_path=FILE, or use pretrained=False."
    )
