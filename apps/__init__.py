"""The studio: pages in the browser over the same public functions as the Python API. Needs `pip install "mmkit[apps]"`."""

from __future__ import annotations

import os

from mmkit.errors import BackendUnavailableError

os.environ.setdefault(
    "GRADIO_ANALYTICS_ENABLED", "False"
)  # read when gradio is imported: no telemetry, no version check

try:
    import gradio as _gradio  # noqa: F401
except ImportError as error:
    raise BackendUnavailableError('The studio needs gradio: pip install "mmkit[apps]"') from error

from mmkit.apps.frame import App, build_studio
from mmkit.apps.handlers import readable
from mmkit.apps.server import launch_studio
from mmkit.apps.sessions import output_folder

__all__ = ["App", "build_studio", "launch_studio", "output_folder", "readable"]
