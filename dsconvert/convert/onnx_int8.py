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
from dsconvert.onnxfile.layers import find_layers
from dsconvert.onnxfile.lower import Lowered, NotLowered, lower
from dsconvert.onnxfile.meaning import Maps, in_steps, score_kinds
from dsconvert.onnxfile.nearness import Look, how_far_off
from dsconvert.onnxfile.source import Array, Source, giving
from dsconvert.photos.form import InputForm
from dsconvert.photos.images import Image
from dsconvert.tune.distil import Distilled, Pictures, distil
from dsconvert.widths.size import Formats, formats_as_asked, judged_formats, of_every_layer, unfitted

COMPARED = 4  # images on which the written file is held against the float one
RANGED = 64  # images on which the outputs' ranges are looked at
# A network of fewer weights loses more with each bit. If the bytes of 4 bits leave room, its file takes this share of
# the float file's bytes.
SMALL, SMALL_SHARE = 1_500_000, 0.195


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
    images: Images


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
    computes something else than the file on the probe."""
    image = source.image
    if image.type is not np.float32 or image.channels_last or image.batch != 1:
        raise NotLowered("its input is not one float image with channels first")
    facts = facts_of(source, probe)
    low = lower(facts, find_layers(source))
    found = run_float(low.graph, low.params, torch.from_numpy(probe))
    for name, made in zip(low.exits, found, strict=True):
        wanted_there = facts.values[name]
        if wanted_there.dtype != np.float32:
            raise NotLowered("it has values of another type than float32")
        if not is_near(made.numpy().reshape(wanted_there.shape), wanted_there):
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
    held = [torch.from_numpy(form.ordered(image, facts.source.image.channels)) for image in judges]
    tuned = _tuned(fitted, network, held, wish, report)
    model = tuned.model if tuned is not None else fitted
    check_accumulators(model)
    made = _compacted(_written(network, model, wish.layout))
    _check(made, network, in_layout(model, wish.layout))
    strayed = how_far_off(facts, low, network.maps, _looks(made, network, min(COMPARED, len(photographs))))
    return OnnxInt8(made.model, model, low, len(photographs), tuned, warnings=(strayed,) if strayed else ())


def _prepared(
    facts: Facts, low: Lowered, photographs: list[Image], form: InputForm, wish: Wish, room: Room
) -> Prepared:  # fmt: skip
    shape = facts.source.image.shape
    pixels = room.kept(len(photographs), shape, torch.uint8)
    for index, image in enumerate(photographs):
        pixels.put(index, torch.from_numpy(form.ordered(image, shape[0])))
    total = wanted(len(photographs))
    kept = with_views(pixels, len(photographs), range(total), wish.seed, room)
    images = Images(kept, Part(0, total, total), Size(*shape[1:]), len(photographs), (), 0, form.entry)

    def seen(most: int) -> Iterator[Tensor]:
        return (images.one(index, "cpu") for index in range(0, total, max(1, total // most)))

    stepped, maps = in_steps(low, score_kinds(facts, low), seen(RANGED))
    graph, params = evened(stepped.graph, stepped.params, maps.measure, list(seen(IMAGES)), wish.seed)
    return Prepared(facts.source, replace(stepped, graph=graph, params=params), maps, images)


def _chosen(low: Lowered) -> list[str]:
    """Layers that become DSConv: all but those that read the image, that make the outputs, and depthwise ones."""
    graph = low.graph
    first = {INPUT, *(n.name for n in graph.nodes if n.inputs == (INPUT,) and n.op != "conv")}
    return [
        node.name for node in graph.convs()
        if node.inputs[0] not in first and node.name not in graph.outputs
        and low.params[node.name].weight.shape[1] > 1
    ]  # fmt: skip


def _measured(network: Prepared, wish: Wish, report: Progress, room: Room) -> Calibration:
    low, wanted = network.low, _chosen(network.low) if wish.bits is None else []
    judged = judged_formats(low.params, wanted, wish.block_size)
    return calibrate(
        low.graph, low.params, network.maps, network.images, judged, wish.seed, "cpu", True, report, room
    )  # fmt: skip


def _formats(network: Prepared, found: Calibration, wish: Wish) -> dict[str, WeightFormat]:
    params, file_size = network.low.params, partial(_size, network, found, wish.layout)

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
    return _compacted(_written(network, model, layout)).model.ByteSize()


def _fitted(network: Prepared, found: Calibration, formats: Formats, report: Progress, room: Room) -> Converted:
    low, images = network.low, network.images
    report("widths", 1, 1)
    convs = fit_lockstep(
        low.graph, low.params, GPTQ(found.channels, images.all_photographs()), of_every_layer(low.params, formats),
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


def _written(network: Prepared, model: Converted, layout: Layout) -> Written:
    return write_rewritten(network.source, network.low, network.maps, model, layout)


def _compacted(written: Written) -> Written:
    """With short names, where no node has a graph of its own, whose names reach out."""
    before = written.model
    if any(a.g.node or a.graphs for node in before.graph.node for a in node.attribute):
        return written
    made = compact(before)
    nodes = zip(before.graph.node, made.graph.node, strict=True)
    names = {old: new for a, b in nodes for old, new in zip(a.output, b.output, strict=True)}
    places = {value: replace(place, name=names.get(place.name, place.name)) for value, place in written.places.items()}
    return Written(made, places, {layer: names.get(name, name) for layer, name in written.weights.items()})


def _looks(written: Written, network: Prepared, count: int) -> list[Look]:
    """What the file makes of the first photographs, as the graph's values at its exits and as its outputs."""
    ends = [written.places[name] for name in network.low.graph.outputs]
    outputs = [value.name for value in written.model.graph.output]
    names = list(dict.fromkeys([*outputs, *(place.name for place in ends)]))
    running = session(giving(written.model, names).SerializeToString(), torch.get_num_threads())
    looks = []
    for index in range(count):
        image = network.images.one(index, "cpu").numpy()
        found = dict(zip(names, running.run(names, {network.source.image.name: image}), strict=True))
        maps = [_real(of_graph(found[place.name], place), place) for place in ends]
        looks.append(Look(image, maps, [found[name] for name in outputs]))
    return looks


def _real(q: Tensor, place: Place) -> Tensor:
    return q if place.grid is None else place.grid.dequantize(q)


def _check(written: Written, network: Prepared, model: Converted) -> None:
    """Every layer of the file, in ONNX Runtime, gives the integers of `model`, which is in the file's layout, for what
    it is given."""
    graph, grids = model.graph, grid_of(model.graph, model.activations)
    names = list(dict.fromkeys(place.name for place in written.places.values()))
    x = network.images.one(0, "cpu")
    try:
        running = session(giving(written.model, names).SerializeToString(), torch.get_num_threads())
        found = dict(zip(names, running.run(names, {network.source.image.name: x.numpy()}), strict=True))
    except Exception:  # ONNX Runtime raises many kinds
        raise CheckError("ONNX Runtime fails on the file that was made, so it was not written.") from None
    got = {value: of_graph(found[place.name], place) for value, place in written.places.items()}
    inside = {node.name for node in graph.nodes} - written.places.keys()  # what one step makes with its reader
    if wrong := first_wrong(got, graph, partial(integer_step, convs=model.convs, grids=grids), True, inside):
        raise CheckError(f"The file computes something else than it should at {wrong}; please report it.")
