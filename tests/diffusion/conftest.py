"""A text-to-image pipeline with random weights, small enough for every test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))  # denoisers.py
sys.path.insert(0, str(Path(__file__).parent))  # tiny_text.py


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    from mmkit.diffusion import scenes, scenes_pipeline

    monkeypatch.setitem(scenes.TRANSFORMER, "num_layers", 1)
    torch.manual_seed(0)
    made = scenes_pipeline()
    made.transformer.eval(), made.text_encoder.eval()
    return made
