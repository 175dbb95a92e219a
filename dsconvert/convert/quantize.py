"""The steps of `quantize` for a checkpoint, put together for the command line and the Python API:

gather (images), prepare (network) -> measure (statistics) -> choose_formats -> fit (model) -> tune -> describe
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.kept import MEMORY, Room
from dsconvert.base.sealed import run_key
from dsconvert.base.size import Size
from dsconvert.convert.division import Division, divided
from dsconvert.convert.options import QuantizeOptions, check_options
from dsconvert.convert.record import Quantized, provenance
from dsconvert.convert.resume import read_unfinished, usable, write_unfinished
from dsconvert.dsconv.codes import REAL
from dsconvert.dsconv.format import WeightFormat
from dsconvert.fit.layer import GPTQ, Fit, Maker
from dsconvert.fit.lockstep import fit_lockstep
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.measure.cache import remembered
from dsconvert.measure.calibration import (
    Calibration,
    Images,
    Progress,
    beside_few,
    calibrate,
    check_calibration,
    check_values,
    decoded,
    float_outputs,
    photographs_of,
    synthetic,
)
from dsconvert.measure.outputs import Detections, Outputs
from dsconvert.model.model import DSModel
from dsconvert.photos.dataset import calibration_images
from dsconvert.photos.labels import Labelled
from dsconvert.photos.sameness import warning_of
from dsconvert.scoring.drop import labels_of, map_drop, scores_on
from dsconvert.tune.distil import Distilled, Pictures, distil
from dsconvert.widths.loss import smallest_within
from dsconvert.widths.size import UNIFORM, Formats, formats_as_asked, judged_formats, of_every_layer, packed_size
from dsconvert.yolo.checkpoint import Checkpoint
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.network import Head
from dsconvert.yolo.plan import choose_convs


@dataclass(frozen=True)
class Gathered:
    """The images, and what is known about them."""

    images: Images  # the images to calibrate on, as this process has them
    photographs: int  # how many images of all processes are photographs, not views of them
    division: Division  # all photographs by purpose
    labels: Labelled | None  # labels of the target's photographs; None: the float network's detections count as labels


@dataclass(frozen=True)
class Prepared:
    """A float network, ready to be measured and fitted."""

    graph: Graph  # the operations, with BatchNorm folded in and Detect's outputs in parts
    params: Mapping[str, ConvParams]  # weights and biases by convolution name, on the device
    head: Head  # how the outputs are decoded
    outputs: Outputs  # how errors in the outputs count
    chosen: Sequence[str]  # convolutions that become DSConv; the others become int8
    imgsz: Size  # of the images that the network is converted for
    device: str  # where the network runs, as torch names it


@dataclass(frozen=True)
class Resumable:
    """Fitted layers that survive a run that is stopped."""

    left: Mapping[str, QConv]  # the layers that a stopped run left
    keep: Callable[[Mapping[str, QConv]], None] | None  # keeps the layers of this run; None: nothing is kept


def quantize(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    command: str = "",
    progress: Progress | None = None,
    unfinished: Path | None = None,
    resume: bool = False,
    cache: Path | None = None,
    by: Maker = GPTQ,
) -> Quantized:
    """Convert a checkpoint.

    command: noted in the model file.
    progress: called with a stage, the number done and the total.
    unfinished: file that keeps fitted layers until the model is done; None keeps nothing.
    resume: go on from the layers that an equal run left in `unfinished`.
    cache: folder that keeps calibrations (see `measure.cache`); None keeps nothing.
    by: makes the fit from second moments of output gradients, by convolution name, and the number of photographs.

    Under torchrun every process looks at a part of the images, and all return the whole model.

    Raises InputError for options that do not fit the checkpoint.
    """
    check_options(options, checkpoint.head.stride)
    if resume and workers.count() > 1:
        raise InputError.naming("{resume} works with one process only; run it without torchrun.")
    if options.kds == "float" and options.bits is None:
        options = replace(options, bits=UNIFORM.bits)
    torch.manual_seed(options.seed)
    report = progress or (lambda stage, done, total: None)
    device = workers.device(options.device)
    options = replace(options, device=workers.named_device(options.device))
    room = Room(cache or (unfinished.parent if unfinished is not None else None), MEMORY // workers.here())
    checkpoint.network.to(device)
    given = gather(checkpoint, options, report, room)
    network = prepare(checkpoint, options, device)
    check_values(network.graph, network.params, given.images.one(0, device))
    origin = checkpoint.sha256, given.images.digest() if cache is not None or unfinished is not None else ""
    found = measure(network, given.images, options, origin, report, room, cache)
    layers = resumable(unfinished, network, given.images, options, origin, resume)
    about = provenance(checkpoint, options, command, found.damage)
    made = by(found.channels, given.photographs)
    fitted = partial(fit, network, given, found, made, about, layers, report, room)
    lost = partial(loss_of, network, given, report)
    if options.target_drop is None:
        model, drop = fitted(choose_formats(network, found, options)), None
    else:
        model, drop = fit_within(network, found, options.target_drop, fitted, lost)
    tuned = tune(model, network, given, options, report)
    if tuned is not None and tuned.kept and drop is not None:
        after = lost(tuned.model)
        tuned, drop = (tuned, after) if after <= drop else (replace(tuned, model=model, kept=0), drop)
    return describe(model, tuned, drop, network, given)


def gather(checkpoint: Checkpoint, options: QuantizeOptions, report: Progress, room: Room) -> Gathered:
    """Read the images, or synthesise them from the checkpoint, which still has its BatchNorm statistics here."""
    division, labels = Division((), (), ()), None
    if options.calib is None:
        images = synthetic(checkpoint, options.size, options.samples, options.seed, report, room)
    else:
        available = calibration_images(options.calib, options.split, options.strict)
        division = divided(available, options.samples, options.target_drop is not None, options.finetunes)
        if division.target:
            labels = labels_of(options.calib, division.target, checkpoint.head.names, options.strict)
        beside = beside_few(checkpoint, len(division.fit), options.size, options.seed, report)
        images = decoded(division.fit, options.size, options.seed, report, room, beside)
    return Gathered(images, images.all_photographs(), division, labels)


def prepare(checkpoint: Checkpoint, options: QuantizeOptions, device: str) -> Prepared:
    """Turn the network, which is on the device, into a graph, and choose the convolutions to convert."""
    graph, params = split_detect(*lower(checkpoint.network.fused()), checkpoint.head)
    chosen = sorted(choose_convs(checkpoint.network, graph, options.blocks, options.scope))
    return Prepared(graph, params, checkpoint.head, Detections(checkpoint.head), chosen, options.size, device)


def measure(
    network: Prepared, images: Images, options: QuantizeOptions, origin: tuple[str, str], report: Progress, room: Room,
    cache: Path | None,
) -> Calibration:  # fmt: skip
    """Measure the network on the images, or return a cached measurement.

    The damage of each format is measured only where widths are to be allocated.

    origin: digests of the checkpoint and of the images.
    """
    graph, params = network.graph, network.params
    wanted = network.chosen if options.bits is None else []
    judged = judged_formats(params, wanted, options.block_size)
    key = _deciding(options, images)
    seen = {name: key[name] for name in ("images", "imgsz", "seed", "device", "activations")}
    seen["formats"] = {name: [f.spelled() for f in some] for name, some in judged.items()}
    quantized = options.activations == "int8"
    found = remembered(
        cache, run_key(seen, *origin),
        lambda: calibrate(
            graph, params, network.outputs, images, judged, options.seed, network.device, quantized, report, room
        ),
        lambda kept: check_calibration(kept, graph, params, images, judged, quantized), room,
    )  # fmt: skip
    if any(drawn.kept is None for drawn in found.drawn.values()):
        float_outputs(graph, params, images, found.drawn, network.device)
    return found


def _deciding(options: QuantizeOptions, images: Images) -> dict[str, Any]:
    """Return what decides the fitted layers, besides the checkpoint, the images and the layers' widths."""
    return {**options.plain(), "calib": None, "images": [images.part.first, images.part.all]}


