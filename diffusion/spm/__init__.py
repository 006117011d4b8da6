"""Concept erasure: SPM, membranes of one dimension that keep concepts out of a text-to-image model, with ESD and UCE beside it.

Lyu et al., "One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications", arXiv 2312.16145 (CVPR 2024).
`erase(pipeline, "snoopy", keep=["a dog"])` for any diffusers pipeline.
"""

from typing import TYPE_CHECKING

from mmkit.lazy import door

if TYPE_CHECKING:
    from mmkit.diffusion.spm.adapter import SPM as SPM, Membrane as Membrane, SPMConfig as SPMConfig
    from mmkit.diffusion.spm.clip_score import ClipScorer as ClipScorer
    from mmkit.diffusion.spm.closed_form import closed_form_edit as closed_form_edit
    from mmkit.diffusion.spm.erasing import Erasure as Erasure, erase as erase
    from mmkit.diffusion.spm.evaluation import SceneRates as SceneRates, scene_rates as scene_rates
    from mmkit.diffusion.spm.losses import (
        anchoring_loss as anchoring_loss,
        erasing_loss as erasing_loss,
        gaussian_anchors as gaussian_anchors,
    )
    from mmkit.diffusion.spm.modular import TransportDenoise as TransportDenoise, transport as transport
    from mmkit.diffusion.spm.official import (
        composed as composed,
        export_lora as export_lora,
        load_lora as load_lora,
        load_official_checkpoint as load_official_checkpoint,
        save_official_checkpoint as save_official_checkpoint,
    )
    from mmkit.diffusion.spm.permeability import (
        cosine_scores as cosine_scores,
        gate as gate,
        scores as scores,
        token_scores as token_scores,
    )
    from mmkit.diffusion.spm.pipeline import ConceptEraser as ConceptEraser
    from mmkit.diffusion.spm.prompts import (
        expand_prompts as expand_prompts,
        scene_attribute as scene_attribute,
        scene_guidance as scene_guidance,
        scene_keep as scene_keep,
        scene_phrases as scene_phrases,
        scene_recipe as scene_recipe,
        scene_superclass as scene_superclass,
        scene_surrogate as scene_surrogate,
        scene_templates as scene_templates,
    )
    from mmkit.diffusion.spm.training import EraseConfig as EraseConfig, SPMTrainer as SPMTrainer
    from mmkit.diffusion.spm.uce import (
        Pair as Pair,
        Text as Text,
        UCEConfig as UCEConfig,
        cross_attention as cross_attention,
        differences as differences,
        directions as directions,
        edit as edit,
        kept_rows as kept_rows,
        pair_of as pair_of,
        save_edited_weights as save_edited_weights,
        text_projections as text_projections,
    )

__getattr__, __dir__, __all__ = door(__name__)
