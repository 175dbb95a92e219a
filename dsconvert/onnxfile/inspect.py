"""Find the weights that any ONNX file holds: the initializers of each convolution, by following the graph."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, takewhile

import onnx
from onnx import TensorProto, numpy_helper

from dsconvert.base.errors import InputError

NO_WEIGHT = (TensorProto.INT32, TensorProto.INT64)  # types of shapes, indices and tables
BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.INT8: 8,
    TensorProto.UINT8: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4,
}  # fmt: skip


NOTHING = onnx.NodeProto()
LONGEST = 4  # most nodes in a row: Reshape, Transpose, Reshape and Concat of `export.ort.quickconv`
# most steps of the search in one file; a yolov5x6 with jointly decoded weights takes some thousand
MOST_STEPS = 5_000_000
MOST_DIMS, MOST_DEPTH = 16, 100  # of a shape; of nodes between a stored tensor and the convolution


@dataclass(frozen=True)
class OnnxWeight:
    """A convolution's weight as it is stored.

    name: of the convolution.
    shape, type: of its largest initializer.
    bits: of all its initializers.
    count: weights in `shape`.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    bits: int
    count: int


def conv_weights(model: onnx.ModelProto) -> list[OnnxWeight]:
    """Return the weight of every Conv, ConvInteger and QLinearConv, in graph order.

    Scalars, shapes and tables are not counted. A tensor that several nodes read on the way to one weight is counted
    once.

    Raises InputError for weights that depend on each other in more ways than any network's, and IndexError or
    ValueError for invalid graphs.
    """
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
        """The same names as a set."""
        return frozenset(self.names)


@dataclass
class _Web:
    """Finds the initializers that a graph's values are computed from.

    Results are kept for each value. Convolutions may share all their sources, and a malicious file may go in circles or
    double its paths at every step.
    """

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
        """Return the largest of the initializers that a value is computed from, and the bits of all of them.

        Where many weights are decoded together, a convolution's own tensors are those whose names begin with the
        prefix, as docs/compatibility.md promises. So only these are counted, if there are any.
        """
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
        """Return a value's sources, found without recursion; values on a circle have none."""
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
        """Return the shape that a value has on its way to the convolution, or None if that is unclear."""
        if value in self._tensors:
            return tuple(self._tensors[value].dims)
        if value not in self._shapes:
            self._shapes[value] = None  # ends a circle
            node = self._makers.get(value)
            self._shapes[value] = None if node is None or depth > MOST_DEPTH else self._made(node, depth + 1)
        return self._shapes[value]

    def _made(self, node: onnx.NodeProto, depth: int) -> _Shape | None:
        self._spend(len(node.input))
        through = ("DequantizeLinear", "QuantizeLinear", "Cast", "Add", "Mul", "Pad", "Transpose")
        if node.op_type in through or _rearranges(node, self._makers) or _twice(node, self._makers):
            return self.shape(node.input[0], depth)
        if node.op_type == "Concat":  # joined along the input channels
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
            raise InputError("The weights of the ONNX file depend on each other in more ways than any network's.")


_NO_SOURCES = _Sources()


def _measure(parts: list[TensorProto]) -> _Measured | None:
    if not parts:
        return None
    # if each weight has a shift of its own, the integers count as the weight
    largest = max(parts, key=lambda t: (_count(t), t.data_type != TensorProto.FLOAT))
    bits = sum(_count(t) * BITS.get(t.data_type, 32) for t in parts)
    # one scale a channel is not counted; the scales of blocks are, as they are shifts (KDS)
    scales = [t for t in parts if t is not largest and t.data_type == TensorProto.FLOAT and len(t.dims) == 1]
    return largest, bits - sum(_count(t) * 32 for t in scales)


def _rearranges(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Return whether a node belongs to what `export.ort.quickconv` makes of the first convolution's padded weight."""
    source, steps = node, 0
    while source.op_type in ("Reshape", "Transpose", "Concat") and source.input and steps < LONGEST:
        source, steps = makers.get(source.input[0], NOTHING), steps + 1
    return node.op_type == "Reshape" and source.op_type == "Pad"


def _twice(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Return whether a node joins a weight with itself, padded differently each time."""
    padded = [makers.get(name, NOTHING) for name in node.input]
    return (
        node.op_type == "Concat" and all(p.op_type == "Pad" for p in padded) and len({p.input[0] for p in padded}) == 1
    )


def _count(tensor: onnx.TensorProto) -> int:
    return math.prod(max(n, 0) for n in tensor.dims)
