"""Layout float: weights as in the paper, a real scale times VQK for every block, made directly before the convolution.

VQK is INT4 (INT8 above 4 bits). The scale is CDSw * alpha (or CDSw * m), float32, in the shape of alpha. ONNX's blocked
DequantizeLinear takes exactly these. No engine folds it into an int8 convolution, so this layout is exact but not fast.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.tensor import DSTensor, block_count


def add_real_weight(b: OnnxBuilder, name: str, weight: DSTensor) -> str:
    """Add nodes and initializers for W'; returns the name of the float value (cho, chi, kh, kw)."""
    if weight.is_plain_int8:
        cds = b.tensor(f"{name}.cds", weight.cds_w.numpy())
        return b.node(
            "DequantizeLinear", [b.tensor(f"{name}.weight", weight.merged().numpy()), cds], f"{name}.w", axis=0
        )
    chi, size = weight.vqk.shape[1], weight.block_size
    whole = chi // size * size
    # OpenVINO refuses a short last block, so it is a tensor of its own
    parts = [_blocks(b, name, weight, first, last) for first, last in ((0, whole), (whole, chi)) if first < last]
    return parts[0] if len(parts) == 1 else b.node("Concat", parts, f"{name}.w", axis=1)


def _blocks(b: OnnxBuilder, name: str, weight: DSTensor, first: int, last: int) -> str:
    """Add W' of the input channels first..last, all in blocks of one size; returns the name of the value."""
    tail, size = ".tail" if first else "", min(weight.block_size, last - first)
    kind = ml_dtypes.int4 if weight.bits <= 4 else np.int8
    alpha = weight.m.float() * weight.cds_w[:, None, None, None]
    blocks = alpha[:, first // weight.block_size : block_count(last, weight.block_size)]
    stored = b.tensor(f"{name}.vqk{tail}", weight.vqk[:, first:last].numpy().astype(kind))
    scale = b.tensor(f"{name}.alpha{tail}", blocks.numpy())
    return b.node("DequantizeLinear", [stored, scale], f"{name}.blocks{tail}", axis=1, block_size=size)
