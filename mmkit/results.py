"""Results: what pipelines return. All are looked at with `plot()` and written with `save(path)`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
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
    """A value as the content of an indented JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def figure_image(figure: Any) -> Image.Image:
    """A matplotlib figure as an RGB picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
