"""From a float ONNX graph to the graph that is measured, fitted and run in integers, and to what stays as it is.

What leads to a layer with weights is lowered; what comes behind the last of them, decoding and its like, is the tail:
it stays float, node by node. Nothing is told by a name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.onnxfile.facts import Facts
from dsconvert.onnxfile.heads import SCALING, find_attention
from dsconvert.onnxfile.layers import Layer
from dsconvert.onnxfile.recognise import ELEMENTWISE, MOVING, activation_named, moved, places, points
from dsconvert.onnxfile.source import Array, used

FAR = 16  # operators between an activation's source and its end: a GELU has 8
AFFINE = ("BatchNormalization", "Mul", "Add", "Sub", "Div")


AT_EVERY_PIXEL = {"stride": 1, "dilation": 1, "groups": 1}


class NotLowered(Exception):
    """A layer reads what the graph has no operation for."""


@dataclass(frozen=True)
class Lowered:
    """A file in two parts: the graph, and the nodes behind it."""

    graph: Graph  # its outputs are the values that the tail reads, in the order of `exits`
    params: Mapping[str, ConvParams]  # weights and biases by convolution name
    exits: tuple[str, ...]  # the file's names of the graph's outputs
    flat: frozenset[str]  # exits that have two dimensions in the file, (n, c) for the graph's (n, c, 1, 1)
    tail: tuple[int, ...]  # places of the nodes behind them
    fixed: Mapping[str, Array]  # values that the tail reads and that are made of shapes inside of the graph
    stayed: Mapping[str, int]  # operators of the tail, how many of each
    float_share: float  # multiplications of convolutions that stay float, as a share of all convolutions'


def lower(facts: Facts, layers: Iterable[Layer]) -> Lowered:
    """Take a file apart. Raises NotLowered, saying why, where a layer reads what the graph cannot express."""
    walk = _Walk(facts, {layer.index: layer for layer in layers if not _counts(layer)})
    if facts.source.image.name not in facts.moving or len(facts.shape(facts.source.image.name)) != 4:
        raise NotLowered("its input is no image")
    for index, node in enumerate(facts.source.nodes):
        if index in walk.core:
            walk.add(index, node)
    return walk.finish()


def _counts(layer: Layer) -> bool:
    """Whether it is no layer but arithmetic: the mean of 0, 1, 2, ... by shares, as boxes are decoded from bins."""
    weight = layer.weight.flatten()
    return len(layer.weight) == 1 and len(weight) > 1 and bool((weight == torch.arange(len(weight))).all())


@dataclass
class _Walk:
    """Adds the file's nodes one by one. `place` has the graph's value that a value of the file became."""

    facts: Facts
    layers: dict[int, Layer]
    nodes: dict[str, Node] = field(default_factory=dict)
    params: dict[str, ConvParams] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # channels of the graph's values
    made: dict[tuple[object, ...], str] = field(default_factory=dict)  # values by what they are made of

    def __post_init__(self) -> None:
        source = self.facts.source
        self.place[source.image.name] = INPUT
        self.widths[INPUT] = self.facts.shape(source.image.name)[1]
        self.outputs = {v.name for v in source.model.graph.output}
        self.readers: dict[str, int] = {}
        for node in source.nodes:
            for name in used(node):
                self.readers[name] = self.readers.get(name, 0) + 1
        self.core = self._leading_to(self.layers)
        self.names = {*source.initializers, *source.makers, source.image.name}

    def _leading_to(self, layers: Iterable[int]) -> set[int]:
        source, found = self.facts.source, set(layers)
        left = [source.nodes[i].input[0] for i in layers]
        while left:
            name = left.pop()
            index = source.makers.get(name)
            if index is None or name not in self.facts.moving or index in found:
                continue
            found.add(index)
            left += self.facts.varying(source.nodes[index])
        for index in list(found):  # and what layers read through other layers
            left += self.facts.varying(source.nodes[index])
        while left:
            index = source.makers.get(left.pop())
            if index is not None and index not in found:
                found.add(index)
                left += self.facts.varying(source.nodes[index])
        return found

    def add(self, index: int, node: onnx.NodeProto) -> None:
        """Lower what the node makes; what the graph has no operation for yet waits for what reads it."""
        for output in node.output:
            if not output or output not in self.facts.moving or len(self.facts.shape(output)) not in (2, 4):
                continue
            ways: list[Callable[[onnx.NodeProto, str], bool]] = [
                self._concat, self._activation, self._moved, self._sum, self._pool, self._affine,
                self._attention,
            ]  # fmt: skip
            if index in self.layers:
                ways = [partial(self._layer, self.layers[index])]
            any(way(node, output) for way in ways)

    def finish(self) -> Lowered:
        """What is needed of all that was lowered, and the rest."""
        source, facts = self.facts.source, self.facts
        exits, tail, fixed = dict[str, None](), set[int](), dict[str, Array]()
        left = [v.name for v in source.model.graph.output]
        while left:
            name = left.pop()
            if name in source.initializers or name == source.image.name:
                continue
            index = source.makers[name]
            node = source.nodes[index]
            if name in self.place and index in self.core:
                exits[name] = None
            elif node.op_type in ("Shape", "Size") and self._inside(node.input[0]):
                fixed[name] = facts.values[name]
            elif index not in tail:
                if index in self.layers:
                    raise NotLowered(f"{self._why(source.nodes[index])}")
                tail.add(index)
                left += used(node)
        ordered = tuple(sorted(exits, key=lambda name: source.makers[name]))
        if not ordered:
            raise NotLowered("no layer's result leads to an output")
        graph = Graph(*_pruned(self.nodes, [self.place[name] for name in ordered]))
        stayed: dict[str, int] = {}
        for index in sorted(tail):
            if not facts.varying(source.nodes[index]):
                continue
            kind = source.nodes[index].op_type
            stayed[kind] = stayed.get(kind, 0) + 1
        params = {node.name: self.params[node.name] for node in graph.convs()}
        flat = frozenset(name for name in ordered if len(facts.shape(name)) == 2)
        return Lowered(graph, params, ordered, flat, tuple(sorted(tail)), fixed, stayed, self._float_share(tail))

    def _inside(self, name: str) -> bool:
        """Whether the tail cannot read a value, as it is inside of the graph."""
        source = self.facts.source
        index = source.makers.get(name)
        return index is not None and index in self.core

    def _float_share(self, tail: set[int]) -> float:
        source = self.facts.source

        def count(index: int) -> int:
            node = source.nodes[index]
            weight = self.facts.constant(node.input[1]) if len(node.input) > 1 else None
            made = self.facts.shape(node.output[0])
            if weight is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                return 0
            return int(weight.size * np.prod(made[2:] if node.op_type.startswith("Conv") else made[:-1]))

        every = sum(map(count, range(len(source.nodes))))
        return sum(map(count, tail)) / every if every else 0.0

    def _why(self, node: onnx.NodeProto) -> str:
        """Which operator keeps a layer from being lowered: the last one before it that the graph does not know."""
        left, seen = [*self.facts.varying(node)], set[str]()
        while left:
            name = left.pop(0)
            index = self.facts.source.makers.get(name)
            if name in self.place or name in seen or index is None:
                continue
            seen.add(name)
            before = [n for n in self.facts.varying(self.facts.source.nodes[index]) if n not in self.place]
            if not before:
                return f"the operator {self.facts.source.nodes[index].op_type} before a convolution"
            left += before
        return f"the operator {node.op_type}"

    # one way of lowering each

    def _layer(self, layer: Layer, node: onnx.NodeProto, output: str) -> bool:
        given, shape = self._known(layer.value), self.facts.shape(layer.value)
        if layer.adder is not None:
            output = self.facts.source.nodes[layer.adder].output[0]
        if given is None or (layer.linear and len(shape) != 2):
            return False
        pads = (0, 0, 0, 0) if layer.linear else layer.pads_of(shape[2:])
        square = len(set(layer.stride)) == len(set(layer.dilation)) == len(set(pads)) == 1
        if not square:
            return False
        attrs = {
            "stride": layer.stride[0], "padding": pads[0], "dilation": layer.dilation[0], "groups": layer.groups,
        }  # fmt: skip
        name, weight = self._layer_name(layer), layer.weight
        before = self.nodes.get(given)
        if before is not None and before.op == "space_to_depth" and attrs == {**attrs, **AT_EVERY_PIXEL}:
            given, weight = before.inputs[0], _at_full_size(weight)
            attrs |= {"stride": 2, "padding": 2 * pads[0]}
        self._put(Node("conv", name, (given,), attrs), output)
        self.params[name] = ConvParams(weight, layer.bias)
        return True

    def _concat(self, node: onnx.NodeProto, output: str) -> bool:
        if node.op_type != "Concat" or _attribute(node, "axis") not in (1, -3):
            return False
        given = [self._known(name) for name in node.input]
        if any(name is None for name in given) or len(self.facts.shape(output)) != 4:
            return False
        names = [str(name) for name in given]
        parts = [self._as_choice(name) for name in names]
        if len({base for base, _ in parts}) == 1 and all(chosen is not None for _, chosen in parts):
            self._choose(parts[0][0], [i for _, chosen in parts for i in chosen or ()], output)
        else:
            self._new("concat", names, {}, output)
        return True

    def _as_choice(self, name: str) -> tuple[str, list[int] | None]:
        """What a value chooses channels of, and which; None where it is no choice."""
        node = self.nodes.get(name)
        return (node.inputs[0], list(node.attrs["channels"])) if node and node.op == "select" else (name, None)

    def _choose(self, base: str, chosen: list[int], output: str) -> None:
        """Channels of a value under the name that the file has for them; all of them are the value itself."""
        if chosen == list(range(self.widths[base])):
            self.place[output] = base
        else:
            self._new("select", [base], {"channels": chosen}, output)

    def _activation(self, node: onnx.NodeProto, output: str) -> bool:
        if node.op_type not in ELEMENTWISE:
            return False
        for root in self._roots(output):
            found = self.facts.compute(output, {root: points()})
            named = activation_named(found) if found is not None else None
            if named is None:
                continue
            kind, top = named
            given = self.place[root]
            if kind == "same":
                self.place[output] = given
            elif kind == "ReLU":
                self._new("relu", [given], {"top": top}, output)
            else:
                self._new("act", [given], {"kind": kind}, output)
            return True
        return False

    def _roots(self, value: str) -> list[str]:
        """Values in the graph that this one is an elementwise function of, the nearest first."""
        found: list[str] = []
        self._climb(value, found, FAR)
        return found

    def _climb(self, value: str, found: list[str], far: int) -> None:
        index = self.facts.source.makers.get(value)
        if index is None or not far:
            return
        node = self.facts.source.nodes[index]
        if node.op_type not in ELEMENTWISE or not self._by_numbers(node):
            return
        sources = list(dict.fromkeys(self.facts.varying(node)))
        chains: list[list[str]] = []
        for name in sources:
            chain = [name] if name in self.place else []
            self._climb(name, chain, far - 1)
            chains.append(chain)
        found += [name for name in chains[0] if all(name in chain for chain in chains[1:]) and name not in found]

    def _by_numbers(self, node: onnx.NodeProto) -> bool:
        """Whether all constants that the node reads are single numbers."""
        fixed = [self.facts.constant(name) for name in node.input if name and name not in self.facts.moving]
        return all(value is not None and value.size == 1 for value in fixed)

    def _moved(self, node: onnx.NodeProto, output: str) -> bool:
        root = self._origin(output) if node.op_type in MOVING else None
        if root is None:
            return False
        own = self.facts.shape(root)
        shape = own if len(own) == 4 else (*own, 1, 1)
        numbers = places(own)
        found = self.facts.compute(output, {root: numbers}) if numbers is not None else None
        what = moved(found, shape) if found is not None else None
        if what is None:
            return False
        given, chosen = self.place[root], list(what.channels)
        if what.kind == "upsample":
            given = self._new("upsample", [given], {"scale": what.scale}, None, shape[1])
        elif what.kind == "space_to_depth":
            given = self._new("space_to_depth", [given], {}, None, 4 * shape[1])
        elif (before := self._as_choice(given))[1] is not None:
            given, chosen = before[0], [before[1][i] for i in chosen]
        self._choose(given, chosen, output)
        return True

    def _origin(self, value: str, kinds: Collection[str] = MOVING) -> str | None:
        """The one value in the graph whose numbers are moved to this one, or whatever nodes of these kinds do."""
        found, left, seen = set[str](), [value], set[str]()
        while left:
            name = left.pop()
            index = self.facts.source.makers.get(name)
            if index is None:
                return None
            node = self.facts.source.nodes[index]
            if node.op_type not in kinds or _mode(node) not in (None, "nearest"):
                return None
            for before in self.facts.varying(node):
                if before in self.place:
                    found.add(before)
                elif before not in seen and before in self.facts.source.makers:
                    seen.add(before)
                    left.append(before)
        return found.pop() if len(found) == 1 else None

    def _sum(self, node: onnx.NodeProto, output: str) -> bool:
        """Sums and products of two maps."""
        if node.op_type not in ("Add", "Mul") or len(self.facts.varying(node)) != 2:
            return False
        given = [self._known(name) for name in node.input]
        shapes = [self.facts.shape(name)[1:] for name in node.input]
        if any(name is None for name in given):
            return False
        a, b = (str(name) for name in given)
        if node.op_type == "Add" and shapes[0] == shapes[1]:
            self._new("add", [a, b], {}, output)
            return True
        if node.op_type == "Mul" and len(shapes[0]) == len(shapes[1]) == 3:
            if shapes[1] in (shapes[0], (shapes[0][0], 1, 1)):
                self._new("product", [a, b], {}, output)
                return True
            if shapes[0] == (shapes[1][0], 1, 1):
                self._new("product", [b, a], {}, output)
                return True
        return False

    def _pool(self, node: onnx.NodeProto, output: str) -> bool:
        before, around = self._padded(node.input[0]) if node.op_type == "AveragePool" else (node.input[0], 0)
        given = self._known(before)
        if given is None:
            return False
        shape, made = self.facts.shape(before), self.facts.shape(output)
        if node.op_type == "GlobalAveragePool" or (node.op_type == "ReduceMean" and made == (*shape[:2], 1, 1)):
            self._new("mean", [given], {}, output)
            return True
        if node.op_type in ("Resize", "Upsample") and _mode(node) == "linear" and len(shape) == len(made) == 4:
            scale = made[2] // shape[2]
            halves = _attribute(node, "coordinate_transformation_mode", b"half_pixel")
            if shape[2:] == (made[2] * 2, made[3] * 2) and b"half_pixel" in halves:  # between two pixels: their mean
                self._new("mean_pool", [given], {"kernel": 2, "stride": 2, "padding": 0, "padded": 0}, output)
                return True
            if scale > 1 and made[2:] == (shape[2] * scale, shape[3] * scale) and b"half_pixel" in halves:
                self._new("resize", [given], {"scale": scale}, output)
                return True
        if node.op_type not in ("MaxPool", "AveragePool") or len(shape) != 4:
            return False
        kernel, stride = _attribute(node, "kernel_shape"), _attribute(node, "strides", [1, 1])
        pads, dilations = _attribute(node, "pads", [0] * 4), _attribute(node, "dilations", [1, 1])
        if len({*kernel}) > 1 or len({*stride}) > 1 or len({*pads}) > 1 or {*dilations} != {1}:
            return False
        if around and pads[0]:
            return False
        pads = [around] * 4 if around else pads
        spans = [(n + 2 * pads[0] - kernel[0]) // stride[0] + 1 for n in shape[2:]]
        if list(made[2:]) != spans or _attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return False  # some window hangs over the edge
        attrs = {"kernel": kernel[0], "stride": stride[0], "padding": pads[0]}
        if node.op_type == "AveragePool":
            padded = 1 if around else _attribute(node, "count_include_pad", 0)
            self._new("mean_pool", [given], {**attrs, "padded": padded}, output)
        else:
            self._new("maxpool", [given], attrs, output)
        return True

    def _attention(self, node: onnx.NodeProto, output: str) -> bool:
        through = partial(self._origin, kinds=MOVING | SCALING)
        found = find_attention(self.facts, output, through) if len(self.facts.shape(output)) == 4 else None
        if found is None:
            return False
        parts = []
        for root, chosen in zip(found.roots, found.channels, strict=True):
            base, before = self._as_choice(self.place[root])
            channels = [before[i] for i in chosen] if before is not None else chosen
            parts.append(base if channels == list(range(self.widths[base])) else self._selected(base, channels))
        even = found.size == found.value
        attrs = {"heads": found.heads, "size": found.size} if even else found.attrs
        self._new("attention" if even else "uneven_attention", parts, attrs, output)
        return True

    def _selected(self, base: str, channels: list[int]) -> str:
        return self._new("select", [base], {"channels": channels}, None, len(channels))

    def _padded(self, value: str) -> tuple[str, int]:
        """What a Pad with as many zeros on all four sides reads, and how many; a value of anything else, and 0."""
        node = self.facts.source.nodes[self.facts.source.makers[value]] if value in self.facts.source.makers else None
        if node is None or node.op_type != "Pad" or _attribute(node, "mode", b"constant") != b"constant":
            return value, 0
        pads = _attribute(node, "pads") or (self.facts.constant(node.input[1]) if len(node.input) > 1 else None)
        filled = self.facts.constant(node.input[2]) if len(node.input) > 2 else None
        if pads is None or len(pads) != 8 or (filled is not None and np.any(filled)):
            return value, 0
        sides = {int(n) for n in (*pads[2:4], *pads[6:8])}
        return (node.input[0], sides.pop()) if len(sides) == 1 and not any((*pads[:2], *pads[4:6])) else (value, 0)

    def _affine(self, node: onnx.NodeProto, output: str) -> bool:
        """A multiple of a convolution, plus something, channel by channel: it goes into the convolution's weights. With
        single numbers it may be part of an activation, and waits."""
        return not self._by_numbers(node) and self._folded(output)

    def _folded(self, output: str) -> bool:
        node = self.facts.source.nodes[self.facts.source.makers[output]]
        varying = self.facts.varying(node)
        if node.op_type not in AFFINE or len(varying) != 1:
            return False
        before = varying[0]
        if before not in self.place and not self._folds(before):
            return False
        conv = self.nodes.get(self.place[before])
        alone = self.readers.get(before) == 1 and before not in self.outputs
        if conv is None or conv.op != "conv" or not alone:
            return False
        zeros = np.zeros(self.facts.shape(before), np.float32)
        made = [self.facts.compute(output, {before: zeros + number}) for number in (0, 1, 2)]
        if any(m is None or m.shape != zeros.shape for m in made):
            return False
        nothing, once, twice = (np.asarray(m).reshape(*m.shape[:2], -1) for m in made if m is not None)
        factor = once - nothing
        even = all(np.allclose(m, m[..., :1], rtol=1e-6) for m in (nothing, factor))
        if not even or not np.allclose(twice - once, factor, rtol=1e-4, atol=1e-6 * np.abs(factor).max()):
            return False
        a, b = (torch.from_numpy(np.ascontiguousarray(m[0, :, 0])) for m in (factor, nothing))
        p = self.params[conv.name]
        self.params[conv.name] = ConvParams(p.weight * a[:, None, None, None], p.bias * a + b)
        self.place[output] = self.place.pop(before)
        return True

    def _folds(self, value: str) -> bool:
        return value in self.facts.source.makers and self._folded(value)

    # the graph

    def _known(self, value: str) -> str | None:
        """The graph's value for one of the file's; None where there is none."""
        if value not in self.place and not (value in self.facts.moving and self._folds(value)):
            return None
        return self.place[value]

    def _new(
        self, op: str, inputs: list[str], attrs: Mapping[str, object], output: str | None, width: int = 0
    ) -> str:
        """A value that is made so, the same where it is made already; `width` are its channels where the file has no
        such value."""
        key = (op, *inputs, str(attrs))
        if key not in self.made:
            name = self._free(f"{self.facts.source.free_prefix}{op}{len(self.nodes)}")
            self.made[key] = self._put(Node(op, name, tuple(inputs), dict(attrs)), output, width)
        elif output is not None:
            self.place[output] = self.made[key]
        return self.made[key]

    def _put(self, node: Node, output: str | None, width: int = 0) -> str:
        self.nodes[node.name] = node
        self.widths[node.name] = width or self.facts.shape(str(output))[1]
        if output is not None:
            self.place[output] = node.name
        return node.name

    def _layer_name(self, layer: Layer) -> str:
        """After the stored weight, where exporters have not numbered it."""
        name = layer.stored.removesuffix(".weight")
        if "::" in name:  # made up by torch's exporter, which calls the node /layer1/0/Conv
            name = layer.name.strip("/").rpartition("/")[0].replace("/", ".") or name
        return self._free(name)

    def _free(self, name: str) -> str:
        """The name, or the next that is nobody's, nor the beginning of one."""
        found, number = name, 0
        while found in self.nodes or found in self.names or any(n.startswith(f"{found}.") for n in self.nodes):
            number += 1
            found = f"{name}_{number}"
        return found


