"""The integer network as a float one that gradients pass through: its activation grids are in the loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsconvert.graph import run
from dsconvert.graph.integer import QMAX, SIGMOID, QParams, grid_of
from dsconvert.graph.ir import INPUT, Graph, Node
from dsconvert.train.latents import Parts


def on_grid(x: Tensor, grid: QParams) -> Tensor:
    """The nearest values of the grid; the gradient goes straight through, but not from beyond the grid's ends."""
    return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, QMAX)


def simulate(graph: Graph, parts: Mapping[str, Parts], own: Mapping[str, QParams], x: Tensor) -> list[Tensor]:
    """Image batch (n, 3, h, w), 0..1 -> raw output maps, with gradients; `own` as `grid_of` takes it, or empty where
    activations stay float.

    The numbers are those of `graph.integer.run_integer`, but for what is rounded to the other side of a tie."""
    grids = grid_of(graph, own) if own else None
    if grids is not None:
        x = on_grid(x, grids[INPUT])
    return run.execute(graph, x, lambda node, inputs: step(node, inputs, parts, grids))


def step(node: Node, inputs: list[Tensor], parts: Mapping[str, Parts], grids: Mapping[str, QParams] | None) -> Tensor:
    """One node. Values are on their grids before and after."""
    if node.op == "conv":
        p = parts[node.name]
        # the factor after the sum: while VQK and m stand still, no gradient of the weights is worked out
        out = run.conv(node, inputs[0], p.unscaled(), None) * p.cds_w[:, None, None] + p.bias[:, None, None]
    elif node.op == "act" and node.attrs["kind"] == "SiLU" and grids is not None:
        out = inputs[0] * on_grid(inputs[0].sigmoid(), SIGMOID)
    elif node.op == "act":
        out = run.ACTIVATIONS[node.attrs["kind"]](inputs[0])
    elif node.op == "add":
        out = inputs[0] + inputs[1]
    else:
        out = run.move(node, inputs)
        if grids is None or all(grids[name] == grids[node.name] for name in node.inputs):
            return out
    return out if grids is None else on_grid(out, grids[node.name])
