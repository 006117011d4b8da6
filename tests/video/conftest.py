"""Fixtures of the video tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def clips() -> ModuleType:
    """The helper module beside this file."""
    spec = importlib.util.spec_from_file_location("video_clips", Path(__file__).parent / "clips.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
