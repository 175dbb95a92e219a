"""From a float ONNX file and images to an integer one: the same measuring, widths, fit and fine-tune as a checkpoint's.

read -> lower (graph and tail) -> images -> ranges of the outputs -> measure -> choose formats -> fit -> tune -> write
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from dsconvert.base.errors import CheckError
from dsconvert.base.kept import MEMORY, Room
from dsconvert.base.size import Size
from dsconvert.dsconv.format import WeightFormat
from dsconvert.export.check import check_accumulators, first_wrong, of_graph
from dsconvert.export.halves import in_halves
from dsconvert.export.onnx import in_layout
from dsconvert.export.rewritten import write_rewritten
from dsconvert.export.weights.layouts import Layout
from dsconvert.export.written import Place, Written
from dsconvert.fit.layer import GPTQ
from dsconvert.fit.lockstep import fit_lockstep
from dsconvert.graph.integer import grid_of, integer_step
from dsconvert.graph.ir import INPUT, Shape
from dsconvert.graph.run import run_float
from dsconvert.measure.calibration import Calibration, Images, Progress, calibrate, with_views
from dsconvert.measure.evened import IMAGES, evened
from dsconvert.measure.importance import Part
from dsconvert.measure.views import wanted
from dsconvert.model.model import Converted
from dsconvert.onnxfile.compact import compact
from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.facts import Facts, facts_of, is_near
from dsconvert.onnxfile.images import batches
from dsconvert.onnxfile.layers import find_layers
from dsconvert.onnxfile.lower import Lowered, NotLowered, lower
from dsconvert.onnxfile.meaning import Maps, in_steps, score_kinds
from dsconvert.onnxfile.nearness import Look, how_far_off
from dsconvert.onnxfile.source import Array, Source, giving
from dsconvert.photos.form import InputForm
from dsconvert.photos.images import Image
from dsconvert.tune.distil import Distilled, Pictures, distil
from dsconvert.widths.size import Formats, formats_as_asked, judged_formats, of_every_layer, unfitted

MOST_TOGETHER = 8 * 640 * 640  # pixels of a batch: all its values are in memory at once
COMPARED = 4  # images on which the written file is held against the float one
RANGED = 64  # images on which the outputs' ranges are looked at
# A network of fewer weights loses more with each bit. If the bytes of 4 bits leave room, its file takes this share of
# the float file's bytes.
SMALL, SMALL_SHARE = 1_500_000, 0.198
FINE_BITS = (6, 8)  # of a small network's last layers


@dataclass(frozen=True)
class Wish:
    """What decides the result besides the file, the images and the machine."""

    bits: int | None  # of every layer; None: by layer
    block_size: int | None  # input channels that a shift covers; None: by layer
    target_bytes: int | None  # largest file
    layout: Layout
    seed: int
    finetune_steps: int | None  # None: as many as seem of use
    finetune_time: float | None  # seconds; None: any

    @property
    def finetunes(self) -> bool:
        """Whether there is to be a brief fine-tune."""
        return self.finetune_steps != 0 and self.finetune_time != 0


@dataclass(frozen=True)
class Prepared:
    """A file taken apart, with the images that it is measured on."""

    source: Source
    low: Lowered  # with its outputs in steps
    maps: Maps  # what these mean
    images: Images  # as the graph reads them
    feeds: tuple[Array, ...]  # some of them as the file takes them


@dataclass(frozen=True)
class OnnxInt8:
    """A converted file, and what its owner should know of it."""

    model: onnx.ModelProto  # what is written
    converted: Converted  # the network in it
    low: Lowered  # which part that is
    images: int  # photographs that it was fitted on
    tuned: Distilled[Converted] | None  # what the brief fine-tune did
    skipped: tuple[str, ...] = ()  # why files could not be read
    warnings: tuple[str, ...] = ()  # sentences about the images and their scale

    @property
    def weight_bits(self) -> float:
        """Mean stored bits of a converted weight, shifts included."""
        return self.converted.weight_bits

    @property
    def table(self) -> list[tuple[str, Shape, int]]:
        """Name, weight shape and bits of every layer, in order."""
        convs = self.converted.convs
        return [
            (n.name, tuple(convs[n.name].weight.vqk.shape), convs[n.name].weight.bits)
            for n in self.converted.graph.convs()
        ]


def taken_apart(source: Source, probe: Array) -> tuple[Facts, Lowered]:
    """The file's graph and its tail. Raises NotLowered where the graph has no operation for what leads to a layer, or
    computes something else than the file on the probe, whose images differ."""
    image = source.image
    if image.batch > 1 and image.batch * image.height * image.width > MOST_TOGETHER:
        raise NotLowered(f"all values of its {image.batch} images at once take too much memory")
    facts = facts_of(source, probe)
    low = lower(facts, find_layers(source))
    found = run_float(low.graph, low.params, torch.from_numpy(facts.values[low.entrance.value]))
    for name, made in zip(low.exits, found, strict=True):
        wanted_there = facts.values[name]
        if wanted_there.dtype != np.float32:
            raise NotLowered("it has values of another type than float32")
        alike = made.numel() == wanted_there.size
        if not alike or not is_near(made.numpy().reshape(wanted_there.shape), wanted_there):
            raise NotLowered("it computes something else than it seems to")
    return facts, low


def quantize_lowered(
    facts: Facts, low: Lowered, photographs: list[Image], judges: list[Image], form: InputForm, wish: Wish,
    report: Progress, folder: Path | None = None,
) -> OnnxInt8:  # fmt: skip
    """Convert a file that was taken apart, on photographs that are placed as the form says; the fine-tune is judged on
    others. What memory has no room for waits in the folder. Raises CheckError where the file computes something else
    than it should."""
    torch.manual_seed(wish.seed)
    room = Room(folder, MEMORY)
    network = _prepared(facts, low, photographs, form, wish, room)
    found = _measured(network, wish, report, room)
    formats = _formats(network, found, wish)
    fitted = _fitted(network, found, formats, report, room)
    held = [_pixels(image, network.source, low, form) for image in judges]
    tuned = _tuned(fitted, network, held, wish, report)
    model, layout = _stored(tuned.model if tuned is not None else fitted, low, wish.layout)
    check_accumulators(model)
    made = _compacted(_written(network, model, layout), layout)
    _check(made, network, in_layout(model, layout))
    strayed = how_far_off(facts, low, network.maps, _looks(made, network))
    return OnnxInt8(made.model, model, low, len(photographs), tuned, warnings=(strayed,) if strayed else ())


def _prepared(
    facts: Facts, low: Lowered, photographs: list[Image], form: InputForm, wish: Wish, room: Room
) -> Prepared:  # fmt: skip
    source, shape = facts.source, low.entrance.shape
    pixels = room.kept(len(photographs), shape, torch.uint8)
    for index, image in enumerate(photographs):
        pixels.put(index, _pixels(image, source, low, form))
    total = wanted(len(photographs))
    kept = with_views(pixels, len(photographs), range(total), wish.seed, room)
    images = Images(kept, Part(0, total, total), Size(*shape[1:]), len(photographs), (), 0, low.entrance.entry(form))
    feeds = tuple(batches(photographs[: max(COMPARED, source.image.batch)], source.image, form))

    def seen(most: int) -> Iterator[Tensor]:
        return (images.one(index, "cpu") for index in range(0, total, max(1, total // most)))

    stepped, maps = in_steps(low, score_kinds(facts, low), seen(RANGED))
    graph, params = evened(stepped.graph, stepped.params, maps.measure, list(seen(IMAGES)), wish.seed)
    return Prepared(source, replace(stepped, graph=graph, params=params), maps, images, feeds)


def _pixels(image: Image, source: Source, low: Lowered, form: InputForm) -> Tensor:
    """A placed photograph as bytes (c, h, w) of what the graph reads."""
    return torch.from_numpy(low.entrance.ordered(form.ordered(image, source.image.channels)))


def _chosen(low: Lowered) -> list[str]:
    """Layers that become DSConv: all but those that read the image, that make the outputs, and depthwise ones."""
    graph = low.graph
    first = {INPUT, *(n.name for n in graph.nodes if n.inputs == (INPUT,) and n.op != "conv")}
    return [
        node.name for node in graph.convs()
        if node.inputs[0] not in first and node.name not in graph.outputs
        and low.params[node.name].weight.shape[1] > 1
    ]  # fmt: skip


def _judged(low: Lowered, wish: Wish) -> dict[str, list[WeightFormat]]:
    """The formats that layers may have, by name; other layers are int8.

    In a small network the layers that make the outputs take a sixth of the file. Their damage is only right for small
    errors: it is reckoned at the float network's scores, and a score near 0 hardly changes with its logit."""
    if wish.bits is not None:
        return {}
    judged = judged_formats(low.params, _chosen(low), wish.block_size)
    if _is_small(low):
        outputs = [n.name for n in low.graph.convs() if n.name in low.graph.outputs]
        last = [name for name in outputs if low.params[name].weight.shape[1] > 1]
        judged |= judged_formats(low.params, last, wish.block_size, FINE_BITS)
    return judged


