"""Layout packed: the weights of many layers decoded together. What a file costs to load is the nodes that are folded,
above all the memory they fill: every result stays until all are there, and a new page costs as much as copying 10 kB.

Layers of one code and as many bits, in blocks of one size, are a group. Each keeps initializers under its own name, as
bytes that a node can join: `.kds`, two m a byte, and `.vqk`, as the code spells it. VQK stand in rows that share an m:
block by block, and tap by tap. No number of 32 bits is made of a single VQK. OpenVINO folds all of this; products of
int8, or of what was just cast from 4 bits, it would not.
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
    """Whether it is one of those decoded together: whole blocks of whole bytes, an even number of m."""
    size = weight.format.size(weight.vqk.shape[1])
    whole = size % ROW == 0 and weight.vqk.shape[1] % size == 0 and weight.m.numel() % 2 == 0
    return whole and weight.bits in weight.format.code.joint_bits


class JointWeights:
    """Collects weights; `finish` puts what decodes them in front of the nodes that read them."""

    def __init__(self, b: OnnxBuilder) -> None:
        self.b = b
        self.found: list[JointLayer] = []

    def add(self, name: str, weight: DSTensor) -> str:
        """The name of its int8 value (cho, chi, kh, kw). The weight `joins`."""
        self.found.append(JointLayer(name, weight))
        return f"{name}.weight"

    def finish(self) -> None:
        """Make all weights."""
        if not self.found:
            return
        before, self.b.nodes = self.b.nodes, []
        for kind in ((code, bits) for code in CODES.values() for bits in code.joint_bits):
            layers = [x for x in self.found if x.kind == kind]
            for size in sorted({x.size for x in layers}):
                # those whose output channels have as many rows next to each other: see `trellis_onnx`
                group = sorted((x for x in layers if x.size == size), key=lambda x: x.each)
                value = kind[0].spell_rows(self, group, layers, f"{self.label_of(group[0])}x{size}")
                for x, part in zip(group, self._split(value, group), strict=True):
                    weight_of_rows(self.b, x.name, part, tuple(x.weight.vqk.shape), size)
        self.b.nodes += before

    def kds(self, group: Sequence[JointLayer], label: str) -> str:
        """INT32: bytes of two m."""
        stored = [self.b.tensor(f"{x.name}.kds", as_bytes(x.weight.m.numpy().reshape(-1, 2), 4)) for x in group]
        return self.b.node("Cast", [self.joined(stored, f"{label}.kds")], f"{label}.pairs", to=INT32)

    def pairs(self) -> str:
        """INT32 (256, 2, 1): a byte's two m."""
        if not self.b.has("joint.pairs"):
            both = self.b.constant(np.array([[0], [1]], np.int32))
            self.b.node("Gather", [self.pieces(2), both], "joint.pairs", axis=1)
        return "joint.pairs"

    def pieces(self, count: int) -> str:
        """INT32 (256, count): every byte's pieces, the lowest first."""
        name, width = f"joint.pieces{count}", 8 // count
        if not self.b.has(name):
            pieces = np.arange(BYTE)[:, None] >> np.arange(count) * width & (1 << width) - 1
            self.b.node("Cast", [self.b.constant(pieces.astype(ml_dtypes.uint4))], name, to=INT32)
        return name

    def joined(self, names: list[str], label: str) -> str:
        """Values one after another."""
        return names[0] if len(names) == 1 else self.b.node("Concat", names, f"{label}.joined", axis=0)

    def _split(self, value: str, layers: Sequence[JointLayer]) -> list[str]:
        """Each layer's rows."""
        if len(layers) == 1:
            return [value]
        together = layers[0].weight.format.code.rows_together
        names, rows = [f"{x.name}.rows" for x in layers], [x.weight.m.numel() // together for x in layers]
        self.b.nodes.append(helper.make_node("Split", [value, self.b.shape(*rows)], names, axis=0))
        return names

    @staticmethod
    def label_of(layer: JointLayer) -> str:
        """Begins the names of what layers of its kind share."""
        return f"joint.{layer.weight.format.code.label}{layer.weight.bits}"