def resumable(
    unfinished: Path | None, network: Prepared, images: Images, options: QuantizeOptions, origin: tuple[str, str],
    resume: bool,
) -> Resumable:  # fmt: skip
    """Return the layers that a stopped run left in `unfinished`, and a function that keeps this run's layers there.

    With several processes nothing is kept.
    """
    if unfinished is None or workers.count() > 1:
        return Resumable({}, None)
    key = run_key(_deciding(options, images), *origin)
    shapes = {name: p.weight.shape for name, p in network.params.items()}
    left = read_unfinished(unfinished, key, shapes) if resume else {}
    return Resumable(left, partial(write_unfinished, unfinished, key))


def choose_formats(network: Prepared, found: Calibration, options: QuantizeOptions) -> dict[str, WeightFormat]:
    """Return a format for every chosen layer: the one asked for, or one allocated by damage within the budget."""
    params = network.params
    formats = formats_as_asked(
        params, found.damage, network.chosen, options.bits, options.block_size, options.target_bytes,
        partial(packed_size, network.graph, params, found.own, network.head, network.imgsz),
    )  # fmt: skip
    if options.kds == "float":  # the paper's form has free integers
        formats = {name: replace(format, code=REAL) for name, format in formats.items()}
    return formats


def fit_within(
    network: Prepared, found: Calibration, most: float, fitted: Callable[[Formats], DSModel],
    lost: Callable[[DSModel], float],
) -> tuple[DSModel, float]:  # fmt: skip
    """Return the smallest of some fitted models that lose at most `most` points of mAP50-95, and its loss."""

    def attempt(formats: Formats) -> tuple[DSModel, float]:
        model = fitted(formats)
        return model, lost(model)

    best = smallest_within(network.params, found.damage, most, attempt)
    return best.model, best.loss


