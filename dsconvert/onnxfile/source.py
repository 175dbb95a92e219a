"""A float ONNX file of any origin as a value: its one image input, and which values depend on it.

A stranger's file may hold anything. It is loaded in ONNX Runtime first, and everything here is iterative, so neither
circles nor depth do harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from dsconvert.base.errors import InputError, refusing
from dsconvert.base.filekinds import check_ordinary
from dsconvert.base.size import USUAL, Size, SizeLike
from dsconvert.onnxfile.engines import MAX_SIDE, TYPES, check_pixels, session
from dsconvert.onnxfile.external import MAX_BYTES, parsed
from dsconvert.onnxfile.trial import try_out

Array = NDArray[Any]
MAX_BATCH = 64


@dataclass(frozen=True)
class ImageInput:
    """The image input of a file.

    batch: images at once.
    channels: 1 or 3.
    channels_last: whether the input is (batch, height, width, channels).
    """

    name: str
    type: type[Any]
    batch: int
    channels: int
    height: int
    width: int
    channels_last: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def sides(self) -> tuple[int, int, int]:
        """The same in the order of the input's dimensions."""
        return (*self.shape[1:], self.channels) if self.channels_last else self.shape


@dataclass(frozen=True)
class Source:
    """A model that ONNX Runtime loads, and its image input."""

    model: onnx.ModelProto
    image: ImageInput

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes in the order in which they run."""
        return list(self.model.graph.node)

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return opset_of(self.model)

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Stored tensors by name."""
        return {t.name: t for t in self.model.graph.initializer}

    @cached_property
    def makers(self) -> dict[str, int]:
        """Value name -> index of the node that makes it."""
        return {out: i for i, node in enumerate(self.model.graph.node) for out in node.output if out}

    @cached_property
    def free_prefix(self) -> str:
        """A prefix that no name in the file begins with."""
        names = {*self.initializers, *self.makers, self.image.name}
        names |= {out for node in self.nodes for out in made_within(node)}
        prefix = "ds."
        while any(n.startswith(prefix) for n in names):
            prefix = f"ds{prefix}"
        return prefix

    @cached_property
    def constant(self) -> frozenset[int]:
        """Indices of nodes that do not depend on the image."""
        moving, found = {self.image.name}, set()
        for i, node in enumerate(self.model.graph.node):
            if moving.isdisjoint(used(node)):
                found.add(i)
            else:
                moving.update(node.output)
        return frozenset(found)

    def is_constant(self, value: str) -> bool:
        """Return whether a value is the same for every image."""
        return value in self.initializers or self.makers.get(value, -1) in self.constant

    def needed(self, targets: Iterable[str], known: Iterable[str] = ()) -> list[int]:
        """Return the indices of the nodes that make the targets from the known values, in order."""
        seen, found, left = set(known), set(), list(targets)
        while left:
            value = left.pop()
            if value in seen:
                continue
            seen.add(value)
            index = self.makers.get(value)
            if index is not None and index not in found:
                found.add(index)
                left.extend(used(self.model.graph.node[index]))
        return sorted(found)

    def part(
        self, nodes: Iterable[onnx.NodeProto], outputs: Iterable[str], given: Mapping[str, Array],
        extra: Mapping[str, onnx.TensorProto] | None = None,
    ) -> onnx.ModelProto:  # fmt: skip
        """Return a model of some of the nodes.

        given: its inputs, as arrays of the type that they will have.
        extra: stored tensors that replace or add to the file's.
        """
        chosen, stored = list(nodes), {**self.initializers, **(extra or {})}
        names = dict.fromkeys(name for node in chosen for name in used(node))
        graph = onnx.helper.make_graph(
            chosen,
            "part",
            [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), None)
             for n, a in given.items()],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [stored[name] for name in names if name in stored and name not in given],
        )  # fmt: skip
        return onnx.helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version,
            functions=self.model.functions,
        )  # fmt: skip


