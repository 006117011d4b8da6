"""The frame every page stands in.

A page is one file with `APP = App(...)` and a line in `mmkit.registry.APPS`:

    def build() -> None:
        image = gr.Image(label="Picture", elem_id="my-image")
        ...

    APP = App("my", "My page", "One sentence that says what it does.", build)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import gradio as gr

from mmkit.apps.handlers import protect, readable
from mmkit.apps.home import about, home
from mmkit.apps.limits import KEEP_SECONDS, SWEEP_SECONDS
from mmkit.apps.look import navigation
from mmkit.apps.sessions import Sessions, output_folder
from mmkit.registry import APPS

__all__ = ["App", "Sessions", "build_studio", "output_folder", "readable"]


@dataclass(frozen=True)
class App:
    """One page of the studio.

    Attributes:
        name: name in `mmkit.registry.APPS`, path of the page ("/name") and prefix of its elem_ids.
        title: shown in the navigation.
        summary: one or two sentences: what a person can do here.
        build: adds the components to the current page. It loads no model and touches no file.
        sample: elem_id of the button that shows the page at work with something of its own; empty where a page begins by itself.
        picture: elem_id of what that shows: the page's picture on the home page is taken of it (`examples/studio_pictures.py`).
        forget: called with the `gr.Request` of a visitor who closed the page, to drop what the server keeps for the session.
        load: loads the libraries and models of a first answer; a server calls it once, in the background, so that nobody waits.
    """

    name: str
    title: str
    summary: str
    build: Callable[[], None]
    forget: Callable[[gr.Request], None] | None = None
    sample: str = ""
    picture: str = ""
    load: Callable[[], object] | None = None


def build_studio(names: Iterable[str] | None = None) -> gr.Blocks:
    """The studio with the pages `names` (default: all of `mmkit.registry.APPS`): a home page, the pages, and "About".

    Nothing is loaded or computed yet. Raises `InputError` for an unknown name, offering the nearest.
    """
    apps = [APPS.get(name) for name in (APPS.names() if names is None else names)]
    pages = [*((app.name, app.title) for app in apps), ("about", "About")]
    with gr.Blocks(
        title="mmkit studio", delete_cache=(SWEEP_SECONDS, KEEP_SECONDS - 2 * SWEEP_SECONDS), analytics_enabled=False
    ) as studio:
        navigation(pages, ".")
        home((app.name, app.title, app.summary) for app in apps)
    for app in apps:
        with studio.route(app.title, f"/{app.name}"):
            navigation(pages, app.name)
            gr.Markdown(f"# {app.title}\n{app.summary}", elem_id=f"{app.name}-header", elem_classes="studio-header")
            app.build()
            if app.forget is not None:
                studio.unload(app.forget)
    with studio.route("About", "/about"):
        navigation(pages, "about")
        about()
    for block in studio.blocks.values():
        if isinstance(block, gr.Image) and block.alt_text is None and isinstance(block.label, str):
            block.alt_text = block.label  # also the name of the button that gradio wraps a picture in
    protect(studio)
    return studio.queue(default_concurrency_limit=1, max_size=32)
