"""The length of an output channel, which few bits shorten."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 4.0  # times as long a fitted channel may become


def unshrunk(weight: Tensor, fitted: Tensor) -> Tensor:
    """Fitted (cho, chi, kh, kw), every output channel scaled so that <fitted, W> = <W, W>.

    The nearest weights of few bits are short ones (at 1 bit by 0.4), an error that is no noise: the outputs shrink with
    them. The fit's CDSw, which is for the outputs, leaves noise alone, and that is what is judged here."""
    w, f = weight.flatten(1), fitted.flatten(1)
    along = (w * f).sum(1)
    scale = torch.where(along > 0, w.square().sum(1) / along.clamp_min(1e-30), torch.ones_like(along))
    return fitted * scale.clamp_max(MOST)[:, None, None, None]
