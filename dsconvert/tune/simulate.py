"""The integer network as a float one that gradients pass through: its activation grids are in the loop."""

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
    """torch.fake_quantize_per_tensor_affine, in several passes that are vectorised: in 2.13 its own loop is not, and
    took 40 % of a training step."""

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
    """The nearest values of the grid; the gradient goes straight through, but not from beyond the grid's ends."""
    made: Tensor = _OnGrid.apply(x, grid.scale, grid.zero_point)
    return made


def simulate(graph: Graph, parts: Mapping[str, Parts], own: Mapping[str, QParams], x: Tensor) -> list[Tensor]:
    """Image batch (n, 3, h, w), 0..1 -> raw output maps, with gradients; `own` as `grid_of` takes it, or empty where
    activations stay float.

    The numbers are those of `graph.integer.run_integer`, but for what is rounded to the other side of a tie."""
    grids = grid_of(graph, own) if own else None
    if grids is not None:
        x = on_grid(x, grids[INPUT])
    return execute(graph, x, lambda node, inputs: step(node, inputs, parts, grids))


def step(node: Node, inputs: list[Tensor], parts: Mapping[str, Parts], grids: Mapping[str, QParams] | None) -> Tensor:
    """One node. Values are on their grids before and after."""
    op = OPS[node.op]
    if node.op == "conv":
        p = parts[node.name]
        # the factor after the sum: while VQK and m stand still, no gradient of the weights is worked out
        out = conv(node, inputs[0], p.unscaled(), None) * p.cds_w[:, None, None] + p.bias[:, None, None]
    else:
        out = (op.real if grids is None or op.trained is None else op.trained)(node, inputs)
    if grids is None or (op.moves and all(grids[name] == grids[node.name] for name in node.inputs)):
        return out
    return on_grid(out, grids[node.name])
