"""What one run of a float ONNX file tells: the shapes of its values, and which of them are the same for all images."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.source import Array, Source, giving, used

LONGEST = 64  # most nodes that are followed from a value back to its sources
MOST_OFF = 1e-3  # of a map's largest number, that torch's and ONNX Runtime's float32 sums may differ by
SHAPES = ("Shape", "Size")  # operators that depend only on an image's size


@dataclass(frozen=True)
class Facts:
    """A file, and its values for one batch of images of the size that it is converted for."""

    source: Source
    values: Mapping[str, Array]  # by name, of all nodes; values that are not tensors are missing

    @cached_property
    def moving(self) -> frozenset[str]:
        """Names of values that change with the image's content."""
        found = {self.source.image.name}
        for node in self.source.nodes:
            if node.op_type not in SHAPES and not found.isdisjoint(used(node)):
                found.update(node.output)
        return frozenset(found)

    def varying(self, node: onnx.NodeProto) -> list[str]:
        """Return the inputs of a node that change with the image."""
        return [name for name in node.input if name in self.moving]

    def constant(self, name: str) -> Array | None:
        """Return a value that is the same for every image of this size; None for others."""
        if name in self.moving or not name:
            return None
        if name in self.source.initializers:
            return numpy_helper.to_array(self.source.initializers[name])
        return self.values.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value, empty if it is unknown."""
        return tuple(self.values[name].shape) if name in self.values else ()

    def maker(self, value: str) -> onnx.NodeProto | None:
        """Return the node that makes a value; None for stored values and the image."""
        index = self.source.makers.get(value)
        return None if index is None else self.source.nodes[index]

    def sources(self, value: str, ends: Container[str], passes: Callable[[onnx.NodeProto], bool]) -> set[str] | None:
        """Return which of the `ends` a value is made from; None if other values take part, or too many nodes.

        passes: whether a node may lie between them.
        """
        found, left, seen = set[str](), [value], {value}
        while left:
            node = self.maker(left.pop())
            if node is None or not passes(node) or len(seen) > LONGEST:
                return None
            for before in self.varying(node):
                if before in ends:
                    found.add(before)
                elif before not in seen:
                    seen.add(before)
                    left.append(before)
        return found

    def compute(self, target: str, given: Mapping[str, Array]) -> Array | None:
        """Compute a value from other values instead of the image.

        Returns None if they do not determine it, or if ONNX Runtime fails on them.
        """
        source = self.source
        left, seen = [target], set(given)
        indices = set[int]()
        while left:
            name = left.pop()
            if name in seen or name not in self.moving:
                continue
            seen.add(name)
            index = source.makers.get(name)
            if index is None:
                return None
            indices.add(index)
            left += source.nodes[index].input
        nodes = [source.nodes[i] for i in sorted(indices)]
        read = {name for node in nodes for name in used(node)} - self.moving - source.initializers.keys()
        fixed = {name: self.constant(name) for name in read}
        if any(value is None for value in fixed.values()):
            return None
        stored = {name: numpy_helper.from_array(np.asarray(value), name) for name, value in fixed.items()}
        try:
            part = source.part(nodes, [target], given, stored)
            found = session(part.SerializeToString(), 1).run(None, dict(given))[0]
        except Exception:  # ONNX Runtime raises many kinds
            return None
        return np.asarray(found)


def facts_of(source: Source, probe: Array) -> Facts:
    """Run the file once on an input and keep every value. Raises whatever ONNX Runtime raises."""
    model = giving(source.model, (name for node in source.nodes for name in node.output if name))
    running = session(model.SerializeToString(), 1)
    wanted = [output.name for output in running.inner.get_outputs()]
    found = running.run(wanted, {source.image.name: probe})
    values = {name: value for name, value in zip(wanted, found, strict=True) if isinstance(value, np.ndarray)}
    return Facts(source, {**values, source.image.name: probe})


def is_near(found: Array, wanted: Array) -> bool:
    """Whether two computations of one map agree; one with a number that is none does not."""
    return found.shape == wanted.shape and bool(np.abs(found - wanted).max() <= MOST_OFF * np.abs(wanted).max())
