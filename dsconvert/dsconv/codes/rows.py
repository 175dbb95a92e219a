"""Rows of VQK that share an m, as ONNX files have them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.format import Code
from dsconvert.dsconv.packing import numbers_of
from dsconvert.dsconv.tensor import DSTensor

BYTE = 256


@dataclass(frozen=True)
class JointLayer:
    """One of the layers that are decoded together."""

    name: str  # begins the names of its values
    weight: DSTensor

    @property
    def kind(self) -> tuple[Code, int]:
        """Layers of one kind are decoded alike."""
        return self.weight.format.code, self.weight.bits

    @property
    def size(self) -> int:
        """VQK of a row."""
        return self.weight.format.size(self.weight.vqk.shape[1])

    @property
    def each(self) -> int:
        """Rows of an output channel."""
        return self.weight.m[0].numel()

    def rows(self) -> NDArray[np.int8]:
        """VQK (rows, size): what shares an m."""
        taps = math.prod(self.weight.vqk.shape[2:])
        vqk = self.weight.vqk.numpy().reshape(len(self.weight.vqk), -1, self.size, taps)
        return np.ascontiguousarray(vqk.transpose(0, 1, 3, 2)).reshape(-1, self.size)


def as_bytes(pieces: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """(..., n) unsigned integers of so many bits -> (...) bytes, the first lowest."""
    return numbers_of(pieces, width).astype(np.uint8)


def weight_of_rows(b: OnnxBuilder, name: str, value: str, shape: tuple[int, ...], size: int) -> str:
    """Rows of `size` integers -> the weight (cho, chi, kh, kw)."""
    taps = shape[2] * shape[3]
    if taps > 1:
        value = b.node("Reshape", [value, b.shape(-1, taps, size)], f"{name}.blocks")
        value = b.node("Transpose", [value], f"{name}.taps", perm=[0, 2, 1])
    return b.node("Reshape", [value, b.shape(*shape)], f"{name}.weight")
