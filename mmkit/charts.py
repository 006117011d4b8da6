"""Charts as inline SVG: they take their colors from the page, so that they follow its theme, and their text can be read aloud."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("#0d9488", "#d97706", "#8b5cf6", "#db2777", "#3b82f6", "#65a30d")
"""Colors of lines, at least 3 : 1 on the ground of both themes."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 196, 40, 14, 8, 36
_ROW, _NAMES = 26, 96
_LETTER = 6.25  # width of a letter of the labels, on average


@dataclass(frozen=True)
class Line:
    """A line through `points`, (x, y), with its `name` in the legend; `mark` is the index of a point to ring."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    mark: int | None = None


def line_chart(
    title: str,
    axis: str,
    lines: Sequence[Line],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    number: str = "{:.2f}",
    note: str = "",
) -> str:
    """Lines over `axis`, with `note` beside the title and a legend for those that have a name; `number` formats the scale."""

    def x(v: float) -> float:
        return LEFT + (v - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def y(v: float) -> float:
        share = (min(max(v, y_range[0]), y_range[1]) - y_range[0]) / (y_range[1] - y_range[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    ticks = sorted({round(x_range[0] + i / 4 * (x_range[1] - x_range[0])) for i in range(5)})
    parts = [f'<text x="{x(t):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{t}</text>' for t in ticks]
    for i in range(5):
        v = y_range[0] + i / 4 * (y_range[1] - y_range[0])
        parts.append(f'<path class="grid" d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{number.format(v)}</text>')
    shown = list(zip(lines[-len(COLORS) :], COLORS, strict=False))
    for line, color in shown:
        places = [(x(a), y(b)) for a, b in line.points]
        if not places:
            continue
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        if not line.dashed:
            parts.append(f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="3" fill="{color}"/>')
        if line.mark is not None:
            a, b = places[line.mark]
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="6" fill="none" stroke="{color}" stroke-width="2"/>')
    legend = "".join(f'<span><i style="background:{c}"></i>{html.escape(s.name)}</span>' for s, c in shown if s.name)
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{html.escape(axis)}</text>')
    return _figure(title, note, WIDTH, HEIGHT, parts, f"<div>{legend}</div>")


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart; `group` decides its color, `told` is shown when it is pointed at."""

    name: str
    x: float
    y: float
    group: str = ""
    told: str = ""


