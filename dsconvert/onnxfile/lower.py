"""From a float ONNX graph to the graph that is measured, fitted and run in integers, and to what stays as it is.

What leads to a layer with weights is lowered; what comes behind the last of them, decoding and its like, is the tail:
it stays float, node by node. So do nodes in front that only move and scale the image (see `entrance`). Nothing is told
by a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.onnxfile.entrance import Entrance, find_entrance
from dsconvert.onnxfile.facts import SHAPES, Facts
from dsconvert.onnxfile.islands import island
from dsconvert.onnxfile.layers import Layer
from dsconvert.onnxfile.source import Array, used
from dsconvert.onnxfile.walk import Walk, leading_to
from dsconvert.onnxfile.ways import WAYS, weights

MOST_FLOAT = 0.5  # of all multiplications: a file that keeps more of them float is no int8 file


class NotLowered(Exception):
    """A layer reads what the graph has no operation for."""


@dataclass(frozen=True)
class Lowered:
    """A file in three parts: the nodes before the graph, the graph, and the nodes behind it."""

    entrance: Entrance  # what the graph reads
    front: tuple[int, ...]  # places of the nodes before it; not those in whose place the graph reads the file's bytes
    graph: Graph  # its outputs are the values that the tail reads, in the order of `exits`
    params: Mapping[str, ConvParams]  # weights and biases by convolution name
    exits: tuple[str, ...]  # the file's names of the graph's outputs
    flat: frozenset[str]  # exits that have two dimensions in the file, (n, c) for the graph's (n, c, 1, 1)
    tail: tuple[int, ...]  # places of the nodes behind them
    shapes: Mapping[str, str]  # shapes that the tail asks for -> the graph's value that has it
    fixed: Mapping[str, Array]  # shapes that it asks for of values that are no more, as they are for one batch
    stayed: Mapping[str, int]  # operators that stay float, before and behind the graph and in it, how many of each
    float_share: float  # multiplications of convolutions that stay float, as a share of all convolutions'


def lower(facts: Facts, layers: Iterable[Layer]) -> Lowered:
    """Take a file apart. Raises NotLowered, saying why, where a layer reads what the graph cannot express."""
    chosen = {layer.index: layer for layer in layers if not _counts(layer)}
    core = leading_to(facts, chosen)
    entrance = find_entrance(facts, core, chosen.keys())
    if entrance is None:
        raise NotLowered("its image is not made a float32 map with channels first before its layers")
    walk = Walk(facts, chosen, entrance, core.difference(entrance.nodes))
    for index, node in enumerate(facts.source.nodes):
        if index in walk.core:
            _add(walk, index, node)
    return _finished(walk)


def _counts(layer: Layer) -> bool:
    """Whether it is no layer but arithmetic: the mean of 0, 1, 2, ... by shares, as boxes are decoded from bins."""
    weight = layer.weight.flatten()
    return len(layer.weight) == 1 and len(weight) > 1 and bool((weight == torch.arange(len(weight))).all())


def _add(w: Walk, index: int, node: onnx.NodeProto) -> None:
    """Lower what the node makes; what the graph has no operation for yet waits for what reads it."""
    for output in node.output:
        if not output or output not in w.facts.moving or len(w.facts.shape(output)) not in (2, 4):
            continue
        if index in w.layers:
            _layer(w, w.layers[index], output)
        else:
            any(way(w, node, output) for way in WAYS)


def _layer(w: Walk, layer: Layer, output: str) -> None:
    """Lower a layer; what it reads is an island where the graph has no operation for it."""
    if weights(w, layer, output):
        return
    if w.known(layer.value) is None and island(w, layer.value):
        weights(w, layer, output)


def _finished(w: Walk) -> Lowered:
    """What is needed of all that was lowered, and the rest."""
    source, facts = w.facts.source, w.facts
    exits, tail, asked = dict[str, None](), set[int](), dict[str, str]()
    left = [v.name for v in source.model.graph.output]
    while left:
        name = left.pop()
        if name not in source.makers:  # stored, the image, or inside of a node's own graph
            continue
        index = source.makers[name]
        node = source.nodes[index]
        if name in w.place and index in w.core:
            exits[name] = None
        elif node.op_type in SHAPES and source.makers.get(node.input[0], -1) in w.core:
            asked[name] = node.input[0]
        elif index not in tail:
            if index in w.layers:
                raise NotLowered(f"nothing in integers stands for {_why(w, source.nodes[index])}")
            tail.add(index)
            left += used(node)
    before = {*w.entrance.nodes}
    front = before & tail if w.entrance.keeps_bytes else before
    tail -= before
    ordered = tuple(sorted(exits, key=lambda name: source.makers[name]))
    if not ordered:
        raise NotLowered("no layer's result leads to an output")
    graph = Graph(*_pruned(w.nodes, [w.place[name] for name in ordered]))
    there = {node.name for node in graph.nodes}
    shapes = {
        name: w.place[value] for name, value in asked.items()
        if w.place.get(value) in there and len(facts.shape(value)) == 4
    }  # fmt: skip
    fixed = {name: facts.values[name] for name in asked if name not in shapes}
    inside = {
        source.makers[out] for node in graph.nodes if node.op == "island"
        for one in node.attrs["part"].nodes for out in one.output if out
    }  # fmt: skip
    stayed: dict[str, int] = {}
    for index in sorted(tail | inside | front):
        if not facts.varying(source.nodes[index]):
            continue
        kind = source.nodes[index].op_type
        stayed[kind] = stayed.get(kind, 0) + 1
    params = {node.name: w.params[node.name] for node in graph.convs()}
    flat = frozenset(name for name in ordered if len(facts.shape(name)) == 2)
    share = _float_share(w, tail | inside)
    if share > MOST_FLOAT:
        raise NotLowered(f"{100 * share:.0f} % of its multiplications have no integers")
    return Lowered(
        w.entrance,
        tuple(sorted(front)),
        graph,
        params,
        ordered,
        flat,
        tuple(sorted(tail)),
        shapes,
        fixed,
        stayed,
        share,
    )


def _float_share(w: Walk, tail: set[int]) -> float:
    source = w.facts.source

    def count(index: int) -> int:
        node = source.nodes[index]
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return 0
        weight, made = w.facts.constant(node.input[1]), w.facts.shape(node.output[0])
        if weight is None:
            return 0
        given = w.facts.shape(node.input[0])
        pixels = {"Conv": (*made[:1], *made[2:]), "ConvTranspose": (*given[:1], *given[2:])}
        return int(weight.size * np.prod(pixels.get(node.op_type, made[:-1])))

    every = sum(map(count, range(len(source.nodes))))
    return sum(map(count, tail)) / every if every else 0.0


def _why(w: Walk, node: onnx.NodeProto) -> str:
    """Which operator keeps a layer from being lowered: the last one before it that the graph does not know."""
    left, seen = [*w.facts.varying(node)], set[str]()
    while left:
        name = left.pop(0)
        index = w.facts.source.makers.get(name)
        if name in w.place or name in seen or index is None:
            continue
        seen.add(name)
        before = [n for n in w.facts.varying(w.facts.source.nodes[index]) if n not in w.place]
        if not before:
            return f"the operator {w.facts.source.nodes[index].op_type} before a convolution"
        left += before
    return f"the operator {node.op_type}"


def _pruned(nodes: Mapping[str, Node], outputs: list[str]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """The nodes that lead to the outputs, in order."""
    needed, left = set[str](), list(outputs)
    while left:
        name = left.pop()
        if name not in needed and name in nodes:
            needed.add(name)
            left += nodes[name].inputs
    return tuple(node for name, node in nodes.items() if name in needed), tuple(outputs)
