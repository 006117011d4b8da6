"""The frame every page stands in: navigation, theme, home and about pages, and safe launch settings.

A page is one file with `APP = App(...)` and a line in `mmkit.registry.APPS`:

    def build() -> None:
        image = gr.Image(label="Picture", elem_id="my-image")
        ...

    APP = App("my", "My page", "One sentence that says what it does.", build)
"""

from __future__ import annotations

import functools
import html
import inspect
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import gradio as gr
import numpy as np
from PIL import Image

from mmkit import __version__
from mmkit.data.images import MAX_PIXELS, load_image
from mmkit.errors import InputError, MMKitError
from mmkit.registry import APPS

KEEP_SECONDS = 3600
"""Uploads and results are deleted this long after they were made."""

MAX_FILE_SIZE = "64mb"
"""Larger uploads are refused."""


Kept = TypeVar("Kept")


class Sessions(Generic[Kept]):
    """What the visitors have loaded, at most `limit`; the one unused for longest is put away. A page keeps only the key."""

    def __init__(self, limit: int = 24):
        self.limit = limit
        self._open: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, value: Kept) -> str:
        """Keep `value`; returns its key, which cannot be guessed."""
        key = secrets.token_hex(16)
        with self._lock:
            self._open[key] = value
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return key

    def get(self, key: str | None) -> Kept:
        """The value of `key`. Raises `InputError` when there is none (any more)."""
        with self._lock:
            if key is None or key not in self._open:
                raise InputError("Load a picture first." if not key else "This picture was put away; load it again.")
            self._open.move_to_end(key)
            return self._open[key]


@dataclass(frozen=True)
class App:
    """One page of the studio.

    Attributes:
        name: name in `mmkit.registry.APPS`, path of the page ("/name") and prefix of its elem_ids.
        title: shown in the navigation.
        summary: one or two sentences: what a person can do here.
        build: adds the components to the current page. It loads no model and touches no file.
        forget: called with the `gr.Request` of a visitor who closed the page, to drop what the server keeps for the session.
    """

    name: str
    title: str
    summary: str
    build: Callable[[], None]
    forget: Callable[[gr.Request], None] | None = None


def readable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for event handlers (functions and generators): what mmkit raises on purpose is shown as a message.

    The text is escaped, because gradio renders messages as HTML. Running out of memory is reported with a remedy. Anything
    else stays a plain "Error" in the page and a traceback in the terminal.
    """

    def explain(error: Exception) -> gr.Error:
        text = (
            str(error) if isinstance(error, MMKitError) else "Out of memory: try a smaller model, image or batch size."
        )
        return gr.Error(html.escape(text), duration=10, print_exception=False)

    caught = (MMKitError, MemoryError)
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def stream(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from fn(*args, **kwargs)
            except caught as error:
                raise explain(error) from error

        return stream

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except caught as error:
            raise explain(error) from error

    return call


def output_folder() -> Path:
    """A fresh folder under a random name for files handed to the browser. Folders older than an hour are removed."""
    root = Path(tempfile.gettempdir()) / "mmkit-studio"
    root.mkdir(mode=0o700, exist_ok=True)
    for old in root.iterdir():
        if old.is_dir() and time.time() - old.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=root))


def theme() -> gr.Theme:
    """The studio's look: gradio's Soft theme with the system's fonts, and small print that can be read."""
    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    ).set(
        block_border_width="1px",
        checkbox_border_color="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important;}
#segment-cutout img {background: repeating-conic-gradient(#8883 0 25%, transparent 0 50%) 0 0 / 20px 20px;}
.studio-cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px; margin-top: 12px;}
.studio-card {display: block; text-align: left; padding: 18px 20px; border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--background-fill-primary); color: var(--body-text-color); text-decoration: none !important;}
.studio-card:hover, .studio-card:focus {border-color: var(--color-accent);}
.studio-card b {display: block; font-size: 1.1em; margin-bottom: 6px;}
.studio-card span {color: var(--body-text-color-subdued);}
.studio-model {padding: 14px 2px; border-top: 1px solid var(--border-color-primary); color: var(--body-text-color);}
.studio-model p {margin: 4px 0 8px;}
.studio-model dl {display: grid; grid-template-columns: 90px 1fr; gap: 2px 12px; margin: 0; font-size: .92em;}
.studio-model dt {color: var(--body-text-color-subdued);}
.studio-model dd {margin: 0; overflow-wrap: anywhere;}
"""


def build_studio(names: Iterable[str] | None = None) -> gr.Blocks:
    """The studio with the pages `names` (default: all of `mmkit.registry.APPS`): a home page, the pages, and "About".

    Nothing is loaded or computed yet. Raises `InputError` for an unknown name, offering the nearest.
    """
    apps = [APPS.get(name) for name in (APPS.names() if names is None else names)]
    with gr.Blocks(title="mmkit studio", delete_cache=(KEEP_SECONDS, KEEP_SECONDS), analytics_enabled=False) as studio:
        gr.Navbar(main_page_name="Home", elem_id="studio-nav")
        _home(apps)
    for app in apps:
        with studio.route(app.title, f"/{app.name}"):
            gr.Markdown(f"# {app.title}\n{app.summary}", elem_id=f"{app.name}-header")
            app.build()
            if app.forget is not None:
                studio.unload(app.forget)
    with studio.route("About", "/about"):
        _about()
    # On the class, because gradio builds a block anew when a handler updates or skips it.
    gr.Image.preprocess = _read_picture  # type: ignore[method-assign, assignment]
    return studio.queue(default_concurrency_limit=1, max_size=32)


def launch_studio(
    names: Iterable[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_file_size: str | int = MAX_FILE_SIZE,
    open_browser: bool = False,
    block: bool = True,
    auth: tuple[str, str] | None = None,
    mcp: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the studio on this machine.

    Args:
        names: the pages; `None` takes all.
        host: "127.0.0.1" is reachable from this machine only. For anything else set `auth` and stand a TLS proxy in front.
        port: `None` takes 7860 or the next free one.
        max_file_size: larger uploads are refused.
        open_browser: open a browser window.
        block: wait until Ctrl-C.
        auth: (user, password).
        mcp: offer the endpoints as MCP tools too (needs `gradio[mcp]`).

    Returns:
        The running studio (`.close()` ends it) and its URL; the URL is also printed.

    Raises:
        InputError: unknown page, or the port is taken.
    """
    studio = build_studio(names)
    _reach_own_server()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # where gradio itself decodes (ImageEditor), PIL refuses above twice this
    try:
        _, url, _ = studio.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            auth=auth,
            show_error=False,
            max_file_size=max_file_size,
            allowed_paths=[],
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=mcp,
            footer_links=["api", "settings"],
            theme=theme(),
            css=CSS,
        )
    except OSError as error:
        raise InputError(f"The studio cannot listen on {host}:{port or 7860}: {error}. Choose another port.") from error
    print(f"mmkit studio: {url}", flush=True)
    if block:
        studio.block_thread()
    return studio, url


