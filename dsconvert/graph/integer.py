"""The integer executor: it computes what an int8 engine computes, to the last integer.

Activations are uint8 with one scale and zero point for each tensor: real = scale * (q - zero_point). Weights are int8
with one scale for each output channel (CDSw). Biases are int32 in units of input scale * CDSw. Every rounding is half
to even in float32, in the order of ONNX Runtime's kernels, so both give the same numbers. Integers are carried in
float32 tensors. Sums beyond 2^24, where float32 is not exact any more, are carried in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.grids import QMAX, QParams
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.ops import OPS, conv
from dsconvert.graph.run import execute

BIAS_MOST = 1 << 29  # largest bias in accumulator units: a quarter of int32, as the rest is for the products
FLOAT_EXACT = 1 << 24  # float32 holds every integer up to this exactly


@dataclass(frozen=True)
class QConv:
    """A quantized convolution: its DSConv weight, and its output bias CDSb (cho,), float."""

    weight: DSTensor
    bias: Tensor

    def unit(self, input_scale: float) -> Tensor:
        """Return the accumulator's unit, input scale * CDSw (cho,), computed in float32 as engines do."""
        return torch.tensor(input_scale, dtype=torch.float32) * self.weight.cds_w.float()

    def bias_int(self, input_scale: float) -> Tensor:
        """Return the int32 bias in units of the accumulator."""
        return (
            torch.round(self.bias.double() / self.unit(input_scale).double()).clamp(-(2**31), 2**31 - 1).to(torch.int32)
        )

    def with_room(self, input_scale: float) -> QConv:
        """Return the convolution with every bias representable in int32.

        A channel that was pruned or switched off by its BatchNorm has tiny weights beside its bias, so the bias would
        need more than 32 bits in units of CDSw. Its output is constant up to a few per cent. Such a channel gets zero
        weights, and a CDSw in which its bias has 20 bits. A trellis has no zeros: there CDSw is such that the bias has
        29 bits, which makes the smallest VQK negligible.
        """
        needed = self.bias.double().abs() / input_scale / self.weight.cds_w.double()
        lost = ~(needed < BIAS_MOST)
        if not bool(lost.any()):
            return self
        w = self.weight
        code = w.format.code
        scale = self.bias.double().abs() / input_scale / (1 << 20 if code.has_zero else BIAS_MOST)
        rows = lost[:, None, None, None]
        stored = torch.where(rows, code.quiet(w.stored.shape, w.format), w.stored)
        m = torch.where(rows, torch.ones_like(w.m), w.m)
        cds_w = torch.where(lost, scale, w.cds_w.double()).clamp_min(1e-30).float()
        weight = DSTensor(stored, m, cds_w, w.format)
        return QConv(weight, self.bias)

    def largest_sum(self, input_scale: float) -> Tensor:
        """Return the largest |accumulator| that any input can cause, for each output channel, int64 (cho,).

        Inputs are |q - zero_point| <= 255. An engine that adds q * w first and subtracts zero_point * sum(w) later may
        wrap on the way, but two's complement arithmetic ends at the same number.
        """
        weights = self.weight.merged().long().abs().sum((1, 2, 3))
        return QMAX * weights + self.bias_int(input_scale).long().abs()


def real_params(convs: Mapping[str, QConv]) -> dict[str, ConvParams]:
    """Return the convolutions' weights W' and biases, for running the network in float."""
    return {name: ConvParams(c.weight.weight(), c.bias) for name, c in convs.items()}


def keeps_grid(op: str) -> bool:
    """Return True for an operation whose output has the grid of its input."""
    return OPS[op].keeps_grid


def gridded(graph: Graph) -> set[str]:
    """Return the names of values that have a grid of their own."""
    return {INPUT, *(node.name for node in graph.nodes if not keeps_grid(node.op))}


def grid_of(graph: Graph, own: Mapping[str, QParams]) -> dict[str, QParams]:
    """Return the grid of every value: its own, or its input's where the operation keeps the grid.

    A convolution's output that only an activation reads may have no grid (see `real_between`); it is left out then.
    """
    grids, between = {INPUT: own[INPUT]}, graph.activated()
    for node in graph.nodes:
        if keeps_grid(node.op):
            grids[node.name] = grids[node.inputs[0]]
        elif node.name in own or node.name not in between:
            grids[node.name] = own[node.name]
    return grids


