"""The steps of `quantize` strung together: what the command line calls, and the Python API.

checkpoint -> network -> plan -> calibrate -> fit -> DSModel -> file
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsconvert
from dsconvert import workers
from dsconvert.budget import (
    BITS,
    BLOCK_SIZES,
    UNIFORM,
    Damage,
    Widths,
    packed_size,
    widths_for_file,
    widths_like_uniform,
)
from dsconvert.calibcache import remembered
from dsconvert.calibration import (
    Images,
    beside_few,
    calibrate,
    check_calibration,
    check_values,
    decoded,
    float_outputs,
    photographs_of,
    synthetic,
)
from dsconvert.calibration import Progress as Progress
from dsconvert.division import Division, divided
from dsconvert.dsconv.tensor import DSTensor, Width, used_width
from dsconvert.errors import InputError
from dsconvert.evaluate.compare import ScoreShift
from dsconvert.evaluate.drop import labels_of, map_drop, scores_on
from dsconvert.files import write_atomic
from dsconvert.fit.gptq import fit_layer
from dsconvert.fit.kept import MEMORY, Room
from dsconvert.fit.lockstep import FitLayer, fit_lockstep
from dsconvert.fit.real_alpha import fit_layer_real
from dsconvert.fit.seen import Seen
from dsconvert.fit.sensitivity import widths_of
from dsconvert.graph.integer import QConv, QParams
from dsconvert.graph.ir import ConvParams, Graph, Node, display_name
from dsconvert.model import DSModel, damage_by_bits, is_dsconv
from dsconvert.modelfile import model_bytes
from dsconvert.sameness import warning_of
from dsconvert.target import smallest_within
from dsconvert.train.distil import Distilled, Pictures, distil
from dsconvert.unfinished import read_unfinished, run_key, usable, write_unfinished
from dsconvert.yolo.checkpoint import Checkpoint
from dsconvert.yolo.dataset import calibration_images
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.network import Head
from dsconvert.yolo.plan import choose_convs

MODEL_FILE, REPORT_FILE = "model.safetensors", "quantize.json"


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything that decides the result of `quantize` besides the checkpoint and the machine.

    calib None means data-free. bits 2..8 for every DSConv layer, or None for widths by measured damage: within the
    bytes of 4 bits everywhere, within a packed ONNX file of target_bytes, or the smallest that lose at most
    target_drop points of mAP50-95 on calibration images held back (against labels where they have any, else against
    what the float network finds). block_size None means one by measured damage too, or (bits given) 16. blocks and
    scope as in `yolo.plan`; imgsz in pixels; samples the most calibration images used; split that of a data.yaml (None:
    train, else val); strict: lists and labels of which a part cannot be used are refused; activations int8, or float
    for a model whose weights alone are quantized; kds int, or float for the paper's real-valued shifts (4 bits unless
    bits says otherwise). finetune_steps of the brief fine-tune (see `train.distil`): None for as many as seem of use, 0
    for none; finetune_time seconds after which it stops: None for never, 0 for none."""

    calib: Path | None = None
    block_size: int | None = None
    bits: int | None = None
    target_bytes: int | None = None
    target_drop: float | None = None
    blocks: str = "all"
    scope: str = "all"
    imgsz: int = 640
    samples: int = 256
    seed: int = 0
    device: str = "cpu"
    activations: str = "int8"
    kds: str = "int"
    split: str | None = None
    strict: bool = False
    finetune_steps: int | None = None
    finetune_time: float | None = None


@dataclass(frozen=True)
class Quantized:
    """A fitted model, and what its owner should know of it."""

    model: DSModel
    images: int  # that it was calibrated on
    views: int  # of these images, which it was calibrated on too where they are few
    synthesised: int  # images that were made up beside them where they are fewer still
    skipped: int  # files that could not be read
    sqnr_db: Mapping[str, float]  # each layer's error
    scores: ScoreShift  # of the float network and of the model, on some of the images
    map_drop: float | None = None  # points of mAP50-95 on held-back images, where a target was set
    skipped_reason: str = ""  # why the first file could not be read
    sameness: str = ""  # a warning where all images are the same
    tuned: Distilled | None = None  # what the brief fine-tune did, where there was one


