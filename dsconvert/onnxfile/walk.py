"""A graph in the making: the operations found so far, and which of them a value of the ONNX file became."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch

from dsconvert.graph.ir import INPUT, ConvParams, Node
from dsconvert.onnxfile.entrance import Entrance
from dsconvert.onnxfile.facts import Facts
from dsconvert.onnxfile.layers import Layer
from dsconvert.onnxfile.recognise import ELEMENTWISE, MOVING
from dsconvert.onnxfile.source import attribute, used

FAR = 16  # operators between an activation's source and its end: a GELU has 8
AFFINE = ("BatchNormalization", "Mul", "Add", "Sub", "Div")


@dataclass
class Walk:
    """The graph as far as it is made, and where it has the file's values."""

    facts: Facts
    layers: dict[int, Layer]  # by the place of their node
    entrance: Entrance  # where the graph begins
    core: set[int]  # places of the nodes that lead to layers, and of the layers, behind the entrance
    nodes: dict[str, Node] = field(default_factory=dict)  # of the graph, by name, in order
    params: dict[str, ConvParams] = field(default_factory=dict)  # of its convolutions
    place: dict[str, str] = field(default_factory=dict)  # the graph's value that a value of the file became
    widths: dict[str, int] = field(default_factory=dict)  # channels of the graph's values
    made: dict[tuple[object, ...], str] = field(default_factory=dict)  # values by what they are made of

    def __post_init__(self) -> None:
        source = self.facts.source
        self.place[self.entrance.value] = INPUT
        self.widths[INPUT] = self.entrance.shape[0]
        self.outputs = {v.name for v in source.model.graph.output}
        self.readers: dict[str, int] = {}
        for node in source.nodes:
            for name in used(node):
                self.readers[name] = self.readers.get(name, 0) + 1
        self.names = {*source.initializers, *source.makers, source.image.name}

    def known(self, value: str) -> str | None:
        """The graph's value for one of the file's; None where there is none."""
        if value not in self.place and not (value in self.facts.moving and self.folded(value)):
            return None
        return self.place[value]

    def new(self, op: str, inputs: list[str], attrs: Mapping[str, object], output: str | None, width: int = 0) -> str:
        """A value that is made so, the same where it is made already; `width` are its channels where the file has no
        such value."""
        key = (op, *inputs, str(attrs))
        if key not in self.made:
            name = self.free(f"{self.facts.source.free_prefix}{op}{len(self.nodes)}")
            self.made[key] = self.put(Node(op, name, tuple(inputs), dict(attrs)), output, width)
        elif output is not None:
            self.place[output] = self.made[key]
        return self.made[key]

    def put(self, node: Node, output: str | None, width: int = 0) -> str:
        """Take a node into the graph; its value is the file's `output`, if there is one."""
        self.nodes[node.name] = node
        self.widths[node.name] = width or self.facts.shape(str(output))[1]
        if output is not None:
            self.place[output] = node.name
        return node.name

    def as_choice(self, name: str) -> tuple[str, list[int] | None]:
        """What a value chooses channels of, and which; None where it is no choice."""
        node = self.nodes.get(name)
        return (node.inputs[0], list(node.attrs["channels"])) if node and node.op == "select" else (name, None)

    def choose(self, base: str, chosen: list[int], output: str | None = None) -> str:
        """Channels of a value, under the name that the file has for them, if it has one. All of them are the value
        itself, and a choice from a choice is one from what that was made of."""
        base, before = self.as_choice(base)
        if before is not None:
            chosen = [before[i] for i in chosen]
        if chosen != list(range(self.widths[base])):
            return self.new("select", [base], {"channels": chosen}, output, len(chosen))
        if output is not None:
            self.place[output] = base
        return base

    def layer_name(self, layer: Layer) -> str:
        """After the stored weight, where exporters have not numbered it."""
        name = layer.stored.removesuffix(".weight")
        if "::" in name:  # made up by torch's exporter, which calls the node /layer1/0/Conv
            name = layer.name.strip("/").rpartition("/")[0].replace("/", ".") or f"conv{len(self.params)}"
        return self.free(name)

    def free(self, name: str) -> str:
        """The name, or the next that is nobody's, nor the beginning of one."""
        found, number = name, 0
        while found in self.nodes or found in self.names or any(n.startswith(f"{found}.") for n in self.nodes):
            number += 1
            found = f"{name}_{number}"
        return found

    def roots(self, value: str) -> list[str]:
        """Values in the graph that this one is an elementwise function of, the nearest first."""
        found: list[str] = []
        self._climb(value, found, FAR)
        return found

    def _climb(self, value: str, found: list[str], far: int) -> None:
        node = self.facts.maker(value)
        if node is None or not far or node.op_type not in ELEMENTWISE or not self.by_numbers(node):
            return
        sources = list(dict.fromkeys(self.facts.varying(node)))
        chains: list[list[str]] = []
        for name in sources:
            chain = [name] if name in self.place else []
            self._climb(name, chain, far - 1)
            chains.append(chain)
        found += [name for name in chains[0] if all(name in chain for chain in chains[1:]) and name not in found]

    def by_numbers(self, node: onnx.NodeProto) -> bool:
        """Whether all constants that the node reads are single numbers."""
        fixed = [self.facts.constant(name) for name in node.input if name and name not in self.facts.moving]
        return all(value is not None and value.size == 1 for value in fixed)

    def origin(self, value: str, kinds: Collection[str] = MOVING) -> str | None:
        """The one value in the graph whose numbers are moved to this one, or whatever nodes of these kinds do."""
        found = self.facts.sources(
            value, self.place, lambda node: node.op_type in kinds and mode(node) in (None, "nearest")
        )
        return found.pop() if found is not None and len(found) == 1 else None

    def folded(self, output: str) -> bool:
        """Whether a value is a multiple of a convolution, plus something, channel by channel; then both go into the
        convolution's weights, which nothing else reads."""
        node = self.facts.maker(output)
        varying = [] if node is None else self.facts.varying(node)
        if node is None or node.op_type not in AFFINE or len(varying) != 1:
            return False
        before = varying[0]
        if before not in self.place and not self.folded(before):
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


def leading_to(facts: Facts, layers: Iterable[int]) -> set[int]:
    """Places of the nodes that layers' inputs are made by, and the layers' own."""
    source, found = facts.source, set(layers)
    left = [name for index in found for name in facts.varying(source.nodes[index])]
    while left:
        index = source.makers.get(left.pop())
        if index is not None and index not in found:
            found.add(index)
            left += facts.varying(source.nodes[index])
    return found


def mode(node: onnx.NodeProto) -> str | None:
    """How a Resize fills in, None for other operators."""
    if node.op_type not in ("Resize", "Upsample"):
        return None
    found = attribute(node, "mode", b"nearest")
    return found.decode() if isinstance(found, bytes) else str(found)
