"""What cutting a value's upper end costs, from the gradients that `importance` has anyway.

Rounding errors are of either sign and independent, so their squares add up. Clipping errors are not: where a detector
is sure, many large values are cut together, all downwards, and their effects add up before they are squared. With
g = J^T s the gradient for random signs s and D = min(v, level) - v, E[<g, D>^2] = ||J D||^2 counts that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PER_OCTAVE = 8
LOWEST, HIGHEST = -8, 12  # powers of two
LEVELS = 2.0 ** torch.linspace(LOWEST, HIGHEST, (HIGHEST - LOWEST) * PER_OCTAVE + 1, dtype=torch.float64)
NEAREST = LEVELS.float()
# a float32 is above a level when it is above the largest float32 not above that level
BELOW = torch.where(NEAREST.double() > LEVELS, NEAREST.nextafter(torch.zeros(())), NEAREST)
LEAST_SHARE = 0.1  # of the largest value: nobody cuts below that


def clip_effects(values: Tensor, gradient: Tensor) -> Tensor:
    """<g, min(v, level) - v>^2 for every level of LEVELS, float64, on CPU; v and g of one image, any shape.

    Levels below LEAST_SHARE of the largest value get too little: their values are not looked at."""
    v, g = values.flatten(), gradient.flatten()
    picks = (v > LEAST_SHARE * v.max().clamp_min(0)).nonzero().flatten()
    v, g = v[picks].cpu(), g[picks].cpu()
    over = torch.bucketize(v.float(), BELOW)  # how many levels each value is above
    v, g = v.double(), g.double()
    slope, total = (_above(over, weights) for weights in (g, g * v))
    return (LEVELS * slope - total).square()


def _above(over: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weights of the values above each level."""
    sums = torch.bincount(over, weights, minlength=len(LEVELS) + 1)
    return sums.flip(0).cumsum(0).flip(0)[1:]


def effect_at(effects: Tensor, level: float) -> float:
    """Effects by LEVELS, read off at any level (linear in its logarithm)."""
    at = (math.log2(max(level, 1e-30)) - LOWEST) * PER_OCTAVE
    below = min(max(math.floor(at), 0), len(effects) - 2)
    share = min(max(at - below, 0.0), 1.0)
    return float(effects[below] * (1 - share) + effects[below + 1] * share)
