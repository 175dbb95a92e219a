"""Random draws that belong to an image: the same whichever other images are looked at, and by whom."""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = 256  # taken from each image, the important ones more often


def of_image(seed: int, index: int) -> torch.Generator:
    """The generator of the image at `index` of the calibration set."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def positions(weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions and the weights to give them: all when they are few, else a draw with chances by weight."""
    count = len(weights)
    if count <= POSITIONS:
        return torch.arange(count), weights
    at = torch.rand(POSITIONS, generator=generator, dtype=torch.float64) * weights.sum()
    picks = torch.searchsorted(weights.cumsum(0), at).clamp_max(count - 1)
    return picks, weights.sum().expand(POSITIONS) / POSITIONS
