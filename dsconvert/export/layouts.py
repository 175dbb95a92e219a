"""How one DSConv weight is spelled in ONNX. Every layout yields the same int8 numbers, m * VQK + z.

packed  VQK as INT4 (INT8 above 4 bits) and m as UINT4; Cast, Mul, Cast, Reshape give int8, which ONNX Runtime
        folds once at load. Opset 21 (INT4).
int8    the merged int8 tensor itself. Opset 13 (per-channel DequantizeLinear); runs anywhere, file twice as big.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
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
    vqk = weight.vqk.numpy().astype(ml_dtypes.int4 if weight.bits <= 4 else np.int8)
    kds = weight.m.numpy().astype(ml_dtypes.uint4).reshape(cho, nblk, 1, taps)
    # a short last block cannot be a block axis: there the shifts are spread over the channels instead
    vqk = vqk.reshape(cho, chi, taps) if ragged else vqk.reshape(cho, nblk, -1, taps)
    integers = b.node("Cast", [b.tensor(f"{name}.vqk", vqk)], f"{name}.vqk32", to=TensorProto.INT32)
    shifts = b.node("Cast", [b.tensor(f"{name}.kds", kds)], f"{name}.kds32", to=TensorProto.INT32)
    spread = _spread if ragged else _keep
    merged = b.node("Mul", [integers, spread(b, shifts, f"{name}.kds", weight)], f"{name}.scaled")
    if weight.z is not None:
        z = b.tensor(f"{name}.kdsb", weight.z.numpy().reshape(cho, nblk, 1, taps))
        z = b.node("Cast", [z], f"{name}.kdsb32", to=TensorProto.INT32)
        merged = b.node("Add", [merged, spread(b, z, f"{name}.kdsb", weight)], f"{name}.shifted")
    flat = b.node("Cast", [merged], f"{name}.int8", to=TensorProto.INT8)
    return b.node("Reshape", [flat, b.shape(cho, chi, kh, kw)], f"{name}.weight")


def _keep(b: OnnxBuilder, value: str, name: str, weight: DSTensor) -> str:
    return value


def _spread(b: OnnxBuilder, value: str, name: str, weight: DSTensor) -> str:
    """(cho, nblk, 1, taps) -> (cho, chi, taps), each block's value over its channels."""
    cho, chi, kh, kw = weight.vqk.shape
    nblk, taps = block_count(chi, weight.block_size), kh * kw
    wide = b.node("Expand", [value, b.shape(cho, nblk, weight.block_size, taps)], f"{name}.wide")
    flat = b.node("Reshape", [wide, b.shape(cho, nblk * weight.block_size, taps)], f"{name}.flat")
    return b.node("Slice", [flat, b.shape(0), b.shape(chi), b.shape(1)], f"{name}.spread")
