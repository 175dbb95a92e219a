"""Store all biases of a file as one vector of integers.

One vector for the whole file takes fewer bytes than one a convolution, and fewer nodes to fold at load. The units of
the integers (input scale * CDSw) are computed together too, where the layers' channel counts allow it.

A bias is an int32 in these units. Few need more than 20 bits. So the low 16 bits are stored as UINT16, and the bits
above them in as many 4-bit vectors as the largest bias needs. A small file has half floats instead (see `halves`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.export.halves import add_integers

RUN = 8  # units of layers whose channels are a multiple of it are computed together
VECTOR = "bias."  # the stored parts of the bias vector have names that begin so


@dataclass(frozen=True)
class _Bias:
    """The bias of one layer; see `Biases.add` for the fields."""

    name: str
    integers: NDArray[np.int32]
    cds: str
    scale: float
    more: int


class Biases:
    """Collects biases; `finish` adds the nodes that make them, in front of the nodes that read them."""

    def __init__(self, b: OnnxBuilder, halves: bool) -> None:
        self.b, self.halves = b, halves
        self.found: list[_Bias] = []

    def add(self, name: str, integers: NDArray[np.int32], cds: str, scale: float, more: int = 0) -> tuple[str, str]:
        """Register a layer's bias and return the names that its integers and their units will have.

        integers: the bias (cho,), int32.
        cds: name of the initializer CDSw, the channel scales (cho + more,).
        scale: the layer's input scale. A unit is scale * CDSw.
        more: padding channels, which have a unit and no integer here.
        """
        self.found.append(_Bias(name, integers, cds, scale, more))
        return f"{name}.bias", f"{name}.unit"

    def finish(self) -> None:
        """Add the nodes that make the integers and units of all registered biases."""
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
        """Add the nodes of bias = low + sum of (high nibble << place), as int32, and split it by layer."""
        b, rest = self.b, np.concatenate([x.integers for x in self.found]).astype(np.int64)
        if self.halves:
            self._split(add_integers(b, VECTOR, rest), self.found, "bias")
            return
        low = b.tensor(f"{VECTOR}low", (rest & 0xFFFF).astype(np.uint16))
        total = b.node("Cast", [low], "bias.0", to=TensorProto.INT32)
        place, rest = 16, rest >> 16
        while rest.any():
            last = bool((np.abs(2 * rest + 1) < 16).all())  # a signed 4-bit integer holds -8..7, and ends the sum
            stored = rest.astype(ml_dtypes.int4) if last else (rest & 15).astype(ml_dtypes.uint4)
            nibble = b.node("Cast", [b.tensor(f"{VECTOR}high{place}", stored)], f"bias.{place}", to=TensorProto.INT32)
            scaled = b.node("Mul", [nibble, b.constant(np.array(1 << place, np.int32))], f"bias.{place}.up")
            total = b.node("Add", [total, scaled], f"bias.{place}.sum")
            place, rest = place + 4, np.zeros(1, np.int64) if last else rest >> 4
        self._split(total, self.found, "bias")

    def _units(self, joint: list[_Bias]) -> None:
        """Add the units of layers whose channels are multiples of RUN.

        All CDSw are laid out in rows of one length, and each row is multiplied by its layer's input scale.
        """
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
        """Add the node that cuts one value into each layer's part."""
        sizes = self.b.shape(*(len(x.integers) for x in parts))
        self.b.nodes.append(helper.make_node("Split", [value, sizes], [f"{x.name}.{kind}" for x in parts], axis=0))
