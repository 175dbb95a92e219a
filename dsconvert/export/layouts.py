"""How one DSConv weight is spelled in ONNX. Every layout yields the same int8 numbers, m * VQK + z.

packed  VQK in its own number of bits and m as UINT4; Cast, Mul, Cast, Reshape give int8, which ONNX Runtime folds
        once at load. 4 bits are INT4; the others are pieces of 4, 2 and 1 bits (6 = 4 + 2), those of 4 UINT4, the
        smaller ones two or four to a UINT4, which Div and Mod take apart. Opset 21 (INT4).
blocked 4-bit VQK -> DequantizeLinear in blocks of channels, its scale m -> Cast INT8: the operator ONNX has for block
        scales. OpenVINO folds it; ONNX Runtime computes it anew in every inference. A short last block is stored as a
        tensor of its own (OpenVINO refuses ragged blocks). Other widths are spelled as in packed: OpenVINO folds
        those too, but a blocked DequantizeLinear of INT8 it leaves beside a float convolution. Opset 21.
int8    the merged int8 tensor itself. Opset 13 (per-channel DequantizeLinear); runs anywhere, file twice as big.

OpenVINO folds constants of 4 bits and casts of them, but leaves INT8 and UINT8 constants as they are and then
convolves in float. So the chains start from INT4 and UINT4 (z excepted, which is added late and does no harm), and
every layout becomes the same int8 convolution in both engines.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dsconvert.dsconv.tensor import DSTensor, block_count
from dsconvert.export.builder import OnnxBuilder

LAYOUT_OPSET = {"packed": 21, "blocked": 21, "int8": 13}


def add_int8_weight(b: OnnxBuilder, name: str, weight: DSTensor, layout: str) -> str:
    """Nodes and initializers for m * VQK + z; returns the name of an int8 value (cho, chi, kh, kw)."""
    if layout == "int8" or weight.is_plain_int8:
        return b.tensor(f"{name}.weight", weight.merged().numpy())
    if layout == "blocked" and weight.bits == 4:
        return _blocked(b, name, weight)
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


def _blocked(b: OnnxBuilder, name: str, weight: DSTensor) -> str:
    """The chain of layout blocked; VQK has 4 bits."""
    cho, chi, kh, kw = weight.vqk.shape
    whole = chi // weight.block_size * weight.block_size
    edges = [(0, whole), (whole, chi)]
    parts = [_block_range(b, name, weight, first, last) for first, last in edges if first < last]
    real = parts[0] if len(parts) == 1 else b.node("Concat", parts, f"{name}.scaled", axis=1)
    if weight.z is not None:
        z = weight.z.numpy().reshape(cho, -1, 1, kh * kw)
        z_real = b.node("Cast", [b.tensor(f"{name}.kdsb", z)], f"{name}.kdsb32", to=TensorProto.FLOAT)
        spread = _spread(b, z_real, f"{name}.kdsb", weight)
        shaped = b.node("Reshape", [spread, b.shape(cho, chi, kh, kw)], f"{name}.kdsb4d")
        real = b.node("Add", [real, shaped], f"{name}.shifted")
    return b.node("Cast", [real], f"{name}.weight", to=TensorProto.INT8)


def _block_range(b: OnnxBuilder, name: str, weight: DSTensor, first: int, last: int) -> str:
    """m * VQK of the input channels first..last, all in blocks of one size, as FLOAT (exact: below 128)."""
    tail = ".tail" if first else ""
    size = min(weight.block_size, last - first)
    vqk = weight.vqk.numpy()[:, first:last].astype(ml_dtypes.int4)
    m = weight.m.numpy()[:, first // weight.block_size : block_count(last, weight.block_size)]
    kds = b.tensor(f"{name}.kds{tail}", m.astype(ml_dtypes.uint4))
    scale = b.node("Cast", [kds], f"{name}.kds{tail}.f", to=TensorProto.FLOAT)
    stored = b.tensor(f"{name}.vqk{tail}", vqk)
    return b.node("DequantizeLinear", [stored, scale], f"{name}.blocks{tail}", axis=1, block_size=size)


def _vqk(b: OnnxBuilder, name: str, weight: DSTensor, shape: tuple[int, ...]) -> str:
    """VQK as an INT32 value of the given shape."""
    vqk = weight.vqk.numpy().reshape(shape)
    if weight.bits == 4:
        stored = b.tensor(f"{name}.vqk", vqk.astype(ml_dtypes.int4))
        return b.node("Cast", [stored], f"{name}.vqk32", to=TensorProto.INT32)
    offset = 1 << (weight.bits - 1)
    rest, unsigned, position = weight.bits, vqk.astype(np.int32) + offset, 0
    total = b.constant(np.array(-offset, np.int32))
    for width in (4, 2, 1):
        while rest >= width:
            rest -= width
            piece = (unsigned >> position & (1 << width) - 1).astype(np.int32)
            part = f"{name}.vqk{position}"
            value = _piece(b, part, piece, width)
            if position:
                value = b.node("Mul", [value, b.constant(np.array(1 << position, np.int32))], f"{part}.up")
            total = b.node("Add", [value, total], f"{part}.sum")
            position += width
    return total


def _piece(b: OnnxBuilder, name: str, piece: NDArray[np.int32], width: int) -> str:
    """Unsigned integers of 4, 2 or 1 bits as an INT32 value."""
    if width == 4:
        return b.node("Cast", [b.tensor(name, piece.astype(ml_dtypes.uint4))], f"{name}.i", to=TensorProto.INT32)
    per_nibble = 4 // width
    flat = np.pad(piece.reshape(-1), (0, -piece.size % per_nibble)).reshape(-1, per_nibble)
    powers = 1 << np.arange(0, 4, width, dtype=np.int32)[None]
    stored = b.tensor(name, (flat * powers).sum(1, keepdims=True).astype(ml_dtypes.uint4))
    value = b.node("Cast", [stored], f"{name}.i", to=TensorProto.INT32)
    value = b.node("Div", [value, b.constant(powers)], f"{name}.moved")
    value = b.node("Mod", [value, b.constant(np.array(1 << width, np.int32))], f"{name}.bits")
    if piece.size % per_nibble:
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
