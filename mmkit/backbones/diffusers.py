"""Denoisers and autoencoders of diffusers: by class name, or from a folder that diffusers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.backbones.builder import Builder, attach_info, refused
from mmkit.backbones.info import BackboneInfo, describe
from mmkit.errors import InputError, nearest
from mmkit.lazy import library
from mmkit.storage import read_tensors


class DiffusersBuilder(Builder):
    """`create_backbone("diffusers:UNet2DModel", sample_size=8, ...)`; settings are those of the class."""

    library = "diffusers"

    def build(self, name: str, pretrained: bool | str, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
        diffusers = library("diffusers")

        cls = getattr(diffusers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
            endings = ("Model", "ModelMixin", "Transformer2DModel")
            models = [n for n in dir(diffusers) if n.endswith(endings) or n.startswith("Autoencoder")]
            raise InputError(f"diffusers has no model class {name!r}. {nearest(name, models)}")
        if pretrained or num_classes:
            raise InputError(f"diffusers:{name}: give a folder to load weights from; num_classes does not apply.")
        try:
            model = cls(**overrides)
        except Exception as error:
            raise refused(f"diffusers:{name}", overrides, error) from error
        return attach_info(model, describe(model, f"diffusers:{name}", overrides, heads=(), trained=False))

    def example_input(self, model: nn.Module, batch_size: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """For UNets, DiT, PixArt, SD3 and autoencoders, from their configuration."""
        make = _EXAMPLES.get(type(model).__name__)
        if make is None:
            return None
        p = next(model.parameters())
        inputs = make(model.config, batch_size)
        return (), {k: v.to(p.device, p.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    def reads(self, config: dict[str, Any]) -> bool:
        return isinstance(config.get("_class_name"), str)

    def open(
        self, folder: Path, config: dict[str, Any], num_classes: int | None, overrides: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        settings = {k: v for k, v in config.items() if not k.startswith("_") and k != "mmkit"}
        model = self.build(config["_class_name"], False, num_classes, {**settings, **overrides})
        return model, read_tensors(folder / "diffusion_pytorch_model.safetensors")

    def write(self, model: nn.Module, info: BackboneInfo, folder: Path) -> None:
        model.save_pretrained(folder)


def _side(config: Any) -> tuple[int, int]:
    side = config.sample_size or 32
    return (side, side) if isinstance(side, int) else tuple(side)


def _pictures(config: Any, b: int) -> Tensor:
    return torch.zeros(b, config.in_channels, *_side(config))


def _steps(b: int) -> Tensor:
    return torch.zeros(b, dtype=torch.long)


def _conditioned(config: Any, b: int) -> dict[str, Tensor]:
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) else width
    inputs = {"sample": _pictures(config, b), "timestep": _steps(b), "encoder_hidden_states": torch.zeros(b, 4, width)}
    classes = config.num_class_embeds is not None or config.class_embed_type is not None
    return inputs | ({"class_labels": _steps(b)} if classes else {})


_EXAMPLES = {
    "UNet2DModel": lambda c, b: {
        "sample": _pictures(c, b),
        "timestep": _steps(b),
        **({"class_labels": _steps(b)} if c.num_class_embeds is not None or c.class_embed_type is not None else {}),
    },
    "UNet2DConditionModel": _conditioned,
    "DiTTransformer2DModel": lambda c, b: {
        "hidden_states": _pictures(c, b),
        "timestep": _steps(b),
        "class_labels": _steps(b),
    },
    "PixArtTransformer2DModel": lambda c, b: {
        "hidden_states": _pictures(c, b),
        "timestep": _steps(b),
        "encoder_hidden_states": torch.zeros(b, 4, c.caption_channels or c.cross_attention_dim),
    },
    "SD3Transformer2DModel": lambda c, b: {
        "hidden_states": _pictures(c, b),
        "timestep": _steps(b),
        "encoder_hidden_states": torch.zeros(b, 4, c.joint_attention_dim),
        "pooled_projections": torch.zeros(b, c.pooled_projection_dim),
    },
    "AutoencoderKL": lambda c, b: {"sample": _pictures(c, b)},
    "VQModel": lambda c, b: {"sample": _pictures(c, b)},
}
