"""Backbones: one way to create, describe, save and restore models of timm, open_clip, transformers and diffusers."""

from mmkit.backbones.builder import Builder
from mmkit.backbones.bundled import load_weights
from mmkit.backbones.create import create_backbone, save_backbone
from mmkit.backbones.info import (
    BackboneInfo,
    ImageBackboneInfo,
    backbone_info,
    example_input,
    head_names,
    head_scopes,
    image_info,
    mark_trained,
    randomness,
    warn_if_random,
)

__all__ = [
    "BackboneInfo",
    "Builder",
    "ImageBackboneInfo",
    "backbone_info",
    "create_backbone",
    "example_input",
    "head_names",
    "head_scopes",
    "image_info",
    "load_weights",
    "mark_trained",
    "randomness",
    "save_backbone",
    "warn_if_random",
]
