"""Undo the shrinking of output channels that rounding to few bits causes."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 4.0  # a channel is made at most so many times longer


def unshrunk(weight: Tensor, fitted: Tensor) -> Tensor:
    """Scale every output channel of a fitted weight so that <fitted, W> = <W, W>.

    The nearest weight of few bits is shorter than W (at 1 bit by a factor of 0.4). This error is not noise: outputs
    shrink by the same factor. The fit chooses CDSw for the outputs, so only noise is left. Estimates of damage should
    judge this noise, so they undo the shrinking first.

    weight, fitted: (cho, chi, kh, kw).
    """
    w, f = weight.flatten(1), fitted.flatten(1)
    along = (w * f).sum(1)
    scale = torch.where(along > 0, w.square().sum(1) / along.clamp_min(1e-30), torch.ones_like(along))
    return fitted * scale.clamp_max(MOST)[:, None, None, None]
