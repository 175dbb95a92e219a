"""The graph that all stages share: calibration, fit and export walk the same list of nodes.

It has only the operations that a convolutional detector needs. A node's name is also the name of its output value.
Weights are kept apart, by convolution name, so that one graph serves the float and the quantized network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

INPUT = "images"
Shape = tuple[int, ...]  # channels, height, width; a convolution's weight (cho, chi / groups, kh, kw)


@dataclass(frozen=True)
class Node:
    """One operation. `graph.ops` defines what `op` computes and which attributes it has."""

    op: str
    name: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


def display_name(node: Node) -> str:
    """Return a node's name for display: `model.2.m.0.cv1.conv` -> `model.2.m.0.cv1`; Detect's convolutions keep their
    name.
    """
    return node.name.removesuffix(".conv")


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of execution. `outputs` are the raw detection maps."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def convs(self) -> tuple[Node, ...]:
        """Return the convolution nodes in order."""
        return tuple(n for n in self.nodes if n.op == "conv")

    def consumers(self) -> dict[str, list[Node]]:
        """Return value name -> the nodes that read it."""
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        return readers

    def activated(self) -> dict[str, str]:
        """Return convolution name -> its activation's name, for convolutions that only an activation reads."""
        readers = self.consumers()
        alone = {n.name: readers[n.name][0] for n in self.convs() if len(readers.get(n.name, [])) == 1}
        return {name: r.name for name, r in alone.items() if r.op == "act" and name not in self.outputs}

    def limited(self) -> dict[str, int]:
        """Return value name -> the relu's upper limit (0: none), for values that only a relu reads.

        Values beyond the limit have no effect.
        """
        readers = self.consumers()
        alone = {name: some[0] for name, some in readers.items() if len(some) == 1 and name not in self.outputs}
        return {name: int(r.attrs["top"]) for name, r in alone.items() if r.op == "relu"}

    def last_use(self) -> dict[str, int]:
        """Return value name -> index of the last node that reads it. Outputs are never released."""
        last = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        return {**last, **dict.fromkeys(self.outputs, len(self.nodes))}

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the model file."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Graph:
        """Undo `to_json`. Raises ValueError when a node reads a value that is not there.

        Whether each node is valid is checked by `graph.shapes.check_node`.
        """
        nodes = tuple(Node(n["op"], n["name"], tuple(n["inputs"]), dict(n["attrs"])) for n in data["nodes"])
        known = {INPUT}
        for node in nodes:
            if not set(node.inputs) <= known or node.name in known:
                raise ValueError(f"node {node.name} is not usable")
            known.add(node.name)
        outputs = tuple(data["outputs"])
        if not outputs or not set(outputs) <= known:
            raise ValueError("the graph's outputs are missing")
        return Graph(nodes, outputs)


@dataclass(frozen=True)
class ConvParams:
    """The parameters of a float convolution: weight (cho, chi / groups, kh, kw), bias (cho,)."""

    weight: Tensor
    bias: Tensor
