"""What an exported file is compared with: torch's result for the network, and the numbers that the file must hold."""

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
    """The numbers of one convolution that a file must hold.

    weight: (cho, chi, kh, kw), int8 or float32.
    cds: the channel scales CDSw (cho,) of an int8 weight, else None.
    bias: (cho,), int32 or float32.
    """

    weight: Array
    cds: Array | None
    bias: Array


@dataclass(frozen=True)
class Reference:
    """A network that can be run in torch, and all that its file is compared with.

    graph, head: the network and its detection head.
    run: image batch -> raw maps, in float.
    step: a node and its inputs -> its output.
    exact: whether `step` takes and makes integers, so that a file must agree to the integer.
    real: a value's name and what the file has of it -> the float value.
    numbers: a convolution -> the numbers that the file must hold.
    again: image size and ends -> the file, written once more.
    inside: values without a grid, which engines compute in one step with their reader.
    """

    graph: Graph
    head: Head
    run: Callable[[Tensor], list[Tensor]]
    step: Callable[[Node, list[Tensor]], Tensor]
    exact: bool
    real: Callable[[str, Tensor], Tensor] = field(repr=False)
    numbers: Callable[[Node], Numbers] = field(repr=False)
    again: Callable[[Size, Ends], Written] = field(repr=False)
    inside: frozenset[str] = frozenset()


def reference_of(model: DSModel, layout: Layout) -> Reference:
    """Return the reference of a converted model in a layout.

    Its arithmetic is integer, or float if the model's activations are float.
    """
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
    """Return the reference of a float network."""
    return Reference(
        graph, head, lambda x: run_float(graph, params, x),
        lambda node, inputs: float_step(node, inputs, params), False, lambda name, value: value,
        lambda node: Numbers(params[node.name].weight.numpy(), None, params[node.name].bias.numpy()),
        partial(write_float, graph, params, head),
    )  # fmt: skip


def _integers(conv: QConv, bias: Tensor) -> Numbers:
    return Numbers(conv.weight.merged().numpy(), conv.weight.cds_w.numpy(), bias.numpy())


def _weights_only(conv: QConv, layout: Layout) -> Numbers:
    """Return the numbers of a convolution with float activations."""
    if layout.real:
        return Numbers(_blocks_of_reals(conv.weight), None, conv.bias.numpy())
    return _integers(conv, conv.bias)


def _blocks_of_reals(weight: DSTensor) -> Array:
    """Return W' from one real scale a block, times VQK.

    The factors are multiplied in the file's order, so that both round alike.
    """
    scale = weight.cds_w[:, None, None, None] * weight.m.float()
    made = expand_blocks(scale, weight.vqk.shape[1], weight.block_size) * weight.vqk.float()
    return np.asarray(made.numpy())