def used(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of values that a node reads, with those inside its own graphs (of If and Loop)."""
    for inner in _within(node):
        yield from (name for name in inner.input if name)
        for a in inner.attribute:
            for graph in (a.g, *a.graphs):
                yield from (out.name for out in graph.output)


def made_within(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of values that a node makes, with those inside its own graphs."""
    return (out for inner in _within(node) for out in inner.output if out)


def _within(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield the node and the nodes of its own graphs, at any depth."""
    left = [node]
    while left:
        inner = left.pop()
        yield inner
        for a in inner.attribute:
            for graph in (a.g, *a.graphs):
                left.extend(graph.node)


def attribute(node: onnx.NodeProto, name: str, usual: Any = None) -> Any:
    """Return an attribute's value, or `usual` if the node has no such attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), usual)


def giving(model: onnx.ModelProto, values: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of a model with these values as additional outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    there = {v.name for v in model.graph.output}
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in there)
    return made


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def read_source(path: Path, imgsz: SizeLike | None, threads: int) -> Source:
    """Read the file at `path`.

    imgsz: side of the images, where the file leaves it open; None: 640.
    threads: of ONNX Runtime.

    Raises InputError when ONNX Runtime cannot load it, or it takes anything but one image.
    """
    asked = Size.perhaps(imgsz)
    check_ordinary(path)
    if not path.is_file():
        raise InputError(f"There is no ONNX file at {path}.")
    given = parsed(path)
    large = InputError(f"{path} is larger than the 2 GB an ONNX model can have in memory.")
    if given.model.ByteSize() + given.outside > MAX_BYTES:  # all tensors may claim the same gigabyte of a file
        raise large
    try_out(path, "onnxruntime", threads, asked, given.size)
    with refusing(f"{path} is not an ONNX file that ONNX Runtime can run."):
        model = onnx.load(path, format="protobuf")
        whole = None if model.ByteSize() > MAX_BYTES else model.SerializeToString()
        running = None if whole is None else session(whole, threads, str(path), max(given.size, len(whole)))
    if running is None:
        raise large
    entries = running.inner.get_inputs()
    if len(entries) != 1:
        raise InputError(f"{path} has {len(entries)} inputs; only files with one, an image, can be converted.")
    image = _image(path, entries[0].name, entries[0].shape, entries[0].type, asked)
    seen = {*(v.name for v in model.graph.input), *(t.name for t in model.graph.initializer)}
    later = {out for node in model.graph.node for out in node.output}
    for node in model.graph.node:
        if any(name in later and name not in seen for name in node.input):
            raise InputError(f"The nodes of {path} are not in the order in which they run, as ONNX demands.")
        made = [out for out in node.output if out]
        if not seen.isdisjoint(made) or len({*made}) < len(made):
            raise InputError(f"{path} makes two values of one name, which ONNX does not allow.")
        seen.update(made)
    model.ir_version = max(model.ir_version, 4)  # from version 4 on, stored tensors need not be inputs
    stored = {t.name for t in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return Source(model, image)


def _image(path: Path, name: str, shape: list[Any], kind: str, imgsz: Size | None) -> ImageInput:
    refused = InputError(f"{path} does not take one image (n, 3, height, width) of float or bytes, but {shape}.")
    if len(shape) != 4 or kind not in TYPES:
        raise refused
    last = shape[1] not in (1, 3) and shape[3] in (1, 3)
    batch, channels, height, width = [shape[i] for i in ((0, 3, 1, 2) if last else (0, 1, 2, 3))]
    channels, batch = (n if isinstance(n, int) else usual for n, usual in ((channels, 3), (batch, 1)))
    size = (imgsz or USUAL).filling((height, width))
    if imgsz is not None and size != imgsz:
        raise InputError.naming("{} takes images of {} pixels; {imgsz} {} does not fit it.", path, size, imgsz)
    if channels not in (1, 3) or not 1 <= batch <= MAX_BATCH or not all(1 <= n <= MAX_SIDE for n in size.pair):
        raise refused
    check_pixels(path, [batch, channels, *size.pair], imgsz)
    return ImageInput(name, TYPES[kind], batch, channels, *size.pair, last)
