"""What a library of backbones must be able to do, and the classifier put on towers that have none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmkit.backbones.info import BackboneInfo, describe
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import read_json, read_tensors, write_json, write_safetensors


class Builder:
    """How the models of one library are built, read and written.

    Register a subclass under the library's name in `mmkit.registry.LIBRARIES`, or through the entry point group
    "mmkit.backbones"; `create_backbone("name:model")` then finds it. `library` is that name and the library's top package.
    """

    library = ""

    def build(self, name: str, pretrained: bool | str, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
        """The model called `name` with its info attached (`attach_info`). Raises `InputError`, `CheckpointError`."""
        raise NotImplementedError

    def describe(self, model: nn.Module) -> BackboneInfo:
        """The facts about a model of this library that was built elsewhere."""
        return describe(model, type(model).__name__)

    def example_input(self, model: nn.Module, batch_size: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments that make a `model` run that takes no pictures, or `None`."""
        return None

    def own_keys(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published weight file with the keys that `model` has here; the identity unless overridden."""
        return state

    def reads(self, config: dict[str, Any]) -> bool:
        """Whether a folder with this `config.json` holds a model of this library."""
        return False

    def open(
        self, folder: Path, config: dict[str, Any], num_classes: int | None, overrides: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model of a folder, still random, and the tensors to load into it."""
        raise NotImplementedError

    def config(self, model: nn.Module, info: BackboneInfo) -> dict[str, Any]:
        """What `config.json` must say so that the library itself, and `open`, can read the folder."""
        return {}

    def write(self, model: nn.Module, info: BackboneInfo, folder: Path) -> None:
        """Fill a new folder with everything `open` needs."""
        write_json(folder / "config.json", {"mmkit": dataclasses.asdict(info), **self.config(model, info)})
        write_safetensors(folder / "model.safetensors", model.state_dict())


class ClassifierOnTower(nn.Module):
    """A tower with a linear classifier on its pooled embedding: pictures -> (B, num_classes)."""

    def __init__(self, tower: nn.Module, num_features: int, num_classes: int):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(num_features, num_classes)
        self.num_features, self.num_classes = num_features, num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures -> (B, num_features)."""
        return pooled(self.tower(x))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures -> (B, num_classes)."""
        return self.head(self.forward_features(x))


def pooled(output: Any) -> Tensor:
    """One vector per picture, (B, D): of a tensor, of (embedding, tokens), or of a transformers output."""
    if hasattr(output, "last_hidden_state"):
        vector = getattr(output, "pooler_output", None)
        if vector is not None:
            return vector.flatten(1)
        x = output.last_hidden_state  # (B, N, D) tokens or a (B, D, H, W) map
        return x.mean(1) if x.dim() == 3 else x.mean((2, 3))
    return output[0] if isinstance(output, (tuple, list)) else output


def attach_info(model: nn.Module, info: BackboneInfo) -> nn.Module:
    """Set `model.backbone_info` without making it part of the state dict."""
    model.__dict__["backbone_info"] = info
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder: `model.safetensors`, the files its index lists, or an older `pytorch_model.bin`, read safely."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder: {names[:4]}.")
    elif not (folder / names[0]).is_file() and (folder / "pytorch_model.bin").is_file():
        names = ["pytorch_model.bin"]
    return {k: v for name in names for k, v in read_tensors(folder / name).items()}


def refused(name: str, settings: dict[str, Any], error: Exception) -> InputError:
    """The library would not build `name` with these settings."""
    text = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
    shown = ", ".join(f"{k}={v!r}" for k, v in settings.items())
    return InputError(f"{name} cannot be built with {shown or 'its default settings'}: {text}")


def unreachable(name: str, error: Exception, address: str = "") -> CheckpointError:
    """Weights that only the hub has; `address` of the file."""
    return CheckpointError(
        f"The weights of {name} could not be fetched ({type(error).__name__}): download {address or 'them'} on a machine with a "
        "network, put the file anywhere on this one, and pass checkpoint_path=FILE (--checkpoint FILE on the command line) "
        "instead of pretrained."
    )
