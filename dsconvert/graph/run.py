"""The float executor, which runs the network one node at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.ops import OPS


def float_step(node: Node, inputs: list[Tensor], params: Mapping[str, ConvParams]) -> Tensor:
    """Run one node in float."""
    if node.op == "conv":
        p = params[node.name]
        inputs = [*inputs, p.weight, p.bias]
    return OPS[node.op].real(node, inputs)


def execute(
    graph: Graph,
    x: Tensor,
    step: Callable[[Node, list[Tensor]], Tensor],
    visit: Callable[[str, Tensor], None] | None = None,
) -> list[Tensor]:
    """Run every node with `step` and return the graph's outputs.

    Values are released after their last use. `visit` is called once for each value.
    """
    values = {INPUT: x}
    last = graph.last_use()
    if visit:
        visit(INPUT, x)
    for index, node in enumerate(graph.nodes):
        out = step(node, [values[name] for name in node.inputs])
        values[node.name] = out
        if visit:
            visit(node.name, out)
        for name in set(node.inputs):
            if last[name] == index:
                del values[name]
    return [values[name] for name in graph.outputs]


def run_float(
    graph: Graph,
    params: Mapping[str, ConvParams],
    x: Tensor,
    visit: Callable[[str, Tensor], None] | None = None,
) -> list[Tensor]:
    """Run an image batch (n, 3, h, w) in float, and return the graph's raw output maps."""
    with torch.no_grad():
        return execute(graph, x, lambda node, inputs: float_step(node, inputs, params), visit)
