"""Place the labels of boxes so that they can be read."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NARROW, WIDE = 0.62, 1.05  # width of a bold character as a share of the font size: Latin, East Asian


@dataclass(frozen=True)
class Spot:
    """A label's rectangle, in pixels of the photo."""

    x: float
    y: float
    width: float
    height: float

    def covered(self, by: NDArray[np.float64]) -> float:
        """Return the area of the overlaps with other spots (n, 4), in square pixels."""
        x, y, width, height = by.T
        w = np.minimum(self.x + self.width, x + width) - np.maximum(self.x, x)
        h = np.minimum(self.y + self.height, y + height) - np.maximum(self.y, y)
        return float((w.clip(0) * h.clip(0)).sum())


def text_width(text: str, size: float) -> float:
    """Return the approximate width of bold text in pixels."""
    return size * sum(WIDE if unicodedata.east_asian_width(c) in "WF" else NARROW for c in text)


def place(boxes: Sequence[Spot], texts: Sequence[str], size: float, width: float, height: float) -> list[Spot]:
    """Return a spot inside the photo for the label of every box; earlier boxes get better spots.

    Spots above, below and inside the box are tried, at its left and right edges. The one that is covered least is
    taken.

    size: of the font.
    width, height: of the photo.
    """
    line = 1.25 * size
    taken: list[Spot] = []
    corners = np.zeros((len(boxes), 4))
    for box, text in zip(boxes, texts, strict=True):
        long = min(text_width(text, size) + 0.3 * size, width)
        lefts = (box.x, box.x + box.width - long)
        tops = (box.y - line, box.y + box.height, box.y, box.y + box.height - line)
        spots = [
            Spot(min(max(left, 0.0), width - long), top, long, line)
            for top in tops
            for left in lefts
            if 0 <= top <= height - line
        ]
        spots = spots or [Spot(min(max(box.x, 0.0), width - long), min(max(box.y, 0.0), height - line), long, line)]
        covers = corners[: len(taken)]
        best = min(spots, key=lambda s: s.covered(covers))
        corners[len(taken)] = best.x, best.y, best.width, best.height
        taken.append(best)
    return taken
