"""All biases of a file in one vector, and their scales too: fewer bytes, and fewer nodes to fold at load, than one
of each a convolution.

A bias is an integer in units of input scale * CDSw. Few of them need more than 20 bits, so they are stored as UINT16
and as many INT4 above it as the largest needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dsconvert.base.builder import OnnxBuilder

RUN = 8  # channels: units of layers with a multiple of it are computed together
VECTOR = "bias."  # what names of the stored parts of all biases begin with


@dataclass(frozen=True)
class _Bias:
    name: str
    integers: NDArray[np.int32]
    cds: str
    scale: float
    more: int


class Biases:
    """Collects biases; `finish` puts what they are made of in front of the nodes that read them."""

    def __init__(self, b: OnnxBuilder) -> None:
        self.b = b
        self.found: list[_Bias] = []

    def add(self, name: str, integers: NDArray[np.int32], cds: str, scale: float, more: int = 0) -> tuple[str, str]:
        """The names of integers (cho,) and their units, scale * CDSw (cho + more,), CDSw the initializer `cds`."""
        self.found.append(_Bias(name, integers, cds, scale, more))
        return f"{name}.bias", f"{name}.unit"

    def finish(self) -> None:
        """Make the integers and units of all biases."""
        if not self.found:
            return
        before, self.b.nodes = self.b.nodes, []
        self._integers()
        joint = [x for x in self.found if len(x.integers) % RUN == 0 and not x.more]
        self._units(joint)
        for x in self.found:
            if x not in joint:
                self.b.node("Mul", [x.cds, self.b.scalar(x.scale)], f"{x.name}.unit")
        self.b.nodes += before

    def _integers(self) -> None:
        b, rest = self.b, np.concatenate([x.integers for x in self.found]).astype(np.int64)
        low = b.tensor(f"{VECTOR}low", (rest & 0xFFFF).astype(np.uint16))
        total = b.node("Cast", [low], "bias.0", to=TensorProto.INT32)
        place, rest = 16, rest >> 16
        while rest.any():
            last = bool((np.abs(2 * rest + 1) < 16).all())  # -8..7
            stored = rest.astype(ml_dtypes.int4) if last else (rest & 15).astype(ml_dtypes.uint4)
            nibble = b.node("Cast", [b.tensor(f"{VECTOR}high{place}", stored)], f"bias.{place}", to=TensorProto.INT32)
            scaled = b.node("Mul", [nibble, b.constant(np.array(1 << place, np.int32))], f"bias.{place}.up")
            total = b.node("Add", [total, scaled], f"bias.{place}.sum")
            place, rest = place + 4, np.zeros(1, np.int64) if last else rest >> 4
        self._split(total, self.found, "bias")

    def _units(self, joint: list[_Bias]) -> None:
        """Of layers whose channels are multiples of RUN: all CDSw in rows, each row times its layer's scale."""
        if not joint:
            return
        b, run = self.b, math.gcd(*(len(x.integers) for x in joint))
        repeats = [len(x.integers) // run for x in joint]
        scales = np.repeat(np.array([x.scale for x in joint], np.float32), repeats)
        every = b.node("Concat", [x.cds for x in joint], "unit.cds", axis=0)
        rows = b.node("Reshape", [every, b.shape(-1, run)], "unit.rows")
        units = b.node("Mul", [rows, b.constant(scales[:, None])], "unit.scaled")
        self._split(b.node("Reshape", [units, b.shape(-1)], "unit.all"), joint, "unit")

    def _split(self, value: str, parts: list[_Bias], kind: str) -> None:
        sizes = self.b.shape(*(len(x.integers) for x in parts))
        self.b.nodes.append(helper.make_node("Split", [value, sizes], [f"{x.name}.{kind}" for x in parts], axis=0))
