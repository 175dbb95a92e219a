"""Activation grids: which real numbers the uint8 integers of a tensor stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

QMAX = 255
SURE = 5.0  # a logit with sigmoid 0.993; grids of scores reach at least this far, however few objects the images show


@dataclass(frozen=True)
class QParams:
    """Activation grid of one tensor (uint8 quantization parameters): real = scale * (q - zero_point)."""

    scale: float
    zero_point: int

    @staticmethod
    def of_range(low: float, high: float) -> QParams:
        """Return the grid that spans [low, high], widened to hold zero exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max(high - low, 1e-6) / QMAX))
        return QParams(scale, int(np.clip(round(-low / scale), 0, QMAX)))

    def quantize(self, x: Tensor) -> Tensor:
        """Round real numbers to integers 0..255, carried as float32."""
        return (x / self.scale).round_().add_(self.zero_point).clamp_(0, QMAX)

    def dequantize(self, q: Tensor) -> Tensor:
        """Turn integers into real numbers."""
        return (q - self.zero_point) * self.scale


SIGMOID = QParams(float(np.float32(1 / 255)), 0)  # the sigmoid inside SiLU lies in 0..1
