"""Fine-tune lab: adapt a backbone to your images with a few thousand parameters, and watch it happen."""

from __future__ import annotations

import gradio as gr

from mmkit.apps.frame import App


def build() -> None:
    """The page."""
    gr.Markdown("", elem_id="finetune-status")


APP = App(
    "finetune",
    "Fine-tune lab",
    "Adapt a backbone to your images with a few thousand parameters, and watch it happen.",
    build,
)