def scatter_chart(
    title: str,
    axes: tuple[str, str],
    dots: Sequence[Dot],
    best: Sequence[int] = (),
    log: tuple[bool, bool] = (False, False),
    note: str = "",
) -> str:
    """Points by `axes` (x, y), those of `best` joined by steps and named; the others say their names when pointed at."""
    width, height, left, right, top, bottom = 760, 420, 58, 24, 16, 44
    scales = [_scale([getattr(d, k) for d in dots], logarithmic) for k, logarithmic in zip("xy", log, strict=True)]

    def x(v: float) -> float:
        return left + scales[0].share(v) * (width - left - right)

    def y(v: float) -> float:
        return height - bottom - scales[1].share(v) * (height - top - bottom)

    parts = [f'<text x="{x(t):.1f}" y="{height - 26}" text-anchor="middle">{_short(t)}</text>' for t in scales[0].ticks]
    for t in scales[1].ticks:
        parts.append(f'<path class="grid" d="M{left} {y(t):.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{_short(t)}</text>')
    steps = "".join(
        f"{'HM'[not i]}{x(dots[k].x):.1f}{' ' if not i else 'V'}{y(dots[k].y):.1f}" for i, k in enumerate(best)
    )
    parts.append(f'<path class="best" d="{steps}" fill="none"/>' if best else "")
    groups = list(dict.fromkeys(d.group for d in dots))
    for i in sorted(range(len(dots)), key=lambda i: i in best):  # names lie over all dots
        d = dots[i]
        color, px, py = COLORS[groups.index(d.group) % len(COLORS)], x(d.x), y(d.y)
        anchor, shift = ("end", -10) if px > (0.2 if i in best else 0.72) * width else ("start", 10)
        known = "named" if i in best else "dot"
        words = html.escape(f"{d.name}: {d.told}")
        parts.append(
            f'<g class="{known}" tabindex="0" role="img" aria-label="{words}"><title>{words}</title>'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{color}"/>'
            f'<text x="{px + shift:.1f}" y="{py - 8:.1f}" text-anchor="{anchor}">{html.escape(d.name)}</text></g>'
        )
    parts.append(f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{html.escape(axes[0])}</text>')
    parts.append(f'<text x="{left}" y="{top - 5}">{html.escape(axes[1])}</text>')
    legend = "".join(
        f'<span><i style="background:{COLORS[i % len(COLORS)]}"></i>{html.escape(g)}</span>'
        for i, g in enumerate(groups)
        if g
    )
    return _figure(title, note, width, height, parts, f"<div>{legend}</div>")


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        low, high, v = (math.log10(max(n, 1e-12)) if self.logarithmic else n for n in (self.low, self.high, value))
        return (v - low) / ((high - low) or 1.0)


def _scale(values: Sequence[float], logarithmic: bool) -> _Scale:
    """Round limits around `values` and marks on them."""
    low, high = min(values), max(values)
    if logarithmic and low > 0:
        low, high = low / 1.4, high * 1.4
        ticks = [m * 10.0**e for e in range(-9, 13) for m in (1, 3) if low <= m * 10.0**e <= high]
        return _Scale(low, high, True, tuple(ticks))
    room = 0.06 * ((high - low) or 1.0)
    step = 10.0 ** math.floor(math.log10(((high - low) or 1.0) / 2))
    step *= next(m for m in (0.5, 1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil((low - room) / step)
    ticks = [k * step for k in range(first, first + 20) if k * step <= high + room]
    return _Scale(low - room, high + room, False, tuple(ticks))


def _short(value: float) -> str:
    """A number for a scale: 0.25, 30, 4.1k, 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) that no other one beats, being as small in x and as large in y; by rising x.

    Example:
        >>> frontier([(1, 5), (2, 4), (3, 9), (3, 9), (0, 1)])
        [4, 0, 2]
    """
    best, found = float("-inf"), []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def heat_chart(
    title: str, names: Sequence[str], stretches: Sequence[tuple[float, float, Sequence[float]]], note: str = ""
) -> str:
    """A row per name over true time: `stretches` are (start, end, value in 0..1 per name); the fuller, the larger the value.

    Names take the room that they need, up to half of the chart; longer ones are cut, and whole in the tooltips.
    """
    start, end = stretches[0][0], max(s[1] for s in stretches)
    room = min(max(_NAMES, 8 + math.ceil(_LETTER * max(map(len, names)))), WIDTH // 2)
    most = int((room - 8) / _LETTER)
    scale = (WIDTH - room - RIGHT) / max(end - start, 1e-6)
    height = TOP + _ROW * len(names) + 34
    parts = []
    for row, name in enumerate(names):
        top = TOP + row * _ROW
        shown = name if len(name) <= most else name[: most - 1] + "…"
        parts.append(f'<text x="{room - 8}" y="{top + 17}" text-anchor="end">{html.escape(shown)}</text>')
        for first, last, values in stretches:
            left, width = room + (first - start) * scale, max((last - first) * scale - 1, 0.5)
            parts.append(
                f'<rect class="heat" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_ROW - 2}" '
                f'fill-opacity="{0.04 + 0.96 * values[row]:.2f}"><title>{html.escape(name)}, {first:.1f} to {last:.1f} s: '
                f"{values[row]:.0%}</title></rect>"
            )
    below = TOP + _ROW * len(names) + 14
    for i in range(5):
        second = start + i / 4 * (end - start)
        place = room + (second - start) * scale
        parts.append(f'<text x="{place:.1f}" y="{below}" text-anchor="middle">{second:.3g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">seconds</text>')
    return _figure(title, note, WIDTH, height, parts)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]], note: str = "") -> str:
    """A bar per name from zero: (name, value, what stands at its end). The first one is set off by its color."""
    names, values = 112, 92
    scale = (WIDTH - names - values) / max(max(value for _, value, _ in bars), 1e-12)
    height = TOP + _ROW * len(bars) + 4
    parts = []
    for row, (name, value, text) in enumerate(bars):
        top, end = TOP + row * _ROW, names + value * scale
        parts.append(f'<text x="{names - 8}" y="{top + 15}" text-anchor="end">{html.escape(name)}</text>')
        color = COLORS[0] if row == 0 else COLORS[4]
        parts.append(
            f'<rect x="{names}" y="{top + 3}" width="{max(end - names, 1):.1f}" height="16" rx="3" fill="{color}"/>'
        )
        parts.append(f'<text x="{end + 6:.1f}" y="{top + 15}">{html.escape(text)}</text>')
    return _figure(title, note, WIDTH, height, parts)


def _figure(title: str, note: str, width: int, height: int, parts: Sequence[str], below: str = "") -> str:
    words = html.escape(f"{title} {note}".strip())
    return (
        f'<figure class="studio-chart"><figcaption><b>{html.escape(title)}</b><em>{html.escape(note)}</em></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">{"".join(parts)}</svg>{below}</figure>'
    )
