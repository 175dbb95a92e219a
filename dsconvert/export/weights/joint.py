"""Layout packed: decode the weights of many layers together, to save nodes and memory when the file is loaded.

Loading a file takes time mostly for the nodes that ONNX Runtime folds, and for the memory that they fill. Every
result stays until all are folded, and a new page of memory costs as much as copying 10 kB. So no INT32 value holds a
single VQK: it holds two or more.

Layers of the same code, bits and block size are a group. Each layer keeps its initializers under its own name, as bytes
that one Concat can join. `.kds` has two m in a byte, and the code decides how VQK are stored. VQK are in rows that
share an m: block by block, and within a block tap by tap. OpenVINO folds all of these nodes. It would not fold products
of int8, or of values that were just cast from 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.codes import CODES
from dsconvert.dsconv.codes.rows import BYTE, as_bytes, weight_of_rows
from dsconvert.dsconv.format import JointLayer
from dsconvert.dsconv.tensor import DSTensor

INT32 = TensorProto.INT32
ROW = 8  # a row is a multiple of so many VQK, so that bytes are whole


def joins(weight: DSTensor) -> bool:
    """Return whether a weight can be decoded together with others: whole blocks of whole bytes, an even number of m."""
    size = weight.format.size(weight.vqk.shape[1])
    whole = size % ROW == 0 and weight.vqk.shape[1] % size == 0 and weight.m.numel() % 2 == 0
    return whole and weight.bits in weight.format.code.joint_bits


class JointWeights:
    """Collects weights; `finish` puts what decodes them in front of the nodes that read them."""

    def __init__(self, b: OnnxBuilder) -> None:
        self.b = b
        self.found: list[JointLayer] = []

    def add(self, name: str, weight: DSTensor) -> str:
        """Add a weight that `joins`; returns the name of its int8 value (cho, chi, kh, kw)."""
        self.found.append(JointLayer(name, weight))
        return f"{name}.weight"

    def finish(self) -> None:
        """Write the nodes that make all weights."""
        if not self.found:
            return
        before, self.b.nodes = self.b.nodes, []
        for kind in ((code, bits) for code in CODES.values() for bits in code.joint_bits):
            layers = [x for x in self.found if x.kind == kind]
            for size in sorted({x.size for x in layers}):
                # layers with equal numbers of rows in an output channel are neighbours, as `trellis_onnx` needs
                group = sorted((x for x in layers if x.size == size), key=lambda x: x.each)
                value = kind[0].spell_rows(self, group, layers, f"{self.label_of(group[0])}x{size}")
                for x, part in zip(group, self._split(value, group), strict=True):
                    weight_of_rows(self.b, x.name, part, tuple(x.weight.vqk.shape), size)
        self.b.nodes += before

    def kds(self, group: Sequence[JointLayer], label: str) -> str:
        """Return the name of an INT32 value: the stored bytes, each with two m."""
        stored = [self.b.tensor(f"{x.name}.kds", as_bytes(x.weight.m.numpy().reshape(-1, 2), 4)) for x in group]
        return self.b.node("Cast", [self.joined(stored, f"{label}.kds")], f"{label}.pairs", to=INT32)

    def pairs(self) -> str:
        """Return the name of INT32 (256, 2, 1): the two m of every byte."""
        if not self.b.has("joint.pairs"):
            both = self.b.constant(np.array([[0], [1]], np.int32))
            self.b.node("Gather", [self.pieces(2), both], "joint.pairs", axis=1)
        return "joint.pairs"

    def pieces(self, count: int) -> str:
        """Return the name of INT32 (256, count): the pieces of every byte when it is cut into `count`, the lowest
        first.
        """
        name, width = f"joint.pieces{count}", 8 // count
        if not self.b.has(name):
            pieces = np.arange(BYTE)[:, None] >> np.arange(count) * width & (1 << width) - 1
            self.b.node("Cast", [self.b.constant(pieces.astype(ml_dtypes.uint4))], name, to=INT32)
        return name

    def joined(self, names: list[str], label: str) -> str:
        """Return the name of the values one after another."""
        return names[0] if len(names) == 1 else self.b.node("Concat", names, f"{label}.joined", axis=0)

    def _split(self, value: str, layers: Sequence[JointLayer]) -> list[str]:
        """Return the names of each layer's rows of the joined value."""
        if len(layers) == 1:
            return [value]
        together = layers[0].weight.format.code.rows_together
        names, rows = [f"{x.name}.rows" for x in layers], [x.weight.m.numel() // together for x in layers]
        self.b.nodes.append(helper.make_node("Split", [value, self.b.shape(*rows)], names, axis=0))
        return names

    @staticmethod
    def label_of(layer: JointLayer) -> str:
        """Return the first part of the names that layers of this code and bits share."""
        return f"joint.{layer.weight.format.code.label}{layer.weight.bits}"
