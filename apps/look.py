"""The studio's looks: colors, style sheet, navigation, and the script that every page carries."""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterable
from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent

CSS = (_HERE / "studio.css").read_text(encoding="utf-8")
HEAD = f"<script>{(_HERE / 'studio.js').read_text(encoding='utf-8')}</script>"

WORK = "studio-work"
"""Class of buttons whose result a reload would lose: the browser asks before it leaves the page. Own files count by themselves."""

_LOOK: dict[str, str | tuple[str, str]] = {
    "body_background_fill": ("*neutral_50", "*neutral_950"),
    "body_text_color": ("*neutral_800", "*neutral_100"),
    "body_text_color_subdued": ("*neutral_600", "*neutral_300"),
    "link_text_color": ("*primary_700", "*primary_300"),
    "link_text_color_hover": ("*primary_800", "*primary_200"),
    "link_text_color_visited": ("*primary_700", "*primary_300"),
    "link_text_color_active": ("*primary_800", "*primary_200"),
    "color_accent": "*primary_700",
    "color_accent_soft": ("*primary_50", "*neutral_700"),
    "block_background_fill": ("white", "*neutral_900"),
    "block_border_color": ("*neutral_200", "*neutral_700"),
    "block_border_width": "1px",
    "block_shadow": "none",
    "block_label_background_fill": ("white", "*neutral_900"),
    "block_label_border_width": "0px",
    "block_label_text_color": ("*neutral_700", "*neutral_200"),
    "block_label_text_weight": "600",
    "block_title_text_color": ("*neutral_700", "*neutral_200"),
    "block_title_text_weight": "600",
    "block_info_text_color": ("*neutral_600", "*neutral_300"),
    "input_background_fill": ("white", "*neutral_800"),
    "input_border_color": ("*neutral_300", "*neutral_600"),
    "input_border_width": "1px",
    "input_placeholder_color": ("*neutral_500", "*neutral_400"),
    "input_shadow": "none",
    "slider_color": "*primary_600",
    "button_border_width": "1px",
    "button_large_padding": "*spacing_md *spacing_lg",
    "button_large_text_size": "*text_md",
    "button_transform_hover": "none",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_border_color": "*primary_700",
    "button_primary_text_color": "white",
    "button_secondary_background_fill": ("white", "*neutral_800"),
    "button_secondary_background_fill_hover": ("*neutral_100", "*neutral_700"),
    "button_secondary_border_color": ("*neutral_300", "*neutral_600"),
    "button_secondary_text_color": ("*neutral_800", "*neutral_100"),
    "button_cancel_background_fill": ("white", "*neutral_800"),
    "button_cancel_background_fill_hover": ("*neutral_100", "*neutral_700"),
    "button_cancel_border_color": ("*neutral_300", "*neutral_600"),
    "button_cancel_text_color": ("*neutral_800", "*neutral_100"),
    "checkbox_border_color": ("*neutral_400", "*neutral_500"),
    "checkbox_background_color_selected": "*primary_700",
    "checkbox_border_color_selected": "*primary_700",
    "checkbox_label_background_fill": ("white", "*neutral_800"),
    "checkbox_label_background_fill_hover": ("*neutral_100", "*neutral_700"),
    "checkbox_label_background_fill_selected": ("*primary_50", "*primary_900"),
    "checkbox_label_border_color": ("*neutral_300", "*neutral_600"),
    "checkbox_label_border_color_selected": "*primary_600",
    "checkbox_label_border_width": "1px",
    "checkbox_label_shadow": "none",
    "checkbox_label_text_color": ("*neutral_800", "*neutral_100"),
    "checkbox_label_text_color_selected": ("*primary_900", "*primary_50"),
    "table_odd_background_fill": ("white", "*neutral_900"),
    "table_even_background_fill": ("*neutral_50", "*neutral_800"),
}
"""Variable of gradio's themes -> value, or (light, dark)."""


def theme() -> gr.Theme:
    """Calm grey, one accent, the system's fonts. Text stands at 4.5 : 1 or more on its ground, in the light and in the dark."""
    known = inspect.signature(gr.themes.Base.set).parameters
    values: dict[str, str] = {}
    for name, value in _LOOK.items():
        light, dark = (value, value) if isinstance(value, str) else value
        values |= {key: v for key, v in ((name, light), (f"{name}_dark", dark)) if key in known}
    return gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    ).set(**values)


def navigation(pages: Iterable[tuple[str, str]], current: str) -> None:
    """Add the way to every page, (path, title): a row of links, on narrow screens one row with a menu."""
    links = "".join(
        f'<a href="{html.escape(path)}"{" aria-current=page" if path == current else ""}>{html.escape(title)}</a>'
        for path, title in [(".", "Home"), *pages]
    )
    gr.HTML(
        f'<nav class="studio-nav" aria-label="Pages"><a class="studio-brand" href=".">mmkit <span>studio</span></a>'
        f'<div class="studio-links">{links}</div>'
        f'<details class="studio-menu"><summary>Pages</summary><div>{links}</div></details></nav>'
    )


def shows(elem_id: str, *, work: bool = False) -> list[str]:
    """`elem_classes` of a button or file box: on a narrow screen the page goes on to `elem_id` when it is used; `work`: see `WORK`."""
    return [f"shows-{elem_id}", *([WORK] if work else [])]
