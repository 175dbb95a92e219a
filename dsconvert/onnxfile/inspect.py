"""What weights an ONNX file holds, whoever made it: each convolution's initializers, found by graph structure."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, takewhile

import onnx
from onnx import TensorProto, numpy_helper

from dsconvert.base.errors import InputError

NO_WEIGHT = (TensorProto.INT32, TensorProto.INT64)  # shapes, places and tables
BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.INT8: 8,
    TensorProto.UINT8: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4,
}  # fmt: skip


NOTHING = onnx.NodeProto()
LONGEST = 4  # Reshape, Transpose, Reshape and Concat of `export.ort.quickconv`
MOST_STEPS = 5_000_000  # looks at one value's source; a yolov5x6 whose weights are made together takes some thousand
MOST_DIMS, MOST_DEPTH = 16, 100  # of a shape; of nodes between a stored one and the convolution


@dataclass(frozen=True)
class OnnxWeight:
    """A convolution's weight as stored: its largest initializer's shape and type, and all its bits together."""

    name: str
    shape: tuple[int, ...]
    type: str
    bits: int
    count: int


def conv_weights(model: onnx.ModelProto) -> list[OnnxWeight]:
    """One entry for every Conv, ConvInteger or QLinearConv, in graph order. Scalars, shapes and tables are not
    counted.

    Each weight is taken once where several nodes of its chain read it. Raises InputError for weights that hang on each
    other in more ways than any network's, IndexError or ValueError for graphs that are none."""
    web = _Web(model)
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type not in ("Conv", "ConvInteger", "QLinearConv"):
            continue
        place = 3 if node.op_type == "QLinearConv" else 1
        if len(node.input) <= place:
            continue
        made = web.measured(node.input[place], f"{node.name}." if node.name else "")
        if made is None:
            continue
        largest, bits = made
        shape = web.shape(node.input[place]) or tuple(largest.dims)
        known = largest.data_type in TensorProto.DataType.values()
        type_name = TensorProto.DataType.Name(largest.data_type).lower() if known else "unknown"
        found.append(OnnxWeight(node.name or f"conv {index}", shape, type_name, bits, math.prod(shape)))
    return found


_Measured = tuple[TensorProto, int]  # the largest of some initializers, and the bits of all
_Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Sources:
    """Names of initializers, each once, in the order in which they are read."""

    names: tuple[str, ...] = ()

    @cached_property
    def known(self) -> frozenset[str]:
        """The same, to look in."""
        return frozenset(self.names)


