"""What the graph has no operation for stays float: the file's own operators, as one node of the graph."""

from __future__ import annotations

import onnx
import torch

from dsconvert.graph.ir import Node
from dsconvert.graph.island import FLOAT, Part
from dsconvert.onnxfile.facts import is_near
from dsconvert.onnxfile.source import Array
from dsconvert.onnxfile.walk import Walk

MOST_NODES = 200  # of an island: more are another network


def island(w: Walk, value: str) -> bool:
    """Make a map (n, c, h, w) of the file by its own operators from maps that the graph has. False where it is no map,
    or an operator on the way is unknown."""
    shape = w.facts.shape(value)
    if len(shape) != 4 or shape[0] != w.facts.source.image.batch:
        return False
    inside, inputs = set[int](), dict[str, None]()
    left = [value]
    while left:
        name = left.pop()
        if name in w.place and len(w.facts.shape(name)) == 4:
            inputs[name] = None
            continue
        index = w.facts.source.makers.get(name)
        if index is None or len(inside) > MOST_NODES or not _is_known(w.facts.source.nodes[index]):
            return False
        if index not in inside:
            inside.add(index)
            left += w.facts.varying(w.facts.source.nodes[index])
    nodes = tuple(w.facts.source.nodes[i] for i in sorted(inside))
    made = {out for node in nodes for out in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
    fixed = {name: w.facts.constant(name) for name in read if name not in inputs}
    if not inputs or any(found is None for found in fixed.values()):
        return False
    given = tuple(name for name in read if name in inputs)
    known = {name: found for name, found in fixed.items() if found is not None}
    part = Part(nodes, known, given, value, tuple(shape[1:]), shape[0])
    if not _computes(part, [w.facts.values[x] for x in given], w.facts.values[value]):
        return False
    name = w.free(f"{w.facts.source.free_prefix}island{len(w.nodes)}")
    w.put(Node("island", name, tuple(w.place[x] for x in given), {"part": part}), value)
    return True


def _computes(part: Part, given: list[Array], wanted: Array) -> bool:
    """Whether torch makes of the maps what ONNX Runtime made of them, and of the first image alone what it made of it
    among others."""
    try:
        with torch.no_grad():
            found, alone = (part.compute([torch.from_numpy(x[:n]) for x in given]).numpy() for n in (part.batch, 1))
    except (ValueError, TypeError, IndexError, RuntimeError, KeyError, AssertionError):  # an attribute that is unknown
        return False
    return is_near(found, wanted) and is_near(alone, wanted[:1])


def _is_known(node: onnx.NodeProto) -> bool:
    return node.op_type in FLOAT and node.domain in ("", "ai.onnx")
