# SPDX-License-Identifier: Apache-2.0
"""Draws a flowchart of Mermaid's language as SVG: boxes in layers, and an arrow for each edge.

It reads what ARCHITECTURE.md uses: `A["a line<br>another"]`, and chains `A --> B --> C`. Mermaid itself is a program of
several megabytes that a page would load from another host.
"""

from __future__ import annotations

import html
import itertools
import re
import textwrap

NODE = re.compile(r'^\s*(\w+)\["(.*)"\]\s*$')
LETTERS = 44  # in a line; two such boxes fit beside each other
CHAR, LINE, PAD, GAP, APART = 6.7, 16, 8, 30, 20  # pixels: of a letter and a line; in a box, and between boxes


def read(text: str) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """The lines of each box, and the edges.

    Raises:
        ValueError: a line that is neither a box nor a chain.
    """
    boxes: dict[str, list[str]] = {}
    edges: list[tuple[str, str]] = []
    for line in text.splitlines():
        if not line.strip() or line.strip() == "flowchart TD":
            continue
        if match := NODE.match(line):
            boxes[match[1]] = [part for line in match[2].split("<br>") for part in textwrap.wrap(line, LETTERS)]
        elif "-->" in line and all(re.fullmatch(r"\w+", part.strip()) for part in line.split("-->")):
            chain = [part.strip() for part in line.split("-->")]
            edges += itertools.pairwise(chain)
        else:
            raise ValueError(f"docs/_site/flowchart.py draws boxes and chains only; got {line!r}")
    return boxes, edges


def layers(boxes: dict[str, list[str]], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Every box one layer below the lowest box that leads to it."""
    depth = dict.fromkeys(boxes, 0)
    for _ in boxes:
        for above, below in edges:
            depth[below] = max(depth[below], depth[above] + 1)
    return [[name for name in boxes if depth[name] == level] for level in range(max(depth.values()) + 1)]


def draw(text: str) -> str:
    """The SVG of a flowchart. Its colours are those of the page."""
    boxes, edges = read(text)
    size = {
        name: (max(len(line) for line in lines) * CHAR + 2 * PAD, len(lines) * LINE + 2 * PAD)
        for name, lines in boxes.items()
    }
    rows = layers(boxes, edges)
    width = max(sum(size[name][0] + APART for name in row) for row in rows)
    place: dict[str, tuple[float, float]] = {}  # the middle of the upper edge
    y = 2.0
    for row in rows:
        x = (width - sum(size[name][0] + APART for name in row) + APART) / 2
        for name in row:
            place[name] = (x + size[name][0] / 2, y)
            x += size[name][0] + APART
        y += max(size[name][1] for name in row) + GAP
    arrows = "".join(arrow(place[a], size[a][1], place[b]) for a, b in edges)
    drawn = "".join(box(boxes[name], place[name], size[name]) for name in boxes)
    label = html.escape("; ".join(lines[0] for lines in boxes.values()))
    view = f'viewBox="0 0 {width:.0f} {y - GAP + 2:.0f}" width="{width:.0f}"'
    return f'<svg {view} role="img" aria-label="{label}">{arrows}{drawn}</svg>'


def arrow(above: tuple[float, float], height: float, below: tuple[float, float]) -> str:
    x, y = below
    line = f'<path class="edge" d="M{above[0]:.1f} {above[1] + height:.1f} L{x:.1f} {y - 6:.1f}"/>'
    return line + f'<path class="head" d="M{x - 4:.1f} {y - 7:.1f} h8 l-4 7 z"/>'


def box(lines: list[str], place: tuple[float, float], size: tuple[float, float]) -> str:
    x, y = place[0] - size[0] / 2, place[1]
    words = "".join(
        f'<text x="{place[0]:.1f}" y="{y + PAD + LINE * i + 12:.1f}">{html.escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}" rx="4"/>{words}'
