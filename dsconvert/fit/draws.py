"""Random draws that belong to an image: the same whichever other images are looked at, and by whom."""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = 256  # taken from each image, the important ones more often
TOGETHER = 1 << 16  # of one layer over all images: with more, each image gives fewer
FEWEST = 16  # of an image


def of_image(seed: int, index: int) -> torch.Generator:
    """The generator of the image at `index` of the calibration set."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def positions_each(images: int) -> int:
    """How many positions are drawn from each of so many images. Neighbours say much the same, other images do not."""
    return min(POSITIONS, max(FEWEST, TOGETHER // images))


def positions(weights: Tensor, generator: torch.Generator, most: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """Positions and the weights to give them: all when they are few, else a draw of `most` with chances by weight."""
    count = len(weights)
    if count <= most:
        return torch.arange(count), weights
    at = torch.rand(most, generator=generator, dtype=torch.float64) * weights.sum()
    picks = torch.searchsorted(weights.cumsum(0), at).clamp_max(count - 1)
    return picks, weights.sum().expand(most) / most
