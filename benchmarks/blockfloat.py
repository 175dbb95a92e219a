"""A converted network with the paper's block floating point activations, simulated in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from bfp import to_block_float
from torch import Tensor

from dsconvert.graph.integer import QConv, real_params
from dsconvert.graph.ir import Graph, Node
from dsconvert.graph.run import execute, float_step


def run_block_float(
    graph: Graph, convs: Mapping[str, QConv], x: Tensor, bits: int, block_size: int = 32
) -> list[Tensor]:
    """Image batch (n, 3, h, w) -> raw output maps: every convolution reads block floating point, the rest is float."""
    params = real_params(convs)

    def step(node: Node, inputs: list[Tensor]) -> Tensor:
        if node.op == "conv":
            inputs = [to_block_float(inputs[0], bits, block_size).real()]
        return float_step(node, inputs, params)

    with torch.no_grad():
        return execute(graph, x, step)
