"""The float executor: what the network computes, one node at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.errors import InputError
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLU": F.silu,
    "ReLU": F.relu,
    "LeakyReLU": lambda x: F.leaky_relu(x, 0.1),
    "Hardswish": F.hardswish,
}


MOST_PAIRS = 1 << 28  # of pixels, over all heads and images: 1 GiB of float32


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The node's convolution with any weight."""
    a = node.attrs
    return F.conv2d(x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])


def space_to_depth(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, 4c, h/2, w/2): the four pixel phases, row phase running fastest (YOLOv5's Focus)."""
    return torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)


def attention(node: Node, inputs: list[Tensor]) -> Tensor:
    """Of the maps q, k and v (n, heads * size, h, w), with pixels as tokens: softmax(q . k / sqrt(size)) v, of the same
    shape. Raises InputError where the map is too large for that."""
    heads, size = node.attrs["heads"], node.attrs["size"]
    n, _, high, wide = inputs[0].shape
    if n * heads * (high * wide) ** 2 > MOST_PAIRS:
        raise InputError(
            f"The attention of layer {node.name} is over {wide} by {high} pixels, which takes too much memory."
        )
    q, k, v = (x.reshape(n, heads, size, high * wide) for x in inputs)
    scores = (k.transpose(2, 3) @ q) / math.sqrt(size)  # keys in rows, queries in columns
    return (v @ scores.softmax(2)).reshape(inputs[0].shape)


def move(node: Node, inputs: list[Tensor]) -> Tensor:
    """The ops that only move or select values, and so work on integers unchanged."""
    a = node.attrs
    if node.op == "maxpool":
        last = inputs[0].contiguous(memory_format=torch.channels_last)  # ten times as fast, turning around included
        return F.max_pool2d(last, a["kernel"], a["stride"], a["padding"]).contiguous()
    if node.op == "upsample":
        return F.interpolate(inputs[0], scale_factor=float(a["scale"]), mode="nearest")
    if node.op == "space_to_depth":
        return space_to_depth(inputs[0])
    if node.op == "concat":
        return torch.cat(inputs, 1)
    raise ValueError(f"unknown op {node.op}")


def float_step(node: Node, inputs: list[Tensor], params: Mapping[str, ConvParams]) -> Tensor:
    """One node in float arithmetic."""
    if node.op == "conv":
        p = params[node.name]
        return conv(node, inputs[0], p.weight, p.bias)
    if node.op == "act":
        return ACTIVATIONS[node.attrs["kind"]](inputs[0])
    if node.op == "add":
        return inputs[0] + inputs[1]
    if node.op == "attention":
        return attention(node, inputs)
    return move(node, inputs)


def execute(
    graph: Graph,
    x: Tensor,
    step: Callable[[Node, list[Tensor]], Tensor],
    visit: Callable[[str, Tensor], None] | None = None,
) -> list[Tensor]:
    """Run every node with `step`, releasing values after their last use; `visit` sees each value once."""
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
    """Image batch (n, 3, h, w) -> the graph's raw output maps, in float."""
    with torch.no_grad():
        return execute(graph, x, lambda node, inputs: float_step(node, inputs, params), visit)
