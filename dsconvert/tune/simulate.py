"""Run the integer network in float, with its activation grids, so that gradients pass through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsconvert.graph.grids import QMAX, QParams
from dsconvert.graph.integer import grid_of
from dsconvert.graph.ir import INPUT, Graph, Node
from dsconvert.graph.ops import OPS, conv
from dsconvert.graph.run import execute
from dsconvert.tune.latents import Parts


class _OnGrid(torch.autograd.Function):
    """torch.fake_quantize_per_tensor_affine in several vectorised passes.

    The loop of torch 2.13 is not vectorised and took 40 % of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero_point: int) -> Tensor:
        q = x / scale
        low, high = -zero_point, QMAX - zero_point
        ctx.save_for_backward((q >= low - 0.5) & (q <= high + 0.5))
        return q.round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


def on_grid(x: Tensor, grid: QParams) -> Tensor:
    """Round values to the grid. The gradient passes straight through, except beyond the grid's ends."""
    made: Tensor = _OnGrid.apply(x, grid.scale, grid.zero_point)
    return made


def simulate(graph: Graph, parts: Mapping[str, Parts], own: Mapping[str, QParams], x: Tensor) -> list[Tensor]:
    """Run an image batch (n, 3, h, w), 0..1, and return the raw output maps with gradients.

    parts: the convolutions' numbers.
    own: activation grids as `grid_of` takes them; empty where activations stay float.

    The values equal `graph.integer.run_integer`'s, except where a tie is rounded to the other side.
    """
    grids = grid_of(graph, own) if own else None
    if grids is not None:
        x = on_grid(x, grids[INPUT])
    return execute(graph, x, lambda node, inputs: step(node, inputs, parts, grids))


def step(node: Node, inputs: list[Tensor], parts: Mapping[str, Parts], grids: Mapping[str, QParams] | None) -> Tensor:
    """Run one node. Values are on their grids before and after it."""
    op = OPS[node.op]
    if node.op == "conv":
        p = parts[node.name]
        # multiply by CDSw after the sum: as long as VQK and m do not learn, no gradient of the weights is computed
        out = conv(node, inputs[0], p.unscaled(), None) * p.cds_w[:, None, None] + p.bias[:, None, None]
    else:
        out = (op.real if grids is None or op.trained is None else op.trained)(node, inputs)
    if grids is None or (op.moves and all(grids[name] == grids[node.name] for name in node.inputs)):
        return out
    return on_grid(out, grids[node.name])
