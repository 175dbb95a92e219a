"""What a layer sees during calibration, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsconvert.graph.integer import QParams


@dataclass(frozen=True)
class Seen:
    """One batch of n images at one convolution: what it gets in the quantized network (n, chi, h, w), as integers on a
    grid or, without one, real; what it makes in the float one (n, cho, h', w'), in any precision; and how much each of
    its output positions matters (n, h' w'). first: the place of the batch's first image in the calibration set."""

    input: Tensor
    float_output: Tensor
    weights: Tensor
    first: int = 0
    grid: QParams | None = None

    @property
    def zero(self) -> int:
        """What stands for 0 in the input."""
        return self.grid.zero_point if self.grid else 0

    def real(self, values: Tensor) -> Tensor:
        """Real values, float32, of any of the input's."""
        values = values.to(torch.float32, copy=True)
        return values.sub_(self.grid.zero_point).mul_(self.grid.scale) if self.grid else values
