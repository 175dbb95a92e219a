"""Random draws that belong to an image: the same whichever other images are looked at, and by whom."""

from __future__ import annotations

import torch


def of_image(seed: int, index: int) -> torch.Generator:
    """The generator of the image at `index` of the calibration set."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
