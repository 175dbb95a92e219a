"""What a layer sees during calibration, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """One batch of n images at one convolution, all real-valued: what it gets in the quantized network (n, chi, h, w),
    what it makes in the float one (n, cho, h', w'), and how much each of its output positions matters (n, h' w').
    first: the place of the batch's first image in the calibration set."""

    input: Tensor
    float_output: Tensor
    weights: Tensor
    first: int = 0
