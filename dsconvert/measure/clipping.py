"""What cutting a value's upper end costs, from the gradients that `importance` has anyway.

Rounding errors are of either sign and independent, so their squares add up. Clipping errors are not: where a detector
is sure, many large values are cut together, all downwards, and their effects add up before they are squared. With
g = J^T s the gradient for random signs s and D = min(v, level) - v, E[<g, D>^2] = ||J D||^2 counts that.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PER_OCTAVE = 8
LOWEST, HIGHEST = -8, 12  # powers of two
COUNT = (HIGHEST - LOWEST) * PER_OCTAVE + 1
# evenly spaced from a power of two to the next: of a float32's bits, those above SHIFT are the number of its level
LEVELS = torch.tensor(
    [math.ldexp(1 + i % PER_OCTAVE / PER_OCTAVE, LOWEST + i // PER_OCTAVE) for i in range(COUNT)],
    dtype=torch.float64,
)
SHIFT = 23 - int(math.log2(PER_OCTAVE))
FIRST = (int(LEVELS[:1].float().view(torch.int32)) >> SHIFT) - 1  # of the numbers of levels, the one below all
LEAST_SHARE = 0.1  # of the largest value: nobody cuts below that


def clip_effects(values: Tensor, gradient: Tensor) -> Tensor:
    """<g, min(v, level) - v>^2 for every level of LEVELS, float64, on CPU; v and g of one image, any shape.

    Levels below LEAST_SHARE of the largest value get too little: their values are not looked at."""
    from dsconvert.base import loops  # numba takes a while to load

    v, g = values.flatten().cpu().numpy(), gradient.flatten().cpu().numpy()
    sums = np.zeros((2, COUNT + 1))
    least = np.float32(LEAST_SHARE * max(float(v.max()), 0.0))
    loops.sum_by_level(v, v.view(np.int32), g, least, SHIFT, FIRST, sums[0], sums[1])
    slope, total = (torch.from_numpy(s[::-1].cumsum()[-2::-1].copy()) for s in sums)
    return (LEVELS * slope - total).square()


def effects_at(effects: Tensor, levels: Tensor) -> NDArray[np.float64]:
    """Effects by LEVELS, read off at any levels (linear from each to the next, and beyond the ends what they have)."""
    return np.interp(levels.double().numpy(), LEVELS.numpy(), effects.numpy())
