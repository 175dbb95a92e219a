"""Run the float file and the partly converted file side by side over the calibration images, layer by layer.

ONNX Runtime runs the part of the graph between two layers for every image. Values that later nodes read are kept on
disk until their last use, so memory holds only one image's values at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import torch

from dsconvert.base.errors import InputError, refusing
from dsconvert.base.files import needs_room
from dsconvert.convert.onnx_rewrite import float_tensors, replaced
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.layer import Batches, Fit
from dsconvert.fit.seen import Seen, seen_evenly
from dsconvert.graph.integer import QConv
from dsconvert.graph.ops import conv
from dsconvert.onnxfile.engines import Session, session
from dsconvert.onnxfile.layers import Layer
from dsconvert.onnxfile.source import Array, Source, used


@dataclass
class _Side:
    """One of the two models, float or quantized.

    folder: keeps values on disk.
    nodes: nodes by their index in the file; those of fitted layers are replaced.
    tensors: tensors that replace the file's own.
    stored: value name -> number in file names.
    sizes: value name -> most bytes for one image.
    """

    folder: Path
    nodes: dict[int, list[onnx.NodeProto]]
    tensors: dict[str, onnx.TensorProto] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def file(self, value: str, image: int) -> Path:
        return self.folder / f"{self.stored[value]}-{image}.npy"

    def read(self, value: str, image: int) -> Array:
        """Return a kept value, mapped from disk so that only the parts in use are loaded."""
        path = self.file(value, image)
        try:
            return np.asarray(np.load(path, mmap_mode="r"))
        except (ValueError, OSError):  # an empty array, or a disk whose files cannot be memory-mapped
            return np.asarray(np.load(path))

    def save(self, value: str, image: int, array: Array) -> None:
        if value not in self.stored:
            self.stored[value] = next(self.numbers)
        self.sizes[value] = max(array.nbytes, self.sizes.get(value, 0))
        np.save(self.file(value, image), array, allow_pickle=False)

    def forget(self, value: str, count: int) -> None:
        for image in range(count):
            self.file(value, image).unlink()
        del self.stored[value], self.sizes[value]


def fit_lockstep(
    source: Source,
    layers: Sequence[Layer],
    batches: Iterator[Array],
    fit: Fit,
    formats: Mapping[int, WeightFormat],
    folder: Path,
    threads: int,
    seed: int,
    progress: Callable[[int, int], None],
    count: int,
) -> dict[int, QConv]:
    """Fit the layers, and return the quantized convolutions by the index of their node.

    source: the float file.
    layers: in the order in which they run. CDSb of the result includes the layer's own bias. A weight that several
        nodes read is fitted where it is read first.
    batches: `count` batches of images, read once.
    fit: chooses the integers of each layer.
    formats: by the layer's index.
    folder: keeps the batches and values until their last use.
    threads: of ONNX Runtime.
    seed: decides the positions.
    progress: called with the number of layers done and of all.

    Raises InputError when ONNX Runtime fails on the images, a value is not finite, or the folder's disk is full.
    """
    sides = [_Side(folder / name, {i: [n] for i, n in enumerate(source.nodes)}) for name in ("float", "quantized")]
    try:
        return _fit(source, layers, batches, fit, formats, sides, threads, seed, progress, count)
    except OSError as error:  # numpy's error does not say that the disk is full
        raise needs_room(folder, count * sum(sum(side.sizes.values()) for side in sides), error) from None


def _fit(
    source: Source,
    layers: Sequence[Layer],
    batches: Iterator[Array],
    fit: Fit,
    formats: Mapping[int, WeightFormat],
    sides: Sequence[_Side],
    threads: int,
    seed: int,
    progress: Callable[[int, int], None],
    count: int,
) -> dict[int, QConv]:
    for side in sides:
        side.folder.mkdir()
    for image, batch in enumerate(batches):
        for side in sides:
            side.save(source.image.name, image, batch)
    left = set(source.needed([layer.value for layer in layers])) - source.constant
    fitted: dict[int, QConv] = {}
    for done, layer in enumerate(layers):
        for side in sides:
            _advance(source, side, layers[done:], left, count, threads)
        left -= set(source.needed([layer.value], ()))
        earlier = next((e for e in layers[:done] if e.stored == layer.stored and _alike(e, layer)), None)
        seen = _watcher(layer, sides[0], sides[1], count, seed)
        if earlier is None:
            made = fit.layer(layer.node, layer.weight, formats[layer.index], seen)
        else:
            made = _bias_only(layer, fitted[earlier.index].weight, seen())
        fitted[layer.index] = replace(made, bias=made.bias + layer.bias)
        name = f"{source.free_prefix}fitted{layer.index}"
        sides[1].nodes.update(replaced(source, layer, name, f"{name}.bias"))
        sides[1].tensors.update({t.name: t for t in float_tensors(layer, fitted[layer.index], name)})
        _forget(source, sides, layers[done + 1 :], left, count)
        progress(done + 1, len(layers))
    return fitted


def _alike(a: Layer, b: Layer) -> bool:
    return a.weight.shape == b.weight.shape and torch.equal(a.weight, b.weight)


def _advance(
    source: Source, side: _Side, layers: Sequence[Layer], left: set[int], count: int, threads: int
) -> None:  # fmt: skip
    """Run the nodes between the kept values and the first of the layers, for every image.

    left: indices of nodes that have not run yet.
    """
    layer = layers[0]
    if layer.value in side.stored:
        return
    indices = source.needed([layer.value], side.stored)
    now = [i for i in indices if i not in source.constant]
    later = {name for i in left.difference(now) for name in used(source.nodes[i])} | {e.value for e in layers}
    outputs = [out for i in now for out in source.nodes[i].output if out in later]
    nodes = [node for i in indices for node in side.nodes[i]]
    reads = [v for v in side.stored if any(v in used(n) for n in nodes)]
    running: Session | None = None
    for image in range(count):
        given = {v: side.read(v, image) for v in reads}
        with refusing(f"ONNX Runtime fails on the calibration images before layer {layer.name}."):
            running = running or session(source.part(nodes, outputs, given, side.tensors).SerializeToString(), threads)
            values = running.run(outputs, given)
        for name, value in zip(outputs, values, strict=True):
            if not isinstance(value, np.ndarray) or not (value.dtype.kind != "f" or np.isfinite(value).all()):
                raise InputError(f"A value before layer {layer.name} is not finite, or no tensor: it cannot be fitted.")
            side.save(name, image, value)


def _forget(source: Source, sides: Sequence[_Side], layers: Sequence[Layer], left: set[int], count: int) -> None:
    """Delete the values that no later node reads."""
    wanted = {name for i in left for name in used(source.nodes[i])} | {layer.value for layer in layers}
    for side in sides:
        for value in [v for v in side.stored if v not in wanted]:
            side.forget(value, count)


def _watcher(layer: Layer, floats: _Side, quants: _Side, count: int, seed: int) -> Batches:
    """Return a function that yields what the layer sees, with float outputs before the bias."""

    def seen() -> Iterator[Seen]:
        first = 0
        for image in range(count):
            x, q = (layer.images(side.read(layer.value, image)) for side in (floats, quants))
            y = conv(layer.node, x, layer.weight, None)
            yield from seen_evenly(q, y, seed, first)
            first += len(x)

    return seen


def _bias_only(layer: Layer, weight: DSTensor, batches: Iterable[Seen]) -> QConv:
    """Return a weight fitted elsewhere, with the bias that corrects its mean error in this layer."""
    total, count = torch.zeros(len(weight.vqk), dtype=torch.float64), 0
    for seen in batches:
        met = conv(layer.node, seen.input[None], weight.weight(), None)[0].flatten(1)[:, seen.picks]
        total += (seen.float_output - met).sum(1, dtype=torch.float64)
        count += len(seen.picks)
    return QConv(weight, (total / count).float())
