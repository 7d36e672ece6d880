"""How a step's time grows, as an SVG: one panel a quantity, both axes logarithmic, and the line of proportion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN = 300, 220, 46
INK, LINE, POINT = "#444", "#bbb", "#1565c0"


def plot(measured: Sequence[Mapping[str, Any]]) -> str:
    """`measured`: what, size, tokens, operations. Time is drawn as time over that of the panel's first point; the grey
    line grows in proportion to the tokens (to the size, where tokens stay the same)."""
    names = list(dict.fromkeys(row["what"] for row in measured))
    panels = [
        _panel(name, [row for row in measured if row["what"] == name], (i % 2) * WIDTH, (i // 2) * HEIGHT)
        for i, name in enumerate(names)
    ]
    width, height = 2 * WIDTH, -(-len(names) // 2) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="10" fill="{INK}"><rect width="{width}" height="{height}" fill="white"/>{"".join(panels)}</svg>\n'
    )


def _panel(name: str, rows: Sequence[Mapping[str, Any]], left: float, top: float) -> str:
    sizes = [float(row["size"]) for row in rows]
    same_tokens = len({row["tokens"] for row in rows}) == 1
    work = sizes if same_tokens else [float(row["tokens"]) for row in rows]
    times = [float(row["operations"]) / float(rows[0]["operations"]) for row in rows]
    linear = [x / work[0] for x in work]
    highest = max(*times, *linear)

    def at(size: float, time: float) -> tuple[float, float]:
        across = math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])
        up = math.log(max(time, 1e-9)) / math.log(highest)
        return left + MARGIN + across * (WIDTH - 1.5 * MARGIN), top + HEIGHT - MARGIN - up * (HEIGHT - 1.8 * MARGIN)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, sizes, linear))
    points = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{POINT}"/><text x="{x:.1f}" y="{y - 6:.1f}" '
        f'text-anchor="middle">{time:.1f}×</text><text x="{x:.1f}" y="{top + HEIGHT - MARGIN + 14:.1f}" '
        f'text-anchor="middle">{size:,.0f}</text>'
        for size, time in zip(sizes, times, strict=True)
        for x, y in [at(size, time)]
    )
    return (
        f'<text x="{left + WIDTH / 2}" y="{top + 16}" text-anchor="middle" font-size="12">{escape(name)}</text>'
        f'<polyline points="{line}" fill="none" stroke="{LINE}" stroke-width="2"/>{points}'
    )
