"""VQK along a trellis, as a code.

`trellis_table` explains what a trellis is, and `trellis_search` how VQK along one are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.dsconv.codes import trellis_table
from dsconvert.dsconv.codes.shrink import MOST
from dsconvert.dsconv.codes.trellis_search import nearest, round_strings, starting, suited
from dsconvert.dsconv.codes.trellis_table import from_strings, strings, table, windows
from dsconvert.dsconv.format import Code, Floats, Joint, JointLayer, Parts, Weight, WeightFormat
from dsconvert.dsconv.packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from dsconvert.base.builder import OnnxBuilder


class Trellis(Code):
    """VQK of 1 to 4 bits along a trellis. What is stored of a weight is its part of the string of bits, uint8."""

    name = "trellis"
    stored_as = torch.uint8
    part = "code"
    has_zero = False

    def limits(self, bits: int) -> tuple[int, int]:
        """Return the limits of the table's integers."""
        if not 1 <= bits <= 4:
            raise ValueError(f"bits must be 1 to 4 along a trellis, got {bits}")
        return -trellis_table.largest(bits), trellis_table.largest(bits)

    def fits(self, bits: int, chi: int, block_size: int) -> bool:
        return trellis_table.fits(bits, chi, block_size)

    def values(self, stored: Tensor, format: WeightFormat) -> Tensor:
        bits, block_size, chi = format.bits, format.block_size, stored.shape[1]
        if not self.fits(bits, chi, block_size):
            raise ValueError(f"{chi} channels in blocks of {block_size} have no trellis of {bits} bits")
        if stored.dtype != torch.uint8:
            raise ValueError(f"codes are uint8, not {stored.dtype}")
        if stored.numel() and int(stored.max()) >> bits:
            raise ValueError(f"codes leave {bits} bits")
        found = torch.from_numpy(table(bits).copy())[windows(strings(stored, block_size), bits).long()]
        return from_strings(found, tuple(stored.shape), block_size)

    def quiet(self, shape: Sequence[int], format: WeightFormat) -> Tensor:
        cho, chi, kh, kw = shape
        row = trellis_table.quiet(format.bits, chi * kh * kw).expand(cho, -1)
        return from_strings(row, (cho, chi, kh, kw), format.block_size)

    def order(self, shape: Sequence[int], format: WeightFormat, energy: Tensor) -> list[Tensor]:
        """Return the columns in the string's order: a weight's bits limit what the next weights can be."""
        _, chi, kh, kw = shape
        columns = torch.arange(chi * kh * kw).reshape(1, chi, kh, kw)
        return list(strings(columns, format.block_size)[0].split(format.size(chi)))

    def start(self, target: Tensor, format: WeightFormat) -> Tensor:
        groups = strings(target, format.block_size).unflatten(1, (-1, format.size(target.shape[1])))
        return torch.from_numpy(starting(groups.square().mean(-1).sqrt().numpy(), format.bits))

    def round(
        self, target: Floats, cds: Floats, upper: Floats, lengths: Sequence[int], format: WeightFormat
    ) -> tuple[Tensor, Tensor]:
        return round_strings(target, cds, upper, lengths[0], format.bits)

    def nearest(self, weight: Tensor, format: WeightFormat) -> Parts:
        cho, chi, kh, kw = weight.shape
        size = format.size(chi)
        found, m, cds = nearest(strings(weight.detach().cpu(), format.block_size), size, format.bits)
        code = from_strings(found, (cho, chi, kh, kw), format.block_size)
        return Parts(code, m.reshape(cho, -1, kh, kw).to(torch.int8), cds.float())

    def damage(self, weight: Tensor, format: WeightFormat, squares: Tensor) -> float:
        """Return sum g^2 D^2 for the errors D that a trellis is expected to leave.

        All errors of a block at a tap have one mean square E, which follows from the root mean square of the block's
        weights (see `trellis_search.suited`). The nearest string is shorter than the weight. Scaled back to the
        weight's length (see `shrink.unshrunk`), its error becomes

            E / (1 - sum E / sum P),    P: the weight's mean square, sums over the output channel

        since the error of the nearest string is orthogonal to it.
        """
        blocks = blocks_of(weight, format)
        power = blocks.square().mean(-1)
        rms = power.sqrt().numpy()
        errors = torch.from_numpy(suited(rms, starting(rms, format.bits), format.bits)[1])
        left = 1 - errors.sum(1, keepdim=True) / power.sum(1, keepdim=True).clamp_min(1e-30)
        expected = errors / left.clamp_min(1 / MOST)
        return float((expected * blocks_of(squares, format).sum(-1)).sum())

    def pack(self, stored: Tensor, format: WeightFormat) -> NDArray[np.uint8]:
        return pack_bits(strings(stored, format.block_size).contiguous().numpy(), format.bits)

    def unpack(self, packed: NDArray[np.uint8], shape: Sequence[int], format: WeightFormat) -> Tensor:
        cho, chi, kh, kw = shape
        symbols = unpack_bits(packed, format.bits, (cho, chi * kh * kw), signed=False).view(np.uint8)
        return from_strings(torch.from_numpy(symbols), (cho, chi, kh, kw), format.block_size)

    joint_bits = (1, 2, 3, 4)
    label = "trellis"

    def spell(self, b: OnnxBuilder, name: str, weight: Weight, by_blocks: bool) -> str:
        from dsconvert.dsconv.codes.trellis_onnx import add_trellis  # onnx takes a while to import

        return add_trellis(b, name, weight)

    def spell_rows(self, joint: Joint, group: Sequence[JointLayer], layers: Sequence[JointLayer], label: str) -> str:
        from dsconvert.dsconv.codes.trellis_onnx import add_rows

        return add_rows(joint, group, layers, label)


TRELLIS = Trellis()


def blocks_of(x: Tensor, format: WeightFormat) -> Tensor:
    """Reshape (cho, chi, kh, kw) to float64 (cho, blocks, size); the numbers of a block share an m."""
    return strings(x.detach().cpu().double(), format.block_size).unflatten(1, (-1, format.size(x.shape[1])))
