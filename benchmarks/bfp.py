"""Block floating point activations and DSConv's own integer arithmetic (arXiv 1901.01928, sections 3.2 to 3.4).

The paper's activations share an exponent over a block of channels at one position, and keep a short signed mantissa:

    x ~ mantissa * 2^exponent,   |mantissa| <= 2^(bits - 1) - 1

so a convolution is integer products and sums within a block, one multiplication by alpha and the exponent for each
block, and a sum over blocks. ONNX has no such convolution: here it is simulated in torch, and written down in numpy the
way a kernel would compute it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dsconvert.dsconv.tensor import block_count, expand_blocks

LEAST_BITS, MOST_BITS = 3, 8


@dataclass(frozen=True)
class BlockFloat:
    """mantissa (n, chi, h, w) and exponent (n, nblk, h, w), both int32."""

    mantissa: Tensor
    exponent: Tensor
    block_size: int

    def real(self) -> Tensor:
        """The values, float32: exact, as a mantissa has at most 8 bits."""
        exponent = expand_blocks(self.exponent, self.mantissa.shape[1], self.block_size)
        return torch.ldexp(self.mantissa.float(), exponent)


def to_block_float(x: Tensor, bits: int, block_size: int = 32) -> BlockFloat:
    """x (n, chi, h, w) in blocks of channels, rounded to the nearest; the largest value of a block sets its exponent.

    Raises ValueError for bits (sign included) outside 3..8."""
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"{bits} bits is not a mantissa of {LEAST_BITS} to {MOST_BITS}")
    chi = x.shape[1]
    blocks = block_count(chi, block_size)
    padded = F.pad(x, (0, 0, 0, 0, 0, blocks * block_size - chi))
    largest = padded.unflatten(1, (blocks, block_size)).abs().amax(2)
    # frexp gives largest in [0.5, 1) * 2^e: its leading bit becomes the mantissa's highest
    exponent = torch.frexp(largest).exponent - (bits - 1)
    step = expand_blocks(exponent, chi, block_size)
    most = (1 << (bits - 1)) - 1
    return BlockFloat(torch.ldexp(x, -step).round().clamp(-most, most).int(), exponent, block_size)


def integer_dsconv(
    x: BlockFloat, vqk: NDArray[np.int8], alpha: NDArray[np.float64], stride: int = 1, padding: int = 0
) -> NDArray[np.float64]:
    """The convolution as the paper's hardware does it, groups 1: (n, cho, h', w'), before CDSw and CDSb.

    vqk (cho, chi, kh, kw), alpha (cho, nblk, kh, kw). Every block's products are added up in int32."""
    size, (cho, chi, kh, kw) = x.block_size, vqk.shape
    edge = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    mantissa = np.pad(x.mantissa.numpy(), edge)
    exponent = np.pad(x.exponent.numpy(), edge)
    height, width = ((n - k) // stride + 1 for n, k in zip(mantissa.shape[2:], (kh, kw), strict=True))
    out = np.zeros((len(mantissa), cho, height, width))
    for row in range(kh):
        for column in range(kw):
            here = (slice(row, row + height * stride, stride), slice(column, column + width * stride, stride))
            for block in range(block_count(chi, size)):
                part = slice(block * size, min((block + 1) * size, chi))
                weights = vqk[:, part, row, column].astype(np.int32)
                sums = np.einsum("oc,nchw->nohw", weights, mantissa[:, part, *here])  # int32
                scale = np.ldexp(1.0, exponent[:, block, *here])[:, None] * alpha[:, block, row, column, None, None]
                out += sums * scale
    return out
