"""Layout fast, last step: maps are joined by the operator that looks activations up, in the same pass.

ONNX Runtime's Concat of maps with their channels last copies a few bytes at a time. The operator of our own takes
several maps, each with its table, and joins them on all threads. An activation that nobody else reads is looked up
there, and not before."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dsconvert.export.ort.lastchannels import LAST
from dsconvert.export.written import Written
from dsconvert.onnxfile.operators import DOMAIN, LOOKUP, TABLE
from dsconvert.onnxfile.source import attribute

MOST = 64  # maps that the operator joins
# whose output is bytes; and those whose output is bytes where their first input is
BYTES = ("QuantizeLinear", "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu",
         "QLinearConcat", LOOKUP)  # fmt: skip
MOVING = ("NhwcMaxPool", "Gather", "Transpose", "Reshape", "Slice", "Split", "Concat")
AS_IT_IS = np.arange(TABLE, dtype=np.uint8)


def join_by_tables(written: Written) -> Written:
    """The same numbers with every Concat of maps of bytes, channels last, as one node of ours."""
    model = onnx.ModelProto()
    model.CopyFrom(written.model)
    graph = model.graph
    makers = {out: node for node in graph.node for out in node.output}
    tables = {t.name: t for t in graph.initializer}
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(v.name for v in graph.output)
    gone: set[str] = set()
    taken = {*makers, *tables, *(v.name for v in graph.input)}
    free = (name for number in count() if (name := f"joined{number}") not in taken)  # no dot: no layer's own
    for node in graph.node:
        if not _joins_bytes(node, makers):
            continue
        maps, rows = [], []
        for name in node.input:
            maker = makers[name]
            alone = maker.op_type == LOOKUP and len(maker.input) == 2 and reads[name] == 1
            table = numpy_helper.to_array(tables[maker.input[0]]) if alone else AS_IT_IS
            maps.append(maker.input[1] if alone else name)
            rows.append(table)
            gone |= {name} if alone else set()
        stored = next(free)
        graph.initializer.append(numpy_helper.from_array(np.stack(rows), stored))
        node.CopyFrom(helper.make_node(LOOKUP, [stored, *maps], list(node.output), domain=DOMAIN))
    nodes = [node for node in graph.node if not gone & set(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)
    left = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in left]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    places = {value: place for value, place in written.places.items() if place.name not in gone}
    return replace(written, model=model, places=places)


def _joins_bytes(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether it is a Concat of maps of bytes along their last dimension, and no more of them than can be."""
    if node.op_type != "Concat" or not 2 <= len(node.input) <= MOST or not node.output[0].endswith(LAST):
        return False
    return attribute(node, "axis") == 3 and all(_is_bytes(name, makers) for name in node.input)


def _is_bytes(name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether a node makes bytes of it for sure."""
    while (maker := makers.get(name)) is not None:
        if maker.op_type in BYTES:
            return True
        if maker.op_type not in MOVING:
            return False
        name = maker.input[0]
    return False