def quantize(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    command: str = "",
    progress: Progress | None = None,
    unfinished: Path | None = None,
    resume: bool = False,
    cache: Path | None = None,
) -> Quantized:
    """Convert a checkpoint. Raises InputError for options that do not fit it.

    Fitted layers are kept in the file `unfinished`, if one is named, until the whole is done; `resume` goes on from
    what an equal run left there. Calibrations are kept in the folder `cache`, if one is named (see `calibcache`).
    Under torchrun every process looks at a part of the images; each returns the whole model."""
    _check(options, checkpoint)
    if resume and workers.count() > 1:
        raise InputError("--resume goes on with one process; run it without torchrun.")
    if options.kds == "float" and options.bits is None:
        options = replace(options, bits=UNIFORM.bits)
    torch.manual_seed(options.seed)
    report = progress or (lambda stage, done, total: None)
    device = workers.device(options.device)
    options = replace(options, device=workers.named_device(options.device))
    room = Room(cache or (unfinished.parent if unfinished is not None else None), MEMORY // workers.here())
    network, head = checkpoint.network.to(device), checkpoint.head
    division, held_labels = Division((), (), ()), None
    if options.calib is None:
        images = synthetic(checkpoint, options.imgsz, options.samples, options.seed, report, room)
    else:
        available = calibration_images(options.calib, options.split, options.strict)
        finetune = options.finetune_steps != 0 and options.finetune_time != 0
        division = divided(available, options.samples, options.target_drop is not None, finetune)
        if division.target:
            held_labels = labels_of(options.calib, division.target, head.names, options.strict)
        beside = beside_few(checkpoint, len(division.fit), options.imgsz, options.seed, report)
        images = decoded(division.fit, options.imgsz, options.seed, report, room, beside)
    sameness = warning_of(images.pixels.get(index).numpy() for index in range(images.photographs))
    graph, params = split_detect(*lower(network.fused()), head)
    chosen = sorted(choose_convs(network, graph, options.blocks, options.scope))
    quantized = options.activations == "int8"
    check_values(graph, params, images.one(0, device))
    key = {**asdict(options), "calib": None, "images": [images.part.first, images.part.all]}
    sizes = [options.block_size] if options.block_size else BLOCK_SIZES
    judged = {
        name: widths_of(params[name].weight.shape[1], BITS, sizes) for name in (chosen if options.bits is None else [])
    }
    seen = {k: key[k] for k in ("images", "imgsz", "seed", "device", "activations")}
    seen["widths"] = judged
    pixels = images.digest() if cache is not None or unfinished is not None else ""
    calibration = remembered(
        cache, run_key(seen, checkpoint.sha256, pixels),
        lambda: calibrate(graph, params, head, images, judged, options.seed, device, quantized, report, room),
        lambda kept: check_calibration(kept, graph, params, images, judged, quantized), room,
    )  # fmt: skip
    if any(drawn.kept is None for drawn in calibration.drawn.values()):
        float_outputs(graph, params, images, calibration.drawn, device)
    own, damage = calibration.own, calibration.damage
    photographs = images.all_photographs()

    left: Mapping[str, QConv] = {}
    keep = None
    if unfinished is not None and workers.count() == 1:
        run = run_key(key, checkpoint.sha256, pixels)
        left = read_unfinished(unfinished, run, {n: p.weight.shape for n, p in params.items()}) if resume else {}
        keep = partial(write_unfinished, unfinished, run)

    def fitted(widths: Widths) -> DSModel:
        report("widths", 1, 1)
        wanted = [(n.name, _width(widths, n.name, params[n.name].weight)) for n in graph.convs()]
        together = coupled(graph, widths, calibration.channels, options.kds)
        convs = fit_lockstep(
            graph, params, _layer_fit(widths, options, together, photographs), own, images.pixels, calibration.drawn,
            images.part.mine, room, device, lambda done, total: report("fit", done, total), usable(left, wanted), keep,
        )  # fmt: skip
        return DSModel(graph, convs, own, head, options.imgsz, _provenance(checkpoint, options, command, damage))

    def attempt(widths: Widths) -> tuple[DSModel, float]:
        model = fitted(widths)
        say = partial(report, "evaluate")
        return model, map_drop(model, params, division.target, say, held_labels)

    drop = None
    if options.target_drop is not None:
        found = smallest_within(params, damage, options.target_drop, attempt)
        model, drop = found.model, found.loss
    elif options.bits is None:
        model = fitted(_mixed(graph, params, own, head, damage, options))
    else:
        block = options.block_size or min(BLOCK_SIZES)
        widths = {name: used_width(options.bits, params[name].weight.shape[1], block) for name in chosen}
        if options.kds == "float":  # the paper's form: every VQK is any integer of its bits
            widths = {name: width._replace(trellis=False) for name, width in widths.items()}
        model = fitted(widths)
    tuned = None
    judges = photographs_of(division.judges, options.imgsz)
    if len(judges) > 1:  # one has no standard error
        tuned = _tuned(model, params, images, judges, options, report)
        if tuned.kept and drop is not None:
            after = map_drop(tuned.model, params, division.target, partial(report, "evaluate"), held_labels)
            tuned, drop = (tuned, after) if after <= drop else (replace(tuned, model=model, kept=0), drop)
        model = tuned.model
    sqnr = {name: _sqnr_db(params[name].weight.cpu(), conv.weight.weight()) for name, conv in model.convs.items()}
    scores = scores_on(model, params, partial(images.one, device="cpu"), max(images.photographs, 1))
    reason = images.skipped[0] if images.skipped else ""
    views, skipped = images.part.all - photographs - images.synthesised, len(images.skipped)
    return Quantized(
        model, photographs, views, images.synthesised, skipped, sqnr, scores, drop, reason, sameness, tuned
    )


def _tuned(
    model: DSModel, params: Mapping[str, ConvParams], images: Images, judges: Sequence[Tensor],
    options: QuantizeOptions, report: Progress,
) -> Distilled:  # fmt: skip
    """What the brief fine-tune makes of a fitted model."""
    part, device = images.part, workers.device(options.device)
    mine = range(part.first, part.first + part.mine)
    pictures = Pictures(part.all, mine, partial(images.one, device=device), judges)
    given = options.finetune_steps, options.finetune_time, options.seed
    return distil(model, params, pictures, *given, device, partial(report, "finetune"))


def _check(options: QuantizeOptions, checkpoint: Checkpoint) -> None:
    stride = checkpoint.head.stride
    if options.imgsz % stride or not stride <= options.imgsz <= 4096:
        raise InputError(f"--imgsz {options.imgsz} is not a multiple of the model's stride {stride} up to 4096.")
    if sum(o is not None for o in (options.bits, options.target_bytes, options.target_drop)) > 1:
        raise InputError("--bits, --target-size and --target-map-drop each decide the widths; give one of them.")
    if options.target_drop is not None and (options.calib is None or options.target_drop <= 0):
        raise InputError("--target-map-drop needs a number above 0, and --calib images to measure the drop on.")
    if options.bits is not None and not 2 <= options.bits <= 8:
        raise InputError(f"--bits {options.bits} is not a number from 2 to 8.")
    if options.kds == "float" and (options.activations != "float" or options.target_bytes or options.target_drop):
        raise InputError("--kds float needs --activations float, and knows no --target-size or --target-map-drop.")
    if (options.finetune_steps or 0) < 0 or not 0 <= (options.finetune_time or 0) < math.inf:
        raise InputError("--finetune-steps and --finetune-time must be at least 0.")
    if (options.block_size or 1) < 1 or options.samples < 1:
        raise InputError("--block-size and --samples must be at least 1.")
    workers.check_device(options.device)


def _mixed(
    graph: Graph,
    params: Mapping[str, ConvParams],
    own: Mapping[str, QParams],
    head: Head,
    damage: Damage,
    options: QuantizeOptions,
) -> dict[str, Width]:
    """Widths by name within the options' budget."""
    if options.target_bytes is None:
        return widths_like_uniform(params, damage)

    def file_size(widths: Widths) -> int:
        return packed_size(graph, params, own, head, options.imgsz, widths)

    return widths_for_file(params, damage, options.target_bytes, file_size)


def _width(widths: Widths, name: str, weight: Tensor) -> Width:
    return widths.get(name, used_width(8, weight.shape[1], 0))


def coupled(graph: Graph, widths: Widths, channels: Mapping[str, Tensor], kds: str) -> dict[str, Tensor]:
    """The `channels` of the convolutions whose output channels are fitted together: below 8 bits, without groups and
    with integer shifts."""
    names = [n.name for n in graph.convs() if n.attrs["groups"] == 1 and kds == "int" and n.name in channels]
    return {name: channels[name] for name in names if name in widths and widths[name].bits < 8}


def _layer_fit(widths: Widths, options: QuantizeOptions, channels: Mapping[str, Tensor], photographs: int) -> FitLayer:
    """DSConv with its width for the chosen convolutions, plain int8 per channel for the others."""

    def fit(node: Node, weight: Tensor, seen: Iterable[Seen]) -> DSTensor | QConv:
        width = _width(widths, node.name, weight)
        if options.kds == "float" and node.name in widths:
            return fit_layer_real(node, weight, width.bits, width.block_size, seen, photographs)
        return fit_layer(node, weight, width, seen, channels.get(node.name), photographs)

    return fit


def _sqnr_db(weight: Tensor, fitted: Tensor) -> float:
    """Signal to quantization noise of a weight, in decibels."""
    noise = (weight - fitted).double().square().sum().clamp_min(1e-30)
    return round(float(10 * torch.log10(weight.double().square().sum().clamp_min(1e-30) / noise)), 2)


def _provenance(checkpoint: Checkpoint, options: QuantizeOptions, command: str, damage: Damage) -> dict[str, Any]:
    return {
        "source": str(checkpoint.path.resolve()),
        "source_sha256": checkpoint.sha256,
        "source_bytes": checkpoint.size_bytes,
        "dsconvert": dsconvert.__version__,
        "command": command,
        "options": {
            **asdict(options),
            "calib": None if options.calib is None else str(options.calib.resolve()),
        },
        # what each width of each layer was expected to cost: why the layers have the bits they have
        "damage": {
            name: {f"{w.bits}/{w.block_size}": float(f"{d:.4g}") for w, d in by_width.items()}
            for name, by_width in damage.items()
        },
    }


def quantize_report(result: Quantized) -> dict[str, Any]:
    """What quantize.json holds."""
    model = result.model
    return {
        "model": MODEL_FILE,
        "provenance": model.provenance,
        "calibration_images": result.images,
        "calibration_views": result.views,
        "synthesised_images": result.synthesised,
        "unreadable_images": result.skipped,
        "held_back_map_drop": result.map_drop,
        "scores": asdict(result.scores),
        "finetune": None if result.tuned is None else tuning_report(result.tuned),
        "weights": model.weight_count,
        "weight_bits": round(model.weight_bits, 4),
        "layers": [
            {**layer, "sqnr_db": result.sqnr_db[node.name]}
            for layer, node in zip(layer_table(model), model.graph.convs(), strict=True)
        ],
    }


def tuning_report(tuned: Distilled) -> dict[str, Any]:
    """What quantize.json holds of the brief fine-tune: the step that was kept (0: the fit), by how much the error fell
    on the images held back, and the curve."""
    return {
        "kept_step": tuned.kept,
        "error_fell_by": tuned.gain,
        "standard_error": tuned.uncertainty,
        "error_of_activations": tuned.activations,
        "images_held_back": tuned.judges,
        "curve": [asdict(look) for look in tuned.curve],
    }


def layer_table(model: DSModel) -> list[dict[str, Any]]:
    """One row a convolution: name, shape, kind, bits, block size, stored weight bytes, float32 bytes,
    and the damage expected of each number of bits at that block size (None where widths were not allocated)."""
    rows = []
    damage = model.provenance.get("damage") or {}
    for node in model.graph.convs():
        w = model.convs[node.name].weight
        rows.append(
            {
                "name": display_name(node),
                "shape": list(w.vqk.shape),
                "kind": "DSConv" if is_dsconv(w) else "int8",
                "bits": w.bits,
                "block_size": w.block_size if is_dsconv(w) else None,
                "bytes": round(w.weight_bits * w.vqk.numel() / 8),
                "float32_bytes": w.vqk.numel() * 4,
                "damage": damage_by_bits(damage[node.name], w) if node.name in damage else None,
            }
        )
    return rows


def save_quantized(result: Quantized, folder: Path, force: bool) -> Path:
    """Write quantize.json and the model file into the folder; returns the model's path.

    Raises InputError when there is a model and force is off. A report alone was left by a run that was killed."""
    model, report = folder / MODEL_FILE, folder / REPORT_FILE
    if model.exists() and not force:
        raise InputError(f"{model} already exists; give --force to replace it, or another --out.")
    text = (json.dumps(quantize_report(result), indent=1) + "\n").encode()
    write_atomic(report, text, force=True)
    write_atomic(model, model_bytes(result.model), force)
    if report.read_bytes() != text:  # of a run at the same time, which now finds a model
        write_atomic(report, text, force=True)
    return model
