"""The learning rate over time, and the moving average of latents."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LAST = 0.01  # share of the rate that is left at the end
LONGEST_AVERAGE = 0.999


def rate_share(step: int, total: int, warm: int) -> float:
    """Return the share of the full rate at step 0 .. total - 1.

    It rises linearly for `warm` steps, and falls by half a cosine to LAST over all steps.
    """
    falling = (1 + math.cos(math.pi * (step / max(1, total - 1)))) / 2
    return min(1.0, (step + 1) / max(1, warm)) * (LAST + (1 - LAST) * falling)


@torch.no_grad()
def follow(average: Mapping[str, Tensor], latents: Mapping[str, Tensor], step: int) -> None:
    """Update an exponential moving average of the latents after step 1, 2, ...

    It averages over the last tenth of the steps at first, and later over the last thousand.
    """
    keep = min(LONGEST_AVERAGE, (1 + step) / (10 + step))
    for key, mean in average.items():
        mean.mul_(keep).add_(latents[key], alpha=1 - keep)