def loss_of(network: Prepared, given: Gathered, report: Progress, model: DSModel) -> float:
    """Return the points of mAP50-95 that a model loses on the photographs held back for the target."""
    return map_drop(model, network.params, given.division.target, partial(report, "evaluate"), given.labels)


def tune(
    model: DSModel, network: Prepared, given: Gathered, options: QuantizeOptions, report: Progress
) -> Distilled[DSModel] | None:
    """Fine-tune a fitted model briefly. Returns None if there are no photographs to judge the result."""
    judges = photographs_of(given.division.judges, network.imgsz)
    if len(judges) < 2:  # one photograph gives no standard error
        return None
    part = given.images.part
    mine = range(part.first, part.first + part.mine)
    pictures = Pictures(part.all, mine, partial(given.images.one, device=network.device), judges)
    bounds = options.finetune_steps, options.finetune_time, options.seed
    told = partial(report, "finetune")
    return distil(model, network.params, network.outputs, pictures, *bounds, network.device, told)


def describe(
    fitted: DSModel, tuned: Distilled[DSModel] | None, drop: float | None, network: Prepared, given: Gathered
) -> Quantized:
    """Return the model with all that its user should know about it."""
    model, images, params = tuned.model if tuned else fitted, given.images, network.params
    views = images.part.all - given.photographs - images.synthesised
    sqnr = {name: _sqnr_db(params[name].weight.cpu(), conv.weight.weight()) for name, conv in model.convs.items()}
    scores = scores_on(model, params, partial(images.one, device="cpu"), max(images.photographs, 1))
    reason = images.skipped[0] if images.skipped else ""
    sameness = warning_of(images.pixels.get(index).numpy() for index in range(images.photographs))
    return Quantized(
        model, given.photographs, views, images.synthesised, len(images.skipped), sqnr, scores, drop, reason, sameness,
        tuned,
    )  # fmt: skip


def _sqnr_db(weight: Tensor, fitted: Tensor) -> float:
    """Return a weight's signal-to-quantization-noise ratio in decibels."""
    noise = (weight - fitted).double().square().sum().clamp_min(1e-30)
    return round(float(10 * torch.log10(weight.double().square().sum().clamp_min(1e-30) / noise)), 2)


def fit(
    network: Prepared, given: Gathered, found: Calibration, by: Fit, about: Mapping[str, Any], layers: Resumable,
    report: Progress, room: Room, formats: Formats,
) -> DSModel:  # fmt: skip
    """Fit every convolution: the chosen ones in the given formats, all others at 8 bits.

    about: the provenance that the model notes.
    """
    graph, params, images = network.graph, network.params, given.images
    report("widths", 1, 1)
    every = of_every_layer(params, formats)
    convs = fit_lockstep(
        graph, params, by, every, found.own, images.pixels, found.drawn, images.part.mine, room, network.device,
        lambda done, total: report("fit", done, total),
        usable(layers.left, [(node.name, every[node.name]) for node in graph.convs()]), layers.keep,
    )  # fmt: skip
    return DSModel(graph, convs, found.own, network.head, network.imgsz, about)
