"""Results: what pipelines return. All are looked at with `plot()` and written with `save(path)`."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.errors import InputError
from mmkit.storage import atomic_write
from mmkit.storage.files import expanded


class Result:
    """Base of all results. Subclasses implement `plot` and list the formats they can be written in."""

    def plot(self) -> Image.Image:
        """What a person wants to see, as an RGB picture."""
        raise NotImplementedError

    def formats(self) -> dict[str, Callable[[], bytes]]:
        """For each suffix, in lower case, a function that gives the file's content."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result as the suffix of `path` says, in upper or lower case, whole or not at all.

        Args:
            path: its suffix must be one of `formats()`; a missing folder is made.

        Returns:
            The path.

        Raises:
            InputError: another suffix.
        """
        path = expanded(path)
        formats = self.formats()
        suffix = max((s for s in formats if path.name.lower().endswith(s)), key=len, default=None)
        if suffix is None:
            raise InputError(
                f"A {type(self).__name__} cannot be saved as {path.name!r}: the suffix must be {' or '.join(formats)}."
            )
        content = formats[suffix]()
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
        return path


def png(image: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def json_text(value: Any) -> bytes:
    """A value as the content of an indented JSON file; numbers that are not finite, which JSON cannot say, are null."""
    return (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def chart_text(name: str, longest: int = 60) -> str:
    """A name of the user's as a chart shows it: no formula of `$`, in the legend although it begins with `_`, one line."""
    text = " ".join(name.encode("utf-8", "replace").decode().split())
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def figure_image(figure: Any) -> Image.Image:
    """A matplotlib figure as an RGB picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
