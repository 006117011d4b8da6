"""Around the handlers of the pages: errors become messages, fields say their name, uploaded files become pictures."""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
import math
import re
import traceback
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from mmkit.apps.sessions import visitor, workspace
from mmkit.apps.visitors import stop_if_left
from mmkit.data.images import load_image
from mmkit.errors import InputError, MMKitError


def plain(text: object) -> str:
    """A name or message as text in HTML and in Markdown: nothing in it is a tag, a link, a picture or a formula."""
    return "".join(c if c.isalnum() or c in " ,-()" else f"&#{ord(c)};" for c in str(text))


def moved(*controls: Any) -> list[Any]:
    """Triggers for what a person does to sliders and choices, their reset buttons included; what a handler sets does not count.

    A handler that sets several controls with `change` listeners starts several runs at once; which answer stays on the page is then
    luck. Chain the run to such a handler with `.then` instead.
    """
    return [event for c in controls for event in ((c.input, c.release) if isinstance(c, gr.Slider) else (c.input,))]


def readable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for event handlers (functions and generators): whatever goes wrong is shown as a message.

    What mmkit raises on purpose is told in its words, without folders of the server. Running out of memory is reported with a
    remedy. Anything else leaves its traceback in the terminal. The text is escaped, because gradio renders messages as HTML.
    A handler whose page was closed does not start, and a generator ends at its next step.

    `build_studio` puts it around every handler that does not have it.
    """
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def stream(*args: Any, **kwargs: Any) -> Any:
            page = visitor()
            try:
                stop_if_left(page)
                with contextlib.closing(fn(*args, **kwargs)) as steps:
                    for step in steps:
                        yield step
                        stop_if_left(page)
            except Exception as error:
                raise _explained(error) from error

        wrapped: Any = stream
    elif inspect.iscoroutinefunction(fn):
        wrapped = fn
    else:

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                stop_if_left(visitor())
                return fn(*args, **kwargs)
            except Exception as error:
                raise _explained(error) from error

        wrapped = call
    wrapped.is_readable = True
    return wrapped  # type: ignore[no-any-return]


def _explained(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, MMKitError):
        text = re.sub(re.escape(str(workspace().files)) + r"/[^/]*/", "", str(error))
    elif isinstance(error, MemoryError):
        text = "Out of memory: try a smaller model, image or batch size."
    else:
        traceback.print_exception(error)
        text = (
            f"Something broke in the studio ({type(error).__name__}); its terminal says more. Nothing of yours is lost."
        )
    return gr.Error(html.escape(text), duration=10, print_exception=False)


def wanted() -> Callable[[], None]:
    """A check for long work: call it between steps; it raises when the page that asked was closed."""
    return functools.partial(stop_if_left, visitor())


def number(
    name: str, value: Any, low: float, high: float, *, whole: bool = False, default: float | None = None
) -> float:
    """The number in a field. Raises `InputError` that names the field and its range; an empty one is `default` where there is one."""
    kind = "a whole number" if whole else "a number"
    try:
        found = float(value) if value not in (None, "") else default
    except (TypeError, ValueError):
        found = math.nan
    if found is None:
        raise InputError(f"{name} is empty. Give {kind} from {low:g} to {high:g}.")
    if not low <= found <= high or (whole and found != int(found)):
        raise InputError(f"{name} must be {kind} from {low:g} to {high:g}, not {str(value)[:40]}.")
    return int(found) if whole else found


def with_limit(image: Image.Image, pixels: int, what: str) -> Image.Image:
    """The picture itself. Raises `InputError` when it has more pixels than `what` can do in reasonable time."""
    if image.width * image.height > pixels:
        raise InputError(
            f"The picture has {image.width} x {image.height} = {image.width * image.height / 1e6:.0f} million pixels; {what} takes up "
            f"to {pixels / 1e6:g} million. Crop it or make it smaller first."
        )
    return image


def protect(studio: gr.Blocks) -> None:
    """Every handler is `readable`, every field refuses by its name, every picture is read by mmkit."""
    for fn in studio.fns.values():
        leaving = any(event == "unload" for _, event in fn.targets)  # runs when nobody listens any more
        if fn.fn is not None and not leaving and not hasattr(fn.fn, "is_readable"):
            fn.fn = readable(fn.fn)
    for block in studio.blocks.values():
        if isinstance(block, gr.components.Component) and not hasattr(block, "is_template"):
            block.__class__ = _named(type(block))


@functools.cache
def _named(kind: type[Any]) -> type[Any]:
    """`kind`, whose refusals say the label of the field. Gradio builds components anew while it runs, from their class."""
    read = _read_picture if kind is gr.Image else kind.preprocess

    def preprocess(self: Any, payload: Any) -> Any:
        label = html.escape(str(getattr(self, "label", None) or "A field"))
        try:
            return read(self, payload)
        except gr.Error as error:
            raise gr.Error(f"{label}: {error.message}", print_exception=False) from error
        except InputError as error:
            raise gr.Error(f"{label}: {html.escape(str(error))}", print_exception=False) from error
        except Exception as error:
            value = html.escape(repr(payload)[:60])
            raise gr.Error(f"{label}: {value} cannot be used here.", print_exception=False) from error

    # Not a class statement: gradio's metaclass would write a .pyi file beside this one.
    body = {"preprocess": preprocess, "is_template": True, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return ABCMeta.__new__(type(kind), kind.__name__, (kind,), body)


def _read_picture(block: gr.Image, payload: Any) -> Any:
    """What an uploaded picture becomes for a handler: read by `mmkit.data.load_image`, so that the size limit holds before decoding,
    16-bit, transparent and rotated pictures come out right, and an unreadable file is a message."""
    if payload is None or not payload.path or block.image_mode not in ("RGB", None):
        return gr.Image.preprocess(block, payload)
    try:
        image = load_image(payload.path)
    except InputError as error:
        raise InputError(str(error).replace(str(payload.path), payload.orig_name or "the file")) from error
    if block.type == "filepath":
        return payload.path
    return image if block.type == "pil" else np.asarray(image)
