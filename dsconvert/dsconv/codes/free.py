"""Free integers: every VQK is any integer of the given bits, in two's complement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.base.threads import shared, threads_for
from dsconvert.dsconv.codes.free_search import fit_weight, from_blocks, relieve_pairs, to_blocks
from dsconvert.dsconv.codes.shrink import unshrunk
from dsconvert.dsconv.format import INT8_MAX, Code, Floats, Joint, JointLayer, Parts, Weight, WeightFormat
from dsconvert.dsconv.packing import pack_bits, unpack_bits
from dsconvert.dsconv.tensor import DSTensor, block_count

if TYPE_CHECKING:
    from dsconvert.base.builder import OnnxBuilder


class Free(Code):
    """Free integers of 2 to 8 bits."""

    name = "free"
    marked = False  # this is the code of layers for which a file names none
    movable = True

    def limits(self, bits: int) -> tuple[int, int]:
        """Return two's complement limits, except that 8 bits stop at -127 (see INT8_MAX)."""
        if not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {bits}")
        return max(-(2 ** (bits - 1)), -INT8_MAX), 2 ** (bits - 1) - 1

    def fits(self, bits: int, chi: int, block_size: int) -> bool:
        return 2 <= bits <= 8

    def values(self, stored: Tensor, format: WeightFormat) -> Tensor:
        return stored

    def order(self, shape: Sequence[int], format: WeightFormat, energy: Tensor) -> list[Tensor]:
        """Sort blocks, and columns within a block, by falling input energy.

        Later columns compensate the errors of earlier ones.
        """
        _, chi, kh, kw = shape
        columns = torch.arange(chi * kh * kw).reshape(chi, kh * kw)
        size = format.block_size
        groups = [columns[b * size : (b + 1) * size, t]
                  for b in range(block_count(chi, size)) for t in range(kh * kw)]  # fmt: skip
        groups = [g[torch.argsort(energy[g], descending=True, stable=True)] for g in groups]
        return sorted(groups, key=lambda g: -float(energy[g].mean()))

    def round(
        self, target: Floats, cds: Floats, upper: Floats, lengths: Sequence[int], format: WeightFormat
    ) -> tuple[Tensor, Tensor]:
        w, vqk = target.copy(), np.empty_like(target)
        chosen = np.empty((len(lengths), len(w)))
        ends = np.cumsum(lengths)
        for m, length, end in zip(chosen, lengths, ends, strict=True):
            group = slice(int(end) - length, int(end))
            m[:], vqk[:, group], errors = self.group(w[:, group], cds, upper[group, group], format)
            # GPTQ's update: subtract this group's errors, times their part of the factor, from all later columns
            rest, factor = torch.from_numpy(w)[:, group.stop :], torch.from_numpy(upper)[group, group.stop :]
            rest.addmm_(torch.from_numpy(errors), factor, alpha=-1)
        return torch.from_numpy(vqk).to(torch.int8), torch.from_numpy(chosen)

    def group(self, w: Floats, cds: Floats, upper: Floats, format: WeightFormat) -> tuple[Floats, Floats, Floats]:
        """Round one group's columns with every m, and keep for each output channel the m that adds least to J.

        w: (cho, n), the columns.
        cds: CDSw, (cho,).
        upper: (n, n), the group's part of the Cholesky factor.

        Returns m (cho,), VQK (cho, n), and the errors (cho, n) divided by the factor's diagonal. The sum of their
        squares is what the group adds to J, and later columns compensate them.
        """
        from dsconvert.base import loops  # numba takes a while to import

        m, vqk, errors = np.empty(len(w)), np.empty(w.shape), np.empty(w.shape)
        limits: Any = map(float, (*format.limits, format.most_m))
        given = (w, np.ascontiguousarray(cds), np.ascontiguousarray(upper), *limits)
        shared(len(w), lambda first, last: loops.round_columns(first, last, *given, m, vqk, errors))
        return m, vqk, errors

    def settled(self, stored: Tensor, format: WeightFormat) -> Tensor:
        blocks = to_blocks(stored.double(), format.block_size)
        return from_blocks(relieve_pairs(blocks, format.bits), *stored.shape[1:]).to(torch.int8)

    def nearest(self, weight: Tensor, format: WeightFormat) -> Parts:
        return fit_weight(weight, format)

    def damage(self, weight: Tensor, format: WeightFormat, squares: Tensor) -> float:
        """Return sum g^2 D^2 for the errors D of a quick least-squares fit."""
        return float(squares.flatten() @ weight_error(weight, format).flatten().square())

    def pack(self, stored: Tensor, format: WeightFormat) -> NDArray[np.uint8]:
        return pack_bits(stored.numpy(), format.bits)

    def unpack(self, packed: NDArray[np.uint8], shape: Sequence[int], format: WeightFormat) -> Tensor:
        return torch.from_numpy(unpack_bits(packed, format.bits, tuple(shape)))

    joint_bits: tuple[int, ...] = (4, 5, 6)
    rows_together = 2
    label = "bits"

    def spell(self, b: OnnxBuilder, name: str, weight: Weight, by_blocks: bool) -> str:
        from dsconvert.dsconv.codes.free_onnx import add_free  # onnx takes a while to import

        return add_free(b, name, weight, by_blocks)

    def spell_rows(self, joint: Joint, group: Sequence[JointLayer], layers: Sequence[JointLayer], label: str) -> str:
        from dsconvert.dsconv.codes.free_joint import add_rows

        return add_rows(joint, group, layers, label)


FREE = Free()


def weight_error(weight: Tensor, format: WeightFormat) -> Tensor:
    """Return W' - W (cho, chi, kh, kw), with output channels scaled to their original length (see `shrink`)."""
    with threads_for(weight.numel()):
        # many bits are best at 1.0, which clips nothing; few bits at 0.8
        fitted = DSTensor(*fit_weight(weight, format, starts=(1.0, 0.8), rounds=1), format).weight().to(weight)
        return unshrunk(weight, fitted) - weight