def real_between(graph: Graph, own: Mapping[str, QParams]) -> dict[str, QParams]:
    """Return the grids, except grids between a convolution and its activation.

    These values stay float32, and are rounded once, behind the activation. This describes engines that compute both in
    one step.
    """
    between = graph.activated()
    return {name: grid for name, grid in own.items() if name not in between}


UNROUNDED = QParams(1.0, 0)  # stands for the missing target grid of a convolution whose result stays float


@dataclass(frozen=True)
class IntegerConv:
    """A convolution on integers, prepared once for any number of images."""

    node: Node
    weight: Tensor  # (cho, chi, kh, kw) integers; float32 if every sum is exact in float32, else float64
    bias: Tensor  # (cho,) integers, of the same dtype
    multiplier: Tensor  # (cho,) float32: an accumulator's unit in steps of the target grid
    source: QParams
    target: QParams

    @staticmethod
    def of(node: Node, conv: QConv, source: QParams, target: QParams, device: torch.device | str) -> IntegerConv:
        """Prepare a node's convolution between two grids."""
        exact = int(conv.largest_sum(source.scale).max()) <= FLOAT_EXACT
        kind = torch.float32 if exact else torch.float64
        weight, bias = conv.weight.merged().to(device, kind), conv.bias_int(source.scale).to(device, kind)
        multiplier = conv.unit(source.scale) / target.scale
        return IntegerConv(node, weight, bias, multiplier.to(device), source, target)

    def sums(self, q: Tensor) -> Tensor:
        """Return the accumulators (n, cho, h', w') for integers (n, chi, h, w), as float32.

        They are rounded to float32 once, as an engine does when it converts its int32.
        """
        given = q.to(self.weight.dtype, copy=True).sub_(self.source.zero_point)
        return conv(self.node, given, self.weight, self.bias).float()

    def steps(self, q: Tensor) -> Tensor:
        """Return the result (n, cho, h', w') in steps of the target grid, unrounded; with UNROUNDED these are real
        numbers.
        """
        return self.sums(q).mul_(self.multiplier[:, None, None])

    def integers(self, q: Tensor) -> Tensor:
        """Return integers (n, cho, h', w') on the target grid, carried as float32."""
        return self.steps(q).round_().add_(self.target.zero_point).clamp_(0, QMAX)


def integer_conv(node: Node, q: Tensor, conv: QConv, source: QParams, target: QParams) -> Tensor:
    """Convolve integers to integers, with int32 accumulation and one float32 multiplier for each output channel."""
    return IntegerConv.of(node, conv, source, target, q.device).integers(q)


def integer_step(node: Node, inputs: list[Tensor], convs: Mapping[str, QConv], grids: Mapping[str, QParams]) -> Tensor:
    """Run one node in integer arithmetic. Values without a grid are real."""
    if node.op == "conv" and node.name in grids:
        return integer_conv(node, inputs[0], convs[node.name], grids[node.inputs[0]], grids[node.name])
    if node.op == "conv":
        (q,) = inputs
        return IntegerConv.of(node, convs[node.name], grids[node.inputs[0]], UNROUNDED, q.device).steps(q)
    op, target = OPS[node.op], grids[node.name]
    if node.inputs[0] not in grids:  # a convolution's unrounded result, which its activation reads
        return target.quantize(op.real(node, inputs))
    source = [grids[name] for name in node.inputs]
    if op.moves:
        same = [q if g == target else target.quantize(g.dequantize(q)) for q, g in zip(inputs, source, strict=True)]
        return op.real(node, same)
    if op.integer:
        return op.integer(node, inputs, source, target)
    return target.quantize(op.real(node, [g.dequantize(q) for q, g in zip(inputs, source, strict=True)]))


def run_integer(
    graph: Graph,
    convs: Mapping[str, QConv],
    own: Mapping[str, QParams],
    x: Tensor,
    visit: Callable[[str, Tensor], None] | None = None,
) -> list[Tensor]:
    """Run an image batch (n, 3, h, w), 0..1, as an int8 engine does; return the raw output maps, dequantized."""
    grids = grid_of(graph, own)
    with torch.no_grad():
        out = execute(
            graph,
            grids[INPUT].quantize(x),
            lambda node, inputs: integer_step(node, inputs, convs, grids),
            visit,
        )
    return [grids[name].dequantize(q) for name, q in zip(graph.outputs, out, strict=True)]
