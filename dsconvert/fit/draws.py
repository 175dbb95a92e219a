"""Random draws for one image, which do not depend on the other images or on how processes share them."""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = 256  # drawn from each image, the important ones more often
TOGETHER = 1 << 16  # positions of one layer over all images: with many images, each gives fewer
FEWEST = 16  # positions of an image at least


def of_image(seed: int, index: int) -> torch.Generator:
    """Return the random generator of the image at `index` of the calibration set."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def positions_each(images: int) -> int:
    """Return how many positions to draw from each image. More images help more than more positions of one image do."""
    return min(POSITIONS, max(FEWEST, TOGETHER // images))


def positions(weights: Tensor, generator: torch.Generator, most: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """Return positions and their weights: all of them if there are at most `most`, else `most` drawn ones.

    A position is drawn with a chance in proportion to its weight. Each drawn position gets the same share of the total
    weight, so that weighted sums stay unbiased.

    weights: (n,) float64, at least 0.
    """
    count = len(weights)
    if count <= most:
        return torch.arange(count), weights
    at = torch.rand(most, generator=generator, dtype=torch.float64) * weights.sum()
    picks = torch.searchsorted(weights.cumsum(0), at).clamp_max(count - 1)
    return picks, weights.sum().expand(most) / most