def _measured(network: Prepared, wish: Wish, report: Progress, room: Room) -> Calibration:
    low = network.low
    return calibrate(
        low.graph, low.params, network.maps, network.images, _judged(low, wish), wish.seed, "cpu", True, report, room
    )  # fmt: skip


def _formats(network: Prepared, found: Calibration, wish: Wish) -> dict[str, WeightFormat]:
    params, file_size = network.low.params, partial(_size, network, found, _lean(network.low, wish.layout))

    def within(target: int | None) -> dict[str, WeightFormat]:
        return formats_as_asked(
            params, found.damage, _chosen(network.low), wish.bits, wish.block_size, target, file_size
        )  # fmt: skip

    formats = within(wish.target_bytes)
    if wish.bits is None and wish.target_bytes is None and _is_small(network.low):
        room = int(SMALL_SHARE * network.source.model.ByteSize())
        if file_size(formats) <= room:
            return within(room)
    return formats


def _is_small(low: Lowered) -> bool:
    return sum(p.weight.numel() for p in low.params.values()) < SMALL


def _size(network: Prepared, found: Calibration, layout: Layout, formats: Formats) -> int:
    """Most bytes of the file with these formats, before it is fitted."""
    model = Converted(network.low.graph, unfitted(network.low.params, formats), found.own)
    return _compacted(_written(network, model, layout), layout).model.ByteSize()


