"""The first page of the studio, and the one about it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path

import gradio as gr

from mmkit import __version__
from mmkit.apps import limits
from mmkit.data.images import MAX_PIXELS
from mmkit.weights import list_weights, weight_entry


def home(pages: Iterable[tuple[str, str, str]]) -> None:
    """Cards that lead to `pages`, (path, title, summary), and what comes with the package."""
    cards = "".join(
        f'<a class="studio-card" href="{html.escape(path)}">{_picture(path, title)}<b>{html.escape(title)}</b>'
        f"<span>{html.escape(summary)}</span></a>"
        for path, title, summary in pages
    )
    gr.Markdown(
        "# mmkit studio\nAdapt vision models and see what they do. Everything runs on this machine: no picture leaves it, and "
        f"nothing is fetched. {limits.promise()}",
        elem_id="home-header",
        elem_classes="studio-header",
    )
    gr.HTML(f'<div class="studio-cards">{cards}</div>', elem_id="home-cards")
    entries = [entry for entry in map(weight_entry, list_weights()) if entry.path.is_file()]
    total = sum(entry.path.stat().st_size for entry in entries)
    gr.Markdown(
        f"## Comes with mmkit\n{len(entries)} small models, {total / 1e6:.0f} MB together, so that every page works at once and "
        "offline. How each was trained and measured stands under [About](about).",
        elem_id="home-bundle-header",
        elem_classes="studio-header",
    )
    models = "".join(
        f"<div><dt>{html.escape(e.name)}<span>{e.path.stat().st_size / 1e6:.1f} MB</span></dt><dd>{html.escape(e.summary)}</dd></div>"
        for e in entries
    )
    gr.HTML(f'<dl class="studio-bundle">{models}</dl>', elem_id="home-bundle")


def _picture(path: str, title: str) -> str:
    """The picture of a page, inside the page itself; none where `examples/studio_pictures.py` has not been run for it yet."""
    file = Path(__file__).parent / "pictures" / f"{path}.webp"
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="A look at {html.escape(title)}">'


def about() -> None:
    """The page "About": what comes with the package, and what happens to what visitors bring."""
    gr.Markdown(
        f"# About\n**mmkit {__version__}**, license Apache-2.0. "
        "The models below come with the package: small, made by a script in the repository, and measured. "
        "They let every page work at once; for demanding work load larger weights (`checkpoint_path=`, `weights=`).",
        elem_id="about-header",
        elem_classes="studio-header",
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
        f"- Uploads are limited to {limits.MAX_FILE_SIZE} and {MAX_PIXELS // 1_000_000} million pixels.\n"
        f"- {limits.promise()}\n"
        "- Weight files are read as safetensors, or as plain tensors; pickled objects are refused.\n"
        "- No telemetry, no fonts or scripts from other servers.\n\n"
        "Every useful action is also an endpoint: see *Use via API* at the bottom of the page.\n\n"
        "## Medical and safety-critical use\n"
        "Nothing here is a medical device; no model was validated for clinical or safety-critical decisions.",
        elem_id="about-notes",
    )
