"""How VQK in runs of four (see `dsconv.runs`) are spelled in ONNX.

A run is stored as its row among all runs: UINT4 at 1 bit, UINT8 at 2 bits, UINT8 and UINT4 at 3. One Gather from the
table of all runs gives VQK, behind the taps; a Transpose puts the taps last again. Large tables are computed at load:
all vectors of the cube around the ball, of which a TopK finds those in the ball with an odd sum, in order (a NonZero
would, too, but ONNX Runtime does not fold it).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dsconvert.dsconv.runs import LONGEST, RUN, largest, vectors
from dsconvert.dsconv.tensor import DSTensor, block_count
from dsconvert.export.builder import OnnxBuilder

INT8, INT32 = TensorProto.INT8, TensorProto.INT32


def add_runs(b: OnnxBuilder, name: str, weight: DSTensor) -> str:
    """Nodes and initializers for m * VQK of a weight in runs; returns the name of an int8 value (cho, chi, kh, kw)."""
    cho, chi, kh, kw = weight.vqk.shape
    taps, nblk = kh * kw, block_count(chi, weight.block_size)
    in_block = min(weight.block_size, chi) // RUN
    ragged = chi // RUN != nblk * in_block
    shape = (cho, chi // RUN, taps) if ragged else (cho, nblk, in_block, taps)
    stored = weight.run_rows().reshape(shape)
    rows = add_number(b, f"{name}.vqk", stored, RUN * weight.bits)
    value = b.node("Gather", [_table(b, weight.bits), rows], f"{name}.runs")
    kds = weight.m.numpy().reshape(cho, nblk, 1, taps, 1).astype(ml_dtypes.uint4)
    m = b.node("Cast", [b.tensor(f"{name}.kds", kds)], f"{name}.kds32", to=INT32)
    if ragged:
        m = b.node("Expand", [m, b.shape(cho, nblk, in_block, taps, 1)], f"{name}.kds.wide")
        m = b.node("Reshape", [m, b.shape(cho, nblk * in_block, taps, 1)], f"{name}.kds.flat")
        m = b.node("Slice", [m, b.shape(0), b.shape(chi // RUN), b.shape(1)], f"{name}.kds.spread")
    value = b.node("Mul", [value, m], f"{name}.scaled")
    value = b.node("Cast", [value], f"{name}.int8", to=INT8)
    if taps > 1:
        axes = list(range(len(shape) - 1))
        value = b.node("Transpose", [value], f"{name}.taps", perm=[*axes, len(shape), len(shape) - 1])
    return b.node("Reshape", [value, b.shape(cho, chi, kh, kw)], f"{name}.weight")


def add_number(b: OnnxBuilder, name: str, numbers: NDArray[np.int32], bits: int) -> str:
    """Numbers of 4, 8 or 12 bits as an INT32 value: UINT4, UINT8, or both."""
    kind = ml_dtypes.uint4 if bits == 4 else np.uint8
    low = b.node("Cast", [b.tensor(name, (numbers & 255).astype(kind))], f"{name}.i", to=INT32)
    if bits <= 8:
        return low
    stored = b.tensor(f"{name}.high", (numbers >> 8).astype(ml_dtypes.uint4))
    high = b.node("Cast", [stored], f"{name}.high32", to=INT32)
    high = b.node("Mul", [high, b.constant(np.array(256, np.int32))], f"{name}.up")
    return b.node("Add", [low, high], f"{name}.number")


def _table(b: OnnxBuilder, bits: int) -> str:
    """(count, 4) INT32: `dsconv.runs.vectors`."""
    name, most = f"runs{bits}", largest(bits)
    if bits == 1:
        return b.constant(vectors(bits).astype(np.int32))
    if not b.has(name):
        side = 2 * most + 1
        first, end, one = (b.constant(np.array(v, np.int32)) for v in (0, side**RUN, 1))
        number = b.node("Range", [first, end, one], f"{name}.n")
        value = b.node("Reshape", [number, b.shape(-1, 1)], f"{name}.column")
        places = (side ** np.arange(RUN - 1, -1, -1)).astype(np.int32)
        value = b.node("Div", [value, b.constant(places)], f"{name}.shifted")
        value = b.node("Mod", [value, b.constant(np.array(side, np.int32))], f"{name}.digits")
        value = b.node("Sub", [value, b.constant(np.array(most, np.int32))], f"{name}.cube")
        square = b.node("Mul", [value, value], f"{name}.squares")
        length = b.node("ReduceSum", [square, b.shape(1)], f"{name}.length", keepdims=0)
        odd = b.node("Mod", [length, b.constant(np.array(2, np.int32))], f"{name}.odd")
        # an odd sum of squares is an odd sum; what is beyond the ball counts as even
        inside = b.node("Less", [length, b.constant(np.array(LONGEST[bits] + 1, np.int32))], f"{name}.inside")
        kept = b.node("Mul", [odd, b.node("Cast", [inside], f"{name}.one", to=INT32)], f"{name}.kept")
        falling = b.node("Sub", [end, number], f"{name}.falling")
        score = b.node("Mul", [kept, falling], f"{name}.score")
        count = b.shape(len(vectors(bits)))
        b.nodes.append(helper.make_node("TopK", [score, count], [f"{name}.scores", f"{name}.at"], axis=0))
        b.node("Gather", [value, f"{name}.at"], name)
    return name
