"""Backbones: one way to create, describe, save and restore image models of timm, open_clip and diffusers."""

from mmkit.backbones.create import create_backbone, load_weights, save_backbone
from mmkit.backbones.info import (
    BackboneInfo,
    ImageBackboneInfo,
    backbone_info,
    example_input,
    head_name,
    head_names,
    head_scopes,
    image_info,
)

__all__ = [
    "BackboneInfo",
    "ImageBackboneInfo",
    "backbone_info",
    "create_backbone",
    "example_input",
    "head_name",
    "head_names",
    "head_scopes",
    "image_info",
    "load_weights",
    "save_backbone",
]
