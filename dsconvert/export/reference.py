"""What an exported file is held against: torch's way of running the network, and the numbers that it has to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.base.size import Size
from dsconvert.dsconv.tensor import DSTensor, expand_blocks
from dsconvert.export.onnx import Ends, in_layout, write_float, write_quantized
from dsconvert.export.weights.layouts import Layout
from dsconvert.export.written import Written
from dsconvert.graph.integer import QConv, grid_of, integer_step, real_params, run_integer
from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.graph.run import float_step, run_float
from dsconvert.model.model import DSModel
from dsconvert.yolo.network import Head

Array = NDArray[Any]


@dataclass(frozen=True)
class Numbers:
    """What a file has to hold of one convolution: the weight (cho, chi, kh, kw), int8 or float32; CDSw (cho,) where it
    is int8; the bias (cho,), int32 or float32."""

    weight: Array
    cds: Array | None
    bias: Array


@dataclass(frozen=True)
class Reference:
    """What the file is held against: a graph, torch's way of running it (whole, and node by node on given inputs), a
    value's real numbers from what the file has of it, each convolution's numbers, and the file made anew by size."""

    graph: Graph
    head: Head
    run: Callable[[Tensor], list[Tensor]]
    step: Callable[[Node, list[Tensor]], Tensor]
    exact: bool
    real: Callable[[str, Tensor], Tensor] = field(repr=False)
    numbers: Callable[[Node], Numbers] = field(repr=False)
    again: Callable[[Size, Ends], Written] = field(repr=False)
    inside: frozenset[str] = frozenset()  # values without a grid, which engines compute together with what reads them


def reference_of(model: DSModel, layout: Layout) -> Reference:
    """A converted model's arithmetic in a layout: integers, or weights in float when its activations are."""
    model = in_layout(model, layout)
    graph, convs, own = model.graph, model.convs, model.activations
    again = partial(write_quantized, model, layout)
    if not own:
        params = real_params(convs)
        return Reference(
            graph, model.head, lambda x: run_float(graph, params, x),
            lambda node, inputs: float_step(node, inputs, params), False, lambda name, value: value,
            lambda node: _weights_only(convs[node.name], layout), again,
        )  # fmt: skip
    grids = grid_of(graph, own)
    return Reference(
        graph, model.head, lambda x: run_integer(graph, convs, own, x),
        lambda node, inputs: integer_step(node, inputs, convs, grids), True,
        lambda name, value: grids[name].dequantize(value),
        lambda node: _integers(convs[node.name], convs[node.name].bias_int(grids[node.inputs[0]].scale)), again,
        frozenset(node.name for node in graph.nodes if node.name not in grids),
    )  # fmt: skip


def float_reference(graph: Graph, params: Mapping[str, ConvParams], head: Head) -> Reference:
    """A float network."""
    return Reference(
        graph, head, lambda x: run_float(graph, params, x),
        lambda node, inputs: float_step(node, inputs, params), False, lambda name, value: value,
        lambda node: Numbers(params[node.name].weight.numpy(), None, params[node.name].bias.numpy()),
        partial(write_float, graph, params, head),
    )  # fmt: skip


def _integers(conv: QConv, bias: Tensor) -> Numbers:
    return Numbers(conv.weight.merged().numpy(), conv.weight.cds_w.numpy(), bias.numpy())


def _weights_only(conv: QConv, layout: Layout) -> Numbers:
    if layout.real:
        return Numbers(_blocks_of_reals(conv.weight), None, conv.bias.numpy())
    return _integers(conv, conv.bias)


def _blocks_of_reals(weight: DSTensor) -> Array:
    """W', its factors multiplied in the order that the file has them in: one real scale a block, times VQK."""
    scale = weight.cds_w[:, None, None, None] * weight.m.float()
    made = expand_blocks(scale, weight.vqk.shape[1], weight.block_size) * weight.vqk.float()
    return np.asarray(made.numpy())
