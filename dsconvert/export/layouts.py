"""How one DSConv weight is spelled in ONNX. Every layout yields the same int8 numbers, m * VQK + z.

packed  VQK in its own number of bits and m as UINT4; Cast, Mul, Cast, Reshape give int8, which ONNX Runtime folds
        once at load. 4 bits are INT4; the others are pieces of 4, 2 and 1 bits (6 = 4 + 2), those of 4 UINT4, the
        smaller ones packed into bytes that BitShift and BitwiseAnd take apart. Opset 21 (INT4).
int8    the merged int8 tensor itself. Opset 13 (per-channel DequantizeLinear); runs anywhere, file twice as big.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dsconvert.dsconv.tensor import DSTensor, block_count
from dsconvert.export.builder import OnnxBuilder

LAYOUT_OPSET = {"packed": 21, "int8": 13}


def add_int8_weight(b: OnnxBuilder, name: str, weight: DSTensor, layout: str) -> str:
    """Nodes and initializers for m * VQK + z; returns the name of an int8 value (cho, chi, kh, kw)."""
    if layout == "int8" or weight.is_plain_int8:
        return b.tensor(f"{name}.weight", weight.merged().numpy())
    cho, chi, kh, kw = weight.vqk.shape
    nblk, taps = block_count(chi, weight.block_size), kh * kw
    ragged = chi % weight.block_size != 0 and nblk > 1
    kds = weight.m.numpy().astype(ml_dtypes.uint4).reshape(cho, nblk, 1, taps)
    # a short last block cannot be a block axis: there the shifts are spread over the channels instead
    integers = _vqk(b, name, weight, (cho, chi, taps) if ragged else (cho, nblk, chi // nblk, taps))
    shifts = b.node("Cast", [b.tensor(f"{name}.kds", kds)], f"{name}.kds32", to=TensorProto.INT32)
    spread = _spread if ragged else _keep
    merged = b.node("Mul", [integers, spread(b, shifts, f"{name}.kds", weight)], f"{name}.scaled")
    if weight.z is not None:
        z = b.tensor(f"{name}.kdsb", weight.z.numpy().reshape(cho, nblk, 1, taps))
        z = b.node("Cast", [z], f"{name}.kdsb32", to=TensorProto.INT32)
        merged = b.node("Add", [merged, spread(b, z, f"{name}.kdsb", weight)], f"{name}.shifted")
    flat = b.node("Cast", [merged], f"{name}.int8", to=TensorProto.INT8)
    return b.node("Reshape", [flat, b.shape(cho, chi, kh, kw)], f"{name}.weight")


def _vqk(b: OnnxBuilder, name: str, weight: DSTensor, shape: tuple[int, ...]) -> str:
    """VQK as an INT32 value of the given shape."""
    vqk = weight.vqk.numpy().reshape(shape)
    if weight.bits in (4, 8):
        stored = b.tensor(f"{name}.vqk", vqk.astype(ml_dtypes.int4 if weight.bits == 4 else np.int8))
        return b.node("Cast", [stored], f"{name}.vqk32", to=TensorProto.INT32)
    offset = 1 << (weight.bits - 1)
    rest, unsigned, position = weight.bits, vqk.astype(np.int32) + offset, 0
    total = b.constant(np.array(-offset, np.int32))
    for width in (4, 2, 1):
        if rest < width:
            continue
        rest -= width
        piece = (unsigned >> position & (1 << width) - 1).astype(np.uint8)
        value = _piece(b, f"{name}.vqk{width}", piece, width)
        if position:
            value = b.node("Mul", [value, b.constant(np.array(1 << position, np.int32))], f"{name}.vqk{width}up")
        total = b.node("Add", [value, total], f"{name}.vqk{width}sum")
        position += width
    return total


def _piece(b: OnnxBuilder, name: str, piece: NDArray[np.uint8], width: int) -> str:
    """Unsigned integers of 4, 2 or 1 bits as an INT32 value."""
    if width == 4:
        return b.node("Cast", [b.tensor(name, piece.astype(ml_dtypes.uint4))], f"{name}.i", to=TensorProto.INT32)
    per_byte = 8 // width
    flat = np.pad(piece.reshape(-1), (0, -piece.size % per_byte)).reshape(-1, per_byte)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    stored = b.tensor(name, np.bitwise_or.reduce(flat << shifts, axis=1)[:, None])
    moved = b.node("BitShift", [stored, b.constant(shifts[None])], f"{name}.moved", direction="RIGHT")
    value = b.node("BitwiseAnd", [moved, b.constant(np.array((1 << width) - 1, np.uint8))], f"{name}.bits")
    value = b.node("Cast", [value], f"{name}.i", to=TensorProto.INT32)
    if piece.size % per_byte:
        value = b.node("Reshape", [value, b.shape(-1)], f"{name}.flat")
        value = b.node("Slice", [value, b.shape(0), b.shape(piece.size), b.shape(0)], f"{name}.cut")
    return b.node("Reshape", [value, b.shape(*piece.shape)], f"{name}.all")


def _keep(b: OnnxBuilder, value: str, name: str, weight: DSTensor) -> str:
    return value


def _spread(b: OnnxBuilder, value: str, name: str, weight: DSTensor) -> str:
    """(cho, nblk, 1, taps) -> (cho, chi, taps), each block's value over its channels."""
    cho, chi, kh, kw = weight.vqk.shape
    nblk, taps = block_count(chi, weight.block_size), kh * kw
    wide = b.node("Expand", [value, b.shape(cho, nblk, weight.block_size, taps)], f"{name}.wide")
    flat = b.node("Reshape", [wide, b.shape(cho, nblk * weight.block_size, taps)], f"{name}.flat")
    return b.node("Slice", [flat, b.shape(0), b.shape(chi), b.shape(1)], f"{name}.spread")
