"""Decide which weights of a file are decoded one by one (see `layouts`), and which together (see `joint`)."""

from __future__ import annotations

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.weights.joint import JointWeights, joins
from dsconvert.export.weights.layouts import Layout, add_int8_weight


class Weights:
    """Collects a file's weights in one layout; `finish` puts the nodes that decode them together before all readers."""

    def __init__(self, b: OnnxBuilder, layout: Layout) -> None:
        self.b, self.layout, self.joint = b, layout, JointWeights(b)
        self.made: dict[str, str] = {}  # the names of the weights' values, by layer

    def add(self, name: str, weight: DSTensor) -> str:
        """Add a weight; returns the name of m VQK as an int8 value (cho, chi, kh, kw)."""
        together = self.layout.joint and joins(weight)
        self.made[name] = (
            self.joint.add(name, weight) if together else add_int8_weight(self.b, name, weight, self.layout)
        )
        return self.made[name]

    def finish(self) -> None:
        """Write the nodes for the weights that are decoded together, after the last `add`."""
        self.joint.finish()