@dataclass
class _Web:
    """Which initializers a graph's values are computed from. What is found of a value is kept: convolutions may share
    all that they are made from, in files that go in circles or double their paths at every step too."""

    model: onnx.ModelProto
    _left: int = MOST_STEPS

    def __post_init__(self) -> None:
        self._tensors = {t.name: t for t in self.model.graph.initializer}
        self._names = sorted(self._tensors)
        self._makers = {out: node for node in self.model.graph.node for out in node.output}
        self._sources = {name: _Sources((name,)) for name in self._tensors}
        self._measures: dict[tuple[_Sources, str], _Measured | None] = {}
        self._shapes: dict[str, _Shape | None] = {}

    def measured(self, value: str, prefix: str) -> _Measured | None:
        """Of the initializers that the value is computed from, the largest, and the bits of all; of those alone whose
        names begin with the prefix, where there is one and they are some: where all weights are made together, these
        are the convolution's own. (That tensors begin with their convolution's name docs/compatibility.md promises.)"""
        sources = self._sources_of(value)
        for key in ((sources, prefix), (sources, "")) if prefix else ((sources, ""),):
            if key not in self._measures:
                self._measures[key] = _measure(self._parts(*key))
            if found := self._measures[key]:
                return found
        return None

    def _parts(self, sources: _Sources, prefix: str) -> list[TensorProto]:
        names = sources.names
        self._spend(len(names))
        if prefix:
            first = bisect_left(self._names, prefix)
            own = [*takewhile(lambda name: name.startswith(prefix), islice(self._names, first, None))]
            self._spend(len(own))
            chosen = sources.known.intersection(own)
            names = tuple(name for name in names if name in chosen) if chosen else ()
        return [t for t in map(self._tensors.__getitem__, names) if t.dims and t.data_type not in NO_WEIGHT]

    def _sources_of(self, value: str) -> _Sources:
        """Found from the initializers on, without recursion; what is in circles has none."""
        waiting = [value]
        begun: set[str] = set()
        while waiting:
            name = waiting[-1]
            node = self._makers.get(name)
            if name in self._sources or node is None:
                self._sources.setdefault(name, _NO_SOURCES)
                waiting.pop()
            elif name in begun:
                self._sources[name] = self._joined([self._sources.get(i, _NO_SOURCES) for i in node.input])
                waiting.pop()
            else:
                begun.add(name)
                self._spend(len(node.input))
                waiting.extend(i for i in reversed(node.input) if i not in self._sources and i not in begun)
        return self._sources[value]

    def _joined(self, parts: list[_Sources]) -> _Sources:
        different = [part for part in dict.fromkeys(parts) if part.names]
        if len(different) < 2:
            return different[0] if different else _NO_SOURCES
        self._spend(sum(len(part.names) for part in different))
        return _Sources(tuple(dict.fromkeys(chain.from_iterable(part.names for part in different))))

    def shape(self, value: str, depth: int = 0) -> _Shape | None:
        """The shape a value is brought into on its way to the convolution; None where that cannot be told."""
        if value in self._tensors:
            return tuple(self._tensors[value].dims)
        if value not in self._shapes:
            self._shapes[value] = None  # of a circle
            node = self._makers.get(value)
            self._shapes[value] = None if node is None or depth > MOST_DEPTH else self._made(node, depth + 1)
        return self._shapes[value]

    def _made(self, node: onnx.NodeProto, depth: int) -> _Shape | None:
        self._spend(len(node.input))
        through = ("DequantizeLinear", "QuantizeLinear", "Cast", "Add", "Mul", "Pad", "Transpose")
        if node.op_type in through or _rearranges(node, self._makers) or _twice(node, self._makers):
            return self.shape(node.input[0], depth)
        if node.op_type == "Concat":  # along the input channels
            parts = [self.shape(name, depth) for name in node.input]
            known = [p for p in parts if p is not None and len(p) > 1]
            return (known[0][0], sum(p[1] for p in known), *known[0][2:]) if len(known) == len(parts) else None
        stored = self._tensors.get(node.input[1]) if node.op_type == "Reshape" else None
        if stored is None or _count(stored) > MOST_DIMS or stored.data_location == TensorProto.EXTERNAL:
            return None
        shape = tuple(int(n) for n in numpy_helper.to_array(stored))
        return shape if all(n > 0 for n in shape) else None

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise InputError("The weights of the ONNX file hang on each other in more ways than those of any network.")


_NO_SOURCES = _Sources()


def _measure(parts: list[TensorProto]) -> _Measured | None:
    if not parts:
        return None
    # where each weight has a shift of its own, the integers are the weight
    largest = max(parts, key=lambda t: (_count(t), t.data_type != TensorProto.FLOAT))
    bits = sum(_count(t) * BITS.get(t.data_type, 32) for t in parts)
    # one scale a channel is not counted; scales of blocks are shifts, and are
    scales = [t for t in parts if t is not largest and t.data_type == TensorProto.FLOAT and len(t.dims) == 1]
    return largest, bits - sum(_count(t) * 32 for t in scales)


def _rearranges(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether it is part of what `export.ort.quickconv` makes of the first convolution's weight, padded first."""
    source, steps = node, 0
    while source.op_type in ("Reshape", "Transpose", "Concat") and source.input and steps < LONGEST:
        source, steps = makers.get(source.input[0], NOTHING), steps + 1
    return node.op_type == "Reshape" and source.op_type == "Pad"


def _twice(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether it joins one weight with itself, each time between other zeros."""
    padded = [makers.get(name, NOTHING) for name in node.input]
    return (
        node.op_type == "Concat" and all(p.op_type == "Pad" for p in padded) and len({p.input[0] for p in padded}) == 1
    )


def _count(tensor: onnx.TensorProto) -> int:
    return math.prod(max(n, 0) for n in tensor.dims)
