"""Backbones: one way to create, describe, save and restore image models of timm, open_clip and diffusers."""

from mmkit.backbones.create import create_backbone, save_backbone
from mmkit.backbones.info import BackboneInfo, backbone_info, head_name

__all__ = ["BackboneInfo", "backbone_info", "create_backbone", "head_name", "save_backbone"]
