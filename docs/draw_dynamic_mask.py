"""Draws docs/dynamic_mask.svg: the interval of positions that see each key, and the key list of one chunk.

python docs/draw_dynamic_mask.py
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from flash_dmattn import DynamicMask

PICTURE = Path(__file__).with_name("dynamic_mask.svg")
KEYS, WINDOW, CHUNK = 32, 6, range(16, 24)
CELL, LEFT, TOP = 16, 80, 50
COLORS = {
    "outlives the chunk": "#6baed6",
    "dies inside the chunk": "#c6dbef",
    "the chunk's own": "#fdae6b",
    "seen at other positions only": "#dddddd",
}


def main() -> None:
    PICTURE.write_text(picture())


def picture() -> str:
    numbers = random.Random(9)
    score = torch.tensor([numbers.random() + key / KEYS for key in range(KEYS)])  # rising, so that newer keys win often
    end = DynamicMask.from_score(score[None, None], WINDOW).end[0, 0].tolist()
    kinds = [kind_of(key, end[key]) for key in range(KEYS)]
    outliving, dying, own, _ = ([key for key in range(KEYS) if kinds[key] == kind] for kind in COLORS)
    keys = outliving + sorted(dying, key=lambda key: (-end[key], -key)) + own

    shapes = []
    for key in range(KEYS):
        y = TOP + key * CELL
        shapes.append(text(LEFT - 8, y + 12, str(key), "end"))
        shapes.append(text(LEFT + key * CELL + CELL / 2, TOP - 8, str(key), "middle"))
        shapes.append(rect(LEFT, y, KEYS * CELL, CELL, "none", "#eeeeee"))
        if end[key] > key:
            shapes.append(rect(LEFT + key * CELL, y + 2, (end[key] - key) * CELL, CELL - 4, COLORS[kinds[key]]))
    shapes.append(rect(LEFT + CHUNK.start * CELL, TOP, len(CHUNK) * CELL, KEYS * CELL, "none", "black"))
    shapes.append(text(LEFT, TOP - 30, "position of the query →"))
    shapes.append(text(8, TOP - 8, "key ↓"))

    x = LEFT + KEYS * CELL + 30
    for row, (label, color) in enumerate(COLORS.items()):
        y = TOP + row * 24
        shapes.append(rect(x, y, 24, CELL - 4, color))
        shapes.append(text(x + 32, y + 10, label))
    y = TOP + 24 * len(COLORS) + 30
    shapes.append(text(x, y, f"{WINDOW} keys for each query"))
    shapes.append(text(x, y + 24, f"list of the chunk {CHUNK.start} … {CHUNK.stop - 1}, {len(keys)} keys:"))
    for place, key in enumerate(keys):
        left, top = x + place % 8 * 26, y + 36 + place // 8 * 26
        shapes.append(rect(left, top, 24, 24, COLORS[kinds[key]]))
        shapes.append(text(left + 12, top + 16, str(key), "middle"))

    width, height = x + 240, TOP + KEYS * CELL + 16
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
            rect(0, 0, width, height, "white"),
            *shapes,
            "</svg>\n",
        )
    )


def kind_of(key: int, end: int) -> str:
    """What a key with the interval [key, end) is to the chunk."""
    outlives, dies, own, other = COLORS
    if end <= max(key, CHUNK.start) or key >= CHUNK.stop:
        return other
    if key >= CHUNK.start:
        return own
    return outlives if end >= CHUNK.stop else dies


def rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