def _at_full_size(weight: Tensor) -> Tensor:
    """The weight (cho, chi, 2 kh, 2 kw) that gives at every second pixel of an image what (cho, 4 chi, kh, kw) gives
    on its `space_to_depth`."""
    cho, wide, kh, kw = weight.shape
    apart = weight.reshape(cho, 2, 2, wide // 4, kh, kw)  # the column's phase, then the row's, then the channel
    return apart.permute(0, 3, 4, 2, 5, 1).reshape(cho, wide // 4, 2 * kh, 2 * kw).contiguous()


def _pruned(nodes: Mapping[str, Node], outputs: list[str]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """The nodes that lead to the outputs, in order."""
    needed, left = set[str](), list(outputs)
    while left:
        name = left.pop()
        if name not in needed and name in nodes:
            needed.add(name)
            left += nodes[name].inputs
    return tuple(node for name, node in nodes.items() if name in needed), tuple(outputs)


def _attribute(node: onnx.NodeProto, name: str, usual: Any = None) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), usual)


def _mode(node: onnx.NodeProto) -> str | None:
    """How a Resize fills in, None for other operators."""
    if node.op_type not in ("Resize", "Upsample"):
        return None
    mode = _attribute(node, "mode", b"nearest")
    return mode.decode() if isinstance(mode, bytes) else str(mode)

