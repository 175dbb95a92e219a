"""Write the free integers of one weight in ONNX.

VQK and m are stored as 4-bit integers; Cast, Mul, Cast and Reshape turn them into int8. VQK of 4 bits are INT4. VQK of
other widths are split into pieces of 4 bits, stored as UINT4, and one piece of the remaining bits (6 = 4 + 2). Four
such pieces together form a number of 4, 8 or 12 bits, which a table splits again.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.format import Weight
from dsconvert.dsconv.packing import numbers_of
from dsconvert.dsconv.tensor import block_count

INT32 = TensorProto.INT32


def add_free(b: OnnxBuilder, name: str, weight: Weight, by_blocks: bool) -> str:
    """Write the nodes and initializers of m * VQK; return the name of an int8 value (cho, chi, kh, kw).

    by_blocks: write 4-bit VQK as a DequantizeLinear in blocks.
    """
    if by_blocks and weight.bits == 4:
        return _blocked(b, name, weight)
    shape, blocks, taps = _axes(weight)

    def shift(stored: str) -> str:
        """Return m in the shape in which it multiplies VQK.

        It is one value a block and tap. Where these are not axes of VQK, it is repeated for the VQK that share it.
        """
        value = b.node("Cast", [stored], f"{stored}32", to=INT32)
        if taps is not None:
            return b.node("Gather", [value, b.constant(taps)], f"{stored}.runs", axis=3)
        return _spread(b, value, stored, weight) if _is_ragged(weight) else value

    value = _vqk(b, name, weight, shape)
    kds = b.tensor(f"{name}.kds", weight.m.numpy().reshape(blocks).astype(ml_dtypes.uint4))
    value = b.node("Mul", [value, shift(kds)], f"{name}.scaled")
    value = b.node("Cast", [value], f"{name}.int8", to=TensorProto.INT8)
    whole = tuple(weight.vqk.shape)
    return value if shape == whole else b.node("Reshape", [value, b.shape(*whole)], f"{name}.weight")


def _is_ragged(weight: Weight) -> bool:
    """Return whether the last block is short.

    Blocks cannot be an axis then, and m is repeated over the channels instead.
    """
    return weight.vqk.shape[1] % min(weight.block_size, weight.vqk.shape[1]) != 0


def _axes(weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...], NDArray[np.int64] | None]:
    """Return shapes of VQK and of m in which they can be multiplied, and a table of taps or None.

    Where runs of four VQK go across taps, the table (taps, 4) gives the tap of each member of a run. The m (cho, nblk,
    1, taps) are then looked up by it.
    """
    cho, chi, kh, kw = weight.vqk.shape
    nblk, size, taps = block_count(chi, weight.block_size), min(weight.block_size, chi), kh * kw
    if _is_ragged(weight):
        return (cho, chi, kh, kw), (cho, nblk, 1, kh, kw), None
    if weight.bits % 4 and size % 4 == 0:
        shape = (cho, nblk, size // 4, taps, 4)
        if taps == 1:
            return shape, (cho, nblk, 1, 1, 1), None
        return shape, (cho, nblk, 1, taps), np.arange(4 * taps, dtype=np.int64).reshape(taps, 4) % taps
    if nblk == 1:
        return (cho, chi, kh, kw), (cho, 1, kh, kw), None
    return (cho, nblk, size, kh, kw), (cho, nblk, 1, kh, kw), None


def _blocked(b: OnnxBuilder, name: str, weight: Weight) -> str:
    """Write 4-bit VQK as a DequantizeLinear in blocks."""
    chi = weight.vqk.shape[1]
    whole = chi // weight.block_size * weight.block_size
    edges = [(0, whole), (whole, chi)]
    parts = [_block_range(b, name, weight, first, last) for first, last in edges if first < last]
    real = parts[0] if len(parts) == 1 else b.node("Concat", parts, f"{name}.scaled", axis=1)
    return b.node("Cast", [real], f"{name}.weight", to=TensorProto.INT8)


def _block_range(b: OnnxBuilder, name: str, weight: Weight, first: int, last: int) -> str:
    """Write m * VQK of the input channels first..last, all in blocks of one size, as FLOAT.

    This is exact, as the integers are below 128.
    """
    tail = ".tail" if first else ""
    size = min(weight.block_size, last - first)
    vqk = weight.vqk.numpy()[:, first:last].astype(ml_dtypes.int4)
    m = weight.m.numpy()[:, first // weight.block_size : block_count(last, weight.block_size)]
    kds = b.tensor(f"{name}.kds{tail}", m.astype(ml_dtypes.uint4))
    scale = b.node("Cast", [kds], f"{name}.kds{tail}.f", to=TensorProto.FLOAT)
    stored = b.tensor(f"{name}.vqk{tail}", vqk)
    return b.node("DequantizeLinear", [stored, scale], f"{name}.blocks{tail}", axis=1, block_size=size)


def _vqk(b: OnnxBuilder, name: str, weight: Weight, shape: tuple[int, ...]) -> str:
    """Write VQK as an INT32 value of the given shape: INT4 as it is, other widths as the sum of their pieces."""
    vqk, bits = weight.vqk.numpy().reshape(shape), weight.bits
    if bits == 4:
        return b.node("Cast", [b.tensor(f"{name}.vqk", vqk.astype(ml_dtypes.int4))], f"{name}.vqk32", to=INT32)
    unsigned, total, position = vqk.astype(np.int32) + (1 << bits - 1), "", 0
    widths = [4] * (bits // 4) + [bits % 4] * (bits % 4 > 0)
    for width in widths:
        # the highest piece subtracts the offset that made VQK unsigned
        bottom = -(1 << bits - 1) if position + width == bits else 0
        piece = unsigned >> position & (1 << width) - 1
        part = f"{name}.vqk{position if len(widths) > 1 else ''}"
        value = _piece(b, part, piece, width, 1 << position, bottom)
        total = b.node("Add", [total, value], f"{part}.sum") if total else value
        position += width
    return total


def _piece(b: OnnxBuilder, name: str, piece: NDArray[np.int32], width: int, unit: int, bottom: int) -> str:
    """Write unit * piece + bottom as an INT32 value of the piece's shape.

    Below 4 bits, four integers form one number of 4, 8 or 12 bits, which a table splits again.
    """
    if width == 4:
        value = b.node("Cast", [b.tensor(name, piece.astype(ml_dtypes.uint4))], f"{name}.i", to=INT32)
        if (unit, bottom) == (1, 0):
            return value
        return b.node("Gather", [b.constant(np.arange(16, dtype=np.int32) * unit + bottom), value], f"{name}.t")
    runs = np.pad(piece.reshape(-1), (0, -piece.size % 4)).reshape(-1, 4)
    numbers = numbers_of(runs, width)
    if piece.shape[-1] == 4:
        number = _add_number(b, name, numbers.reshape(piece.shape[:-1]), 4 * width)
        return b.node("Gather", [_table(b, width, unit, bottom), number], f"{name}.t")
    number = _add_number(b, name, numbers, 4 * width)
    value = b.node("Gather", [_table(b, width, unit, bottom), number], f"{name}.t")
    if runs.size > piece.size:
        value = b.node("Reshape", [value, b.shape(-1)], f"{name}.flat")
        value = b.node("Slice", [value, b.shape(0), b.shape(piece.size), b.shape(0)], f"{name}.cut")
    return b.node("Reshape", [value, b.shape(*piece.shape)], f"{name}.all")


def _add_number(b: OnnxBuilder, name: str, numbers: NDArray[np.int32], bits: int) -> str:
    """Write numbers of 4, 8 or 12 bits as an INT32 value, stored as UINT4, UINT8 or both."""
    kind = ml_dtypes.uint4 if bits == 4 else np.uint8
    low = b.node("Cast", [b.tensor(name, (numbers & 255).astype(kind))], f"{name}.i", to=INT32)
    if bits <= 8:
        return low
    stored = b.tensor(f"{name}.high", (numbers >> 8).astype(ml_dtypes.uint4))
    high = b.node("Cast", [stored], f"{name}.high32", to=INT32)
    high = b.node("Mul", [high, b.constant(np.array(256, np.int32))], f"{name}.up")
    return b.node("Add", [low, high], f"{name}.number")


def _table(b: OnnxBuilder, width: int, unit: int, bottom: int) -> str:
    """Return the name of INT32 (16^width, 4): the four integers of each number, times unit plus bottom.

    Nodes compute it, so that the file does not have to store it.
    """
    name = f"table{width}x{unit}"
    if not b.has(name):
        first, end, one = (b.constant(np.array(v, np.int32)) for v in (0, 1 << 4 * width, 1))
        value = b.node("Range", [first, end, one], f"{name}.n")
        value = b.node("Reshape", [value, b.shape(-1, 1)], f"{name}.column")
        value = b.node("Div", [value, b.constant(1 << np.arange(4, dtype=np.int32) * width)], f"{name}.shifted")
        value = b.node("Mod", [value, b.constant(np.array(1 << width, np.int32))], f"{name}.bits")
        value = b.node("Mul", [value, b.constant(np.array(unit, np.int32))], f"{name}.scaled")
        b.node("Add", [value, b.constant(np.array(bottom, np.int32))], name)
    return name


def _spread(b: OnnxBuilder, value: str, name: str, weight: Weight) -> str:
    """Repeat each block's value over its channels: (cho, nblk, 1, kh, kw) -> (cho, chi, kh, kw)."""
    cho, chi, kh, kw = weight.vqk.shape
    nblk, size = block_count(chi, weight.block_size), weight.block_size
    wide = b.node("Expand", [value, b.shape(cho, nblk, size, kh, kw)], f"{name}.wide")
    flat = b.node("Reshape", [wide, b.shape(cho, nblk * size, kh, kw)], f"{name}.flat")
    return b.node("Slice", [flat, b.shape(0), b.shape(chi), b.shape(1)], f"{name}.spread")