_decode_picture = gr.Image.preprocess


def _read_picture(block: gr.Image, payload: Any) -> Any:
    """What an uploaded picture becomes for a handler: read by `mmkit.data.load_image`, so that the size limit holds before decoding,
    16-bit, transparent and rotated pictures come out right, and an unreadable file is a message."""
    if payload is None or not payload.path or block.image_mode not in ("RGB", None):
        return _decode_picture(block, payload)
    try:
        image = load_image(payload.path)
    except InputError as error:
        name = payload.orig_name or "the file"
        reason = str(error).replace(str(payload.path), name)
        raise gr.Error(html.escape(reason), duration=10, print_exception=False) from error
    if block.type == "filepath":
        return payload.path
    return image if block.type == "pil" else np.asarray(image)


def _reach_own_server() -> None:
    """Gradio probes its own address when it starts; a proxy in the environment must not be asked for it."""
    for key in ("NO_PROXY", "no_proxy"):
        hosts = [h for h in os.environ.get(key, "").split(",") if h]
        os.environ[key] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))


def _home(apps: list[App]) -> None:
    cards = "".join(
        f'<a class="studio-card" href="{html.escape(app.name)}"><b>{html.escape(app.title)}</b>'
        f"<span>{html.escape(app.summary)}</span></a>"
        for app in apps
    )
    gr.Markdown(
        "# mmkit studio\nAdapt vision models and see what they do. Everything runs on this machine: no picture leaves it, and "
        f"nothing is fetched. Uploads and results are deleted after {KEEP_SECONDS // 60} minutes.",
        elem_id="home-header",
    )
    gr.HTML(f'<div class="studio-cards">{cards}</div>', elem_id="home-cards")


def _about() -> None:
    from mmkit.weights import list_weights, weight_entry

    gr.Markdown(
        f"# About\n**mmkit {__version__}**, license Apache-2.0. "
        "The models below come with the package: small, trained by a script in the repository, and measured by it. "
        "They let every page work at once; for demanding work load larger weights (`checkpoint_path=`, `weights=`).",
        elem_id="about-header",
    )
    entries = [weight_entry(name) for name in list_weights()]
    cards = "".join(
        f'<div class="studio-model"><b>{html.escape(e.name)}</b><p>{html.escape(e.summary)}</p><dl>'
        + "".join(
            f"<dt>{label}</dt><dd>{html.escape(text)}</dd>"
            for label, text in (
                ("Measured", ", ".join(f"{k} {v:.4g}" for k, v in e.score.items())),
                ("Trained on", e.data),
                ("License", e.license),
                ("Made by", e.command),
            )
        )
        + "</dl></div>"
        for e in entries
    )
    gr.HTML(cards or "No weights are bundled in this installation.", elem_id="about-models")
    gr.Markdown(
        "## Privacy and safety\n"
        "- The server listens on this machine only, unless it was started otherwise.\n"
        f"- Uploads are limited to {MAX_FILE_SIZE.upper()} and {MAX_PIXELS // 1_000_000} million pixels, and are deleted after "
        f"{KEEP_SECONDS // 60} minutes.\n"
        "- Weight files are read as safetensors, or as plain tensors; pickled objects are refused.\n"
        "- No telemetry, no fonts or scripts from other servers.\n\n"
        "Every useful action is also an endpoint: see *Use via API* at the bottom of the page.\n\n"
        "## Medical and safety-critical use\n"
        "Nothing here is a medical device; no model was validated for clinical or safety-critical decisions.",
        elem_id="about-notes",
    )
