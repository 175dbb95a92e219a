"""Formats and fits of weights in few words."""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.dsconv.codes import FREE, REAL, TRELLIS
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.gptq import fit_weight_gptq
from dsconvert.fit.moments import Moments


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def free(bits: int, block_size: int, trellis: bool = False) -> WeightFormat:
    """Of free integers, or along a trellis."""
    return WeightFormat(bits, block_size, TRELLIS if trellis else FREE)


def along(bits: int, block_size: int) -> WeightFormat:
    """Along a trellis."""
    return free(bits, block_size, True)


def fit_weight(weight: Tensor, bits: int, block_size: int, trellis: bool = False) -> DSTensor:
    """The weight of least squared error."""
    return DSTensor.nearest(weight, free(bits, block_size, trellis))


def gptq(
    weight: Tensor, moments: Moments, bits: int, block_size: int, channels: Tensor | None = None, trellis: bool = False
) -> DSTensor:
    """What GPTQ makes of a weight."""
    return fit_weight_gptq(weight, moments, free(bits, block_size, trellis), channels)


def fit_weight_real(weight: Tensor, bits: int, block_size: int) -> DSTensor:
    """The weight of least squared error with real KDS."""
    return DSTensor.nearest(weight, WeightFormat(bits, block_size, REAL))


def nearest(weight: Tensor, format: WeightFormat) -> DSTensor:
    """The weight of least squared error in a format."""
    return DSTensor.nearest(weight, format)


def largest_pair(merged: Tensor) -> int:
    """Largest |w1 + w2| over neighbouring channels of the int8 weight (cho, chi, kh, kw), at least the largest |w|.

    With an odd chi engines differ in who is whose neighbour, and any two weights of an output channel count."""
    w = merged.int()
    if w.shape[1] % 2 == 0:
        return max(int((w[:, 0::2] + w[:, 1::2]).abs().max()), int(w.abs().max()))
    return 2 * int(w.abs().max())