def _fitted(network: Prepared, found: Calibration, formats: Formats, report: Progress, room: Room) -> Converted:
    low, images = network.low, network.images
    report("widths", 1, 1)
    # An output's error stays its own. Where its gradient is all but 0, as of a class that no image has, it would else
    # get the errors of others, until they are no longer small.
    channels = {name: moment for name, moment in found.channels.items() if name not in low.graph.outputs}
    convs = fit_lockstep(
        low.graph, low.params, GPTQ(channels, images.all_photographs()), of_every_layer(low.params, formats),
        found.own, images.pixels, found.drawn, images.part.mine, room, "cpu",
        lambda done, total: report("fit", done, total), entry=images.entry,
    )  # fmt: skip
    return Converted(low.graph, convs, found.own)


def _tuned(
    model: Converted, network: Prepared, held: list[Tensor], wish: Wish, report: Progress
) -> Distilled[Converted] | None:
    if len(held) < 2 or not wish.finetunes:
        return None
    images = network.images
    pictures = Pictures(images.part.all, range(images.part.mine), partial(images.one, device="cpu"), held, images.entry)
    return distil(
        model, network.low.params, network.maps, pictures, wish.finetune_steps, wish.finetune_time, wish.seed,
        "cpu", partial(report, "finetune"),
    )  # fmt: skip


def _stored(model: Converted, low: Lowered, layout: Layout) -> tuple[Converted, Layout]:
    """The model with the numbers that its file holds, and the file's layout. A small network is rounded whatever the
    layout, as all layouts give the same result. Channels that differ too much for half floats keep whole ones."""
    rounded = in_halves(model) if _is_small(low) else None
    return (model, layout) if rounded is None else (rounded, _lean(low, layout))


def _lean(low: Lowered, layout: Layout) -> Layout:
    """The layout as a network of this size is written in it."""
    return replace(layout, lean=layout.joint and _is_small(low))


def _written(network: Prepared, model: Converted, layout: Layout) -> Written:
    return write_rewritten(network.source, network.low, network.maps, model, layout)


def _compacted(written: Written, layout: Layout) -> Written:
    """With short names, where no node has a graph of its own, whose names reach out."""
    before = written.model
    if any(a.g.node or a.graphs for node in before.graph.node for a in node.attribute):
        return written
    made = compact(before, layout.lean)
    nodes = zip(before.graph.node, made.graph.node, strict=True)
    names = {old: new for a, b in nodes for old, new in zip(a.output, b.output, strict=True)}
    places = {value: replace(place, name=names.get(place.name, place.name)) for value, place in written.places.items()}
    return Written(made, places, {layer: names.get(name, name) for layer, name in written.weights.items()})


def _looks(written: Written, network: Prepared) -> list[Look]:
    """What the file makes of some photographs, as the graph's values at its exits and as its outputs."""
    ends = [written.places[name] for name in network.low.graph.outputs]
    outputs = [value.name for value in written.model.graph.output]
    names = list(dict.fromkeys([*outputs, *(place.name for place in ends)]))
    running = session(giving(written.model, names).SerializeToString(), torch.get_num_threads())
    looks = []
    for feed in network.feeds:
        found = dict(zip(names, running.run(names, {network.source.image.name: feed}), strict=True))
        maps = [_real(of_graph(found[place.name], place), place) for place in ends]
        looks.append(Look(feed, maps, [found[name] for name in outputs]))
    return looks


def _real(q: Tensor, place: Place) -> Tensor:
    return q if place.grid is None else place.grid.dequantize(q)


def _check(written: Written, network: Prepared, model: Converted) -> None:
    """Every layer of the file, in ONNX Runtime, gives the integers of `model`, which is in the file's layout, for what
    it is given."""
    graph, grids = model.graph, grid_of(model.graph, model.activations)
    image, feed = network.source.image.name, network.feeds[0]
    names = [name for name in dict.fromkeys(place.name for place in written.places.values()) if name != image]
    try:
        running = session(giving(written.model, names).SerializeToString(), torch.get_num_threads())
        found = {image: feed, **dict(zip(names, running.run(names, {image: feed}), strict=True))}
    except Exception:  # ONNX Runtime raises many kinds
        raise CheckError("ONNX Runtime fails on the file that was made, so it was not written.") from None
    got = {value: of_graph(found[place.name], place) for value, place in written.places.items()}
    inside = {node.name for node in graph.nodes} - written.places.keys()  # what one step makes with its reader
    if wrong := first_wrong(got, graph, partial(integer_step, convs=model.convs, grids=grids), True, inside):
        raise CheckError(f"The file computes something else than it should at {wrong}; please report it.")
