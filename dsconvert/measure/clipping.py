"""Measure what clipping a value's upper end costs, from the gradients that `importance` computes anyway.

Rounding errors have either sign and are independent, so their squares add up. Clipping errors are all negative: where a
detector is confident, many large values are clipped at once, and their effects add up before they are squared. With the
value v, the gradient g = J^T s for random signs s, and the clipping error D = min(v, level) - v,

    E[<g, D>^2] = ||J D||^2

measures this joint effect on the network's result.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PER_OCTAVE = 8  # levels between a power of two and the next
LOWEST, HIGHEST = -8, 12  # the lowest and the highest level, as powers of two
COUNT = (HIGHEST - LOWEST) * PER_OCTAVE + 1
# Levels are evenly spaced between two powers of two. So the bits of a float32 above SHIFT are the number of its level.
LEVELS = torch.tensor(
    [math.ldexp(1 + i % PER_OCTAVE / PER_OCTAVE, LOWEST + i // PER_OCTAVE) for i in range(COUNT)],
    dtype=torch.float64,
)
SHIFT = 23 - int(math.log2(PER_OCTAVE))
FIRST = (int(LEVELS[:1].float().view(torch.int32)) >> SHIFT) - 1  # the number just below the lowest level's
LEAST_SHARE = 0.1  # ranges are not cut below this share of the largest value


def clip_effects(values: Tensor, gradient: Tensor) -> Tensor:
    """Return <g, min(v, level) - v>^2 for every level of LEVELS, float64 on CPU.

    Results for levels below LEAST_SHARE of the largest value are too small, as values below it are skipped.

    values, gradient: v and g of one image, of one shape.
    """
    from dsconvert.base import loops  # numba takes a while to import

    v, g = values.flatten().cpu().numpy(), gradient.flatten().cpu().numpy()
    sums = np.zeros((2, COUNT + 1))
    least = np.float32(LEAST_SHARE * max(float(v.max()), 0.0))
    loops.sum_by_level(v, v.view(np.int32), g, least, SHIFT, FIRST, sums[0], sums[1])
    # <g, min(v, l) - v> = l * (sum of g over v > l) - (sum of g v over v > l): cumulative sums from the top
    slope, total = (torch.from_numpy(s[::-1].cumsum()[-2::-1].copy()) for s in sums)
    return (LEVELS * slope - total).square()


def effects_at(effects: Tensor, levels: Tensor) -> NDArray[np.float64]:
    """Interpolate effects given at LEVELS linearly at other levels; beyond the ends the nearest effect is taken."""
    return np.interp(levels.double().numpy(), LEVELS.numpy(), effects.numpy())
