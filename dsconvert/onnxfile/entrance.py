"""Where our graph begins in an ONNX file: behind the nodes that only move and scale its image.

A file may take bytes or half precision, may have its channels last, or may normalise its image itself. The nodes that
do so stay in front, as they are. What they do is told by numbers: a channel of the map behind them is a channel of the
image times a factor, plus an offset.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dsconvert.onnxfile.facts import Facts, is_near
from dsconvert.onnxfile.images import laid_out
from dsconvert.onnxfile.source import Array, ImageInput
from dsconvert.photos.entry import UNIT, Entry
from dsconvert.photos.form import InputForm
from dsconvert.photos.images import Image

MOST_MAPS = 16  # maps before the first layer that are looked at
EVEN = 1e-6  # a factor so near to 1 is 1, as float32 rounds it; an offset so near to 0 is 0


@dataclass(frozen=True)
class Line:
    """A channel of a map as the image has it: factor * number + offset. A byte's number is a share of 255."""

    channel: int  # of the image
    factor: float  # above 0
    offset: float

    @property
    def is_plain(self) -> bool:
        """Whether the numbers are the image's own."""
        return (self.factor, self.offset) == (1, 0)


@dataclass(frozen=True)
class Entrance:
    """The map (n, c, h, w) of float32 that the graph reads as its image."""

    value: str  # its name in the file
    shape: tuple[int, int, int]  # its channels, height and width
    nodes: tuple[int, ...]  # places of the nodes that make it of the file's input
    lines: tuple[Line, ...]  # of its channels
    is_bytes: bool  # whether the file takes bytes

    @property
    def order(self) -> list[int]:
        """Of each of its channels the file's channel that it is."""
        return [line.channel for line in self.lines]

    @property
    def keeps_bytes(self) -> bool:
        """Whether the file's bytes are the integers of the map on its grid, whose step is one byte."""
        return (
            self.is_bytes and len({line.factor for line in self.lines}) == 1 and not any(n.offset for n in self.lines)
        )

    def ordered(self, image: Image) -> Image:
        """Turn bytes (channels, h, w) in the order of the file's channels into those of the map, (c, h, w)."""
        return np.ascontiguousarray(image[self.order])

    def entry(self, form: InputForm) -> Entry:
        """How bytes become the map's numbers, if those of the file's input are as the form says."""
        if self.keeps_bytes:
            return Entry(UNIT.divisor / self.lines[0].factor)
        base = UNIT if self.is_bytes else form.entry
        if all(line.is_plain for line in self.lines) and self.order == [*range(len(self.lines))]:
            return base
        means, stds = list[float](), list[float]()
        for line in self.lines:
            mean, std = (n[line.channel] if len(n) > 1 else n[0] for n in (base.mean, base.std))
            means.append(mean - line.offset * std / line.factor)
            stds.append(std / line.factor)
        return Entry(base.divisor, _shared(means), _shared(stds))


def _shared(numbers: list[float]) -> tuple[float, ...]:
    """One number, where all are the same."""
    return (numbers[0],) if len(set(numbers)) == 1 else tuple(numbers)


def find_entrance(facts: Facts, core: set[int], layers: Set[int]) -> Entrance | None:
    """Return the last map before all layers that only moves and scales the image; None where there is none.

    core: places of the nodes that lead to layers, and of the layers.
    layers: places of the layers.
    """
    image = facts.source.image
    found: Entrance | None = None
    if image.type is np.float32 and not image.channels_last:
        lines = tuple(Line(channel, 1.0, 0.0) for channel in range(image.channels))
        found = Entrance(image.name, image.shape, (), lines, False)
    for name, nodes in _gates(facts, core, layers):
        lines = _lines(facts, name)
        if lines and (found is None or not {*lines} <= {*found.lines}):  # choosing channels is left to the graph
            shape = (len(lines), image.height, image.width)
            found = Entrance(name, shape, nodes, lines, image.type is np.uint8)
    return found


def _gates(facts: Facts, core: set[int], layers: Set[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the maps of the image's size by way of which alone layers see the image, with the nodes that make them."""
    source, image = facts.source, facts.source.image
    made = (name for index in sorted(core - layers) for name in source.nodes[index].output)
    for name in islice((name for name in made if name in facts.moving and _is_map(facts, name)), MOST_MAPS):
        nodes = source.needed([name])
        if layers.isdisjoint(nodes):
            before = {image.name, *(out for i in nodes for out in source.nodes[i].output)} - {name}
            if all(before.isdisjoint(facts.varying(source.nodes[i])) for i in core.difference(nodes)):
                yield name, tuple(nodes)


def _is_map(facts: Facts, name: str) -> bool:
    found, image = facts.values.get(name), facts.source.image
    return (
        found is not None and found.dtype == np.float32 and found.ndim == 4 and found.shape[0] == image.batch
        and found.shape[2:] == (image.height, image.width)
    )  # fmt: skip


def _lines(facts: Facts, name: str) -> tuple[Line, ...]:
    """What the channels of a map are of random images, if they are the same of the file's own; else nothing."""
    image = facts.source.image
    numbers = _random(image)
    made = facts.compute(name, {image.name: laid_out(_as_type(numbers, image), image)})
    if made is None or made.shape != facts.shape(name):
        return ()
    seen, wanted = _numbers(facts.values[image.name], image), facts.values[name]
    lines = list[Line]()
    for channel in range(made.shape[1]):
        there = (_line(numbers[:, i], made[:, channel], i) for i in range(image.channels))
        line = next((one for one in there if one is not None), None)
        if line is None or not is_near(_on(line, seen[:, line.channel]), wanted[:, channel]):
            return ()
        lines.append(line)
    return tuple(lines)


def _line(x: Array, y: Array, channel: int) -> Line | None:
    """The line that y is of x, both (n, h, w); None where it is none, or falls."""
    low, high = (np.unravel_index(place, x.shape) for place in (x.argmin(), x.argmax()))
    if not x[high] > x[low]:
        return None
    factor = (float(y[high]) - float(y[low])) / (float(x[high]) - float(x[low]))
    factor = 1.0 if abs(factor - 1) < EVEN else factor
    offset = float(y[low]) - factor * float(x[low])
    line = Line(channel, factor, 0.0 if abs(offset) < EVEN * abs(factor) else offset)
    return line if factor > 0 and is_near(_on(line, x), y) else None


def _on(line: Line, x: Array) -> Array:
    return np.asarray(line.factor * x + line.offset, np.float32)


def _random(image: ImageInput) -> Array:
    """Random images (n, c, h, w) as float32 in 0..1, which are bytes: with 0 and 255 in every channel."""
    made = np.random.default_rng(0).integers(0, 256, (image.batch, *image.shape), dtype=np.uint8)
    made[:, :, 0, 0], made[:, :, -1, -1] = 0, 255
    return made.astype(np.float32) / 255


def _as_type(numbers: Array, image: ImageInput) -> Array:
    """Numbers in 0..1 in the type of the file's input."""
    return np.rint(numbers * 255).astype(np.uint8) if image.type is np.uint8 else numbers.astype(image.type)


def _numbers(given: Array, image: ImageInput) -> Array:
    """What the file takes as numbers (n, c, h, w) of float32: bytes as shares of 255."""
    first = given.transpose(0, 3, 1, 2) if image.channels_last else given
    return first.astype(np.float32) / 255 if image.type is np.uint8 else first.astype(np.float32)
