"""Helpers for rows of VQK that share an m, as ONNX files store them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.packing import numbers_of

BYTE = 256


def as_bytes(pieces: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """Join unsigned integers (..., n) of `width` bits into bytes (...); the first integer has the lowest bits."""
    return numbers_of(pieces, width).astype(np.uint8)


def weight_of_rows(b: OnnxBuilder, name: str, value: str, shape: tuple[int, ...], size: int) -> str:
    """Write the nodes from rows of `size` integers to the weight (cho, chi, kh, kw)."""
    taps = shape[2] * shape[3]
    if taps > 1:
        value = b.node("Reshape", [value, b.shape(-1, taps, size)], f"{name}.blocks")
        value = b.node("Transpose", [value], f"{name}.taps", perm=[0, 2, 1])
    return b.node("Reshape", [value, b.shape(*shape)], f"{name}.weight")
