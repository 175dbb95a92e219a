"""How fast latents learn as time goes on, and their average."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LAST = 0.01  # of the rate, at the end
LONGEST_AVERAGE = 0.999


def rate_share(step: int, total: int, warm: int) -> float:
    """Share of the full rate at step 0 .. total - 1: it rises for `warm` steps, and falls all along, by half a cosine,
    to LAST."""
    falling = (1 + math.cos(math.pi * (step / max(1, total - 1)))) / 2
    return min(1.0, (step + 1) / max(1, warm)) * (LAST + (1 - LAST) * falling)


@torch.no_grad()
def follow(average: Mapping[str, Tensor], latents: Mapping[str, Tensor], step: int) -> None:
    """Draw an exponential average towards the latents after step 1, 2, ...: of the last tenth of the steps at first, of
    the last thousand later on."""
    keep = min(LONGEST_AVERAGE, (1 + step) / (10 + step))
    for key, mean in average.items():
        mean.mul_(keep).add_(latents[key], alpha=1 - keep)
