"""Run the quantized network over the calibration images node by node, and fit each convolution when it is reached.

At that point its inputs come from layers that are quantized already. Its target is the float network's output at
positions drawn from every image (see `importance`). So the fit also compensates errors of the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsconvert.base.kept import Kept, Room
from dsconvert.base.threads import in_order
from dsconvert.dsconv.format import WeightFormat
from dsconvert.fit.layer import Batches, Fit
from dsconvert.fit.seen import Drawn, Seen
from dsconvert.graph.activations import activation_table
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import IntegerConv, QConv, grid_of, integer_step
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.ops import conv
from dsconvert.graph.run import float_step
from dsconvert.photos.entry import UNIT, Entry

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Side:
    """How the quantized network keeps its values: as uint8 on their grids, or as float if there are no grids."""

    grids: Mapping[str, QParams]
    device: str
    entry: Entry = UNIT

    def enter(self, x: Tensor) -> Tensor:
        """Return an image (3, h, w) uint8 as the network reads it."""
        real = self.entry.real(x)
        return self.grids[INPUT].quantize(real).to(torch.uint8) if self.grids else real

    def roomy(self, node: Node, conv: QConv) -> QConv:
        """Return the convolution with every bias representable in int32; unchanged if activations are float."""
        return conv.with_room(self.grids[node.inputs[0]].scale) if self.grids else conv

    def step(self, node: Node, act: Node | None, convs: Mapping[str, QConv]) -> Callable[[Sequence[Tensor]], Tensor]:
        """Return a function from a node's inputs to its value (c, h, w) for one image.

        act: an activation to apply to the value.
        """
        if node.op == "conv":
            return self._conv(node, act, convs[node.name])
        if not self.grids:
            return lambda inputs: float_step(node, [x.to(self.device)[None] for x in inputs], {})[0]

        def integers(inputs: Sequence[Tensor]) -> Tensor:
            given = [x.to(self.device).float()[None] for x in inputs]
            # torch converts float to int16 and on to uint8 in half the time of a direct conversion
            return integer_step(node, given, convs, self.grids)[0].to(torch.int16).to(torch.uint8)

        return integers

    def _conv(self, node: Node, act: Node | None, made: QConv) -> Callable[[Sequence[Tensor]], Tensor]:
        """Return the function of `step` for a convolution."""
        if not self.grids:
            weight, bias = made.weight.weight().to(self.device), made.bias.to(self.device)

            def real(inputs: Sequence[Tensor]) -> Tensor:
                value = conv(node, inputs[0].to(self.device)[None], weight, bias)
                return (float_step(act, [value], {}) if act else value)[0]

            return real
        from dsconvert.base import loops  # numba takes a while to import

        target = self.grids[node.name]
        ready = IntegerConv.of(node, made, self.grids[node.inputs[0]], target, self.device)
        # a table of 256 bytes applies the activation while requantizing; without an activation it changes nothing
        table = np.arange(256, dtype=np.uint8)
        if act:
            table = activation_table(act.attrs["kind"], target, self.grids[act.name])
        multiplier, zero = ready.multiplier.cpu().numpy(), float(target.zero_point)

        def integers(inputs: Sequence[Tensor]) -> Tensor:
            sums = ready.sums(inputs[0].to(self.device)[None])[0].cpu()
            value = torch.empty(sums.shape, dtype=torch.uint8)
            loops.requantize(sums.flatten(1).numpy(), multiplier, zero, table, value.flatten(1).numpy())
            return value

        return integers


def fit_lockstep(
    graph: Graph,
    params: Mapping[str, ConvParams],
    fit: Fit,
    formats: Mapping[str, WeightFormat],
    own: Mapping[str, QParams],
    images: Kept,
    drawn: Mapping[str, Drawn],
    count: int,
    room: Room | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    known: Mapping[str, QConv] | None = None,
    finished: Callable[[Mapping[str, QConv]], None] | None = None,
    entry: Entry = UNIT,
) -> dict[str, QConv]:
    """Fit every convolution by `fit`, and return the quantized convolutions by name.

    graph, params: the float network and its weights.
    formats: convolution name -> the format of its weight.
    own: the activation grids by value name; without any, activations stay float.
    images: `count` images (3, h, w) uint8.
    drawn: convolution name -> the positions drawn from these images, and the float network's outputs there.
    room: keeps the quantized network's values until their last use, in memory or on disk.
    progress: called with the number of nodes done and of all nodes.
    known: convolutions that are fitted already and taken as they are.
    finished: called after each fitted convolution with all that are fitted so far.
    entry: how the network reads an image's bytes.
    """
    side, room = _Side(grid_of(graph, own) if own else {}, device, entry), room or Room()
    values: dict[str, Kept] = {}
    last, behind, readers = graph.last_use(), graph.activated(), graph.consumers()
    acts = {node.name: node for node in graph.nodes if node.name in behind.values()}
    fitted: dict[str, QConv] = {}

    def advance(name: str, step: Callable[[Sequence[Tensor]], Tensor], sources: Sequence[Kept]) -> None:
        """Compute a value for every image, several images at a time, and keep it; skip it if no node reads it."""
        if name not in readers:
            return

        def one(index: int) -> Tensor:
            return step([source.get(index) for source in sources])

        values[name] = room.like(count, first := one(0))
        values[name].put(0, first)
        for _ in in_order(lambda index: values[name].put(index, one(index)), range(1, count)):
            pass

    with torch.no_grad():
        values[INPUT] = room.like(count, side.enter(images.get(0)))
        for index in range(count):
            values[INPUT].put(index, side.enter(images.get(index)))
        for place, node in enumerate(graph.nodes):
            if node.op == "conv" and known and node.name in known:
                fitted[node.name] = known[node.name]
            elif node.op == "conv":
                seen = _seen(drawn[node.name], values[node.inputs[0]], side.grids.get(node.inputs[0]), count)
                made = fit.layer(node, params[node.name].weight, formats[node.name], seen)
                fitted[node.name] = side.roomy(node, made)
                if finished:
                    finished(fitted)
            # a value that only its activation reads is not kept: the activation is computed in the same step
            if node.name in behind:
                act = acts[behind[node.name]]
                advance(act.name, side.step(node, act, fitted), [values[node.inputs[0]]])
            elif node.name not in acts:
                advance(node.name, side.step(node, None, fitted), [values[name] for name in node.inputs])
            for name in set(node.inputs):
                if last[name] == place and name in values:
                    values.pop(name).free()
            if progress:
                progress(place + 1, len(graph.nodes))
    for kept in values.values():  # some outputs are read by nodes too, and `last_use` never releases outputs
        kept.free()
    return fitted


def _seen(drawn: Drawn, inputs: Kept, grid: QParams | None, count: int) -> Batches:
    """Return a function that yields the images as one layer sees them."""

    def images() -> Iterator[Seen]:
        for index in range(count):
            yield Seen(inputs.get(index), drawn.outputs(index), *drawn.get(index), grid)

    return images
