"""The steps strung together: what the command line calls, and the Python API.

checkpoint -> network -> plan -> calibrate -> fit -> DSModel -> file -> ONNX
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsconvert
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
from dsconvert.dsconv.tensor import DSTensor, Width, used_width
from dsconvert.errors import InputError
from dsconvert.evaluate.accuracy import evaluate_predictors
from dsconvert.evaluate.candidates import Candidate, load_candidates
from dsconvert.evaluate.coco import Metrics
from dsconvert.evaluate.drop import map_drop
from dsconvert.evaluate.latency import Latency, interleaved_latency
from dsconvert.export.check import check_accumulators, check_export, check_images, float_reference, reference_of
from dsconvert.export.compact import compact
from dsconvert.export.onnx import PLAIN, Ends, export_float, export_quantized
from dsconvert.files import write_atomic
from dsconvert.fit.gptq import fit_layer
from dsconvert.fit.importance import measure_importance
from dsconvert.fit.lockstep import FitLayer, fit_lockstep
from dsconvert.fit.ranges import choose_grids
from dsconvert.fit.real_alpha import fit_layer_real
from dsconvert.fit.seen import Seen
from dsconvert.fit.sensitivity import weight_errors
from dsconvert.fit.synthesize import synthesize
from dsconvert.graph.integer import QConv, QParams
from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.graph.run import run_float
from dsconvert.model import DSModel, damage_by_bits, display_name, is_dsconv
from dsconvert.modelfile import load_model, model_bytes
from dsconvert.target import smallest_within
from dsconvert.unfinished import read_unfinished, run_key, usable, write_unfinished
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.images import (
    Image,
    calibration_batches,
    calibration_images,
    image_paths,
    letterbox,
    read_data_yaml,
    read_image,
    spread,
)
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.network import Head
from dsconvert.yolo.plan import choose_convs

MODEL_FILE, REPORT_FILE = "model.safetensors", "quantize.json"
BATCH = 4
# What lockstep fitting may keep of both networks' values: 3 bytes each (half, uint8), or 6 with float activations
# (half, float32). More images than fit in are left out.
LOCKSTEP_BYTES = 5 << 28
HELD_BACK = 4  # with a target for the loss, every fourth calibration image measures it and calibrates nothing
MOST_VALUE = 60000  # of activations, which are kept as halves
SYNTHETIC_IMAGES, SYNTHETIC_SIDE, SYNTHETIC_STEPS = 16, 320, 80

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything that decides the result of `quantize` besides the checkpoint and the machine.

    calib None means data-free. bits 2..8 for every DSConv layer, or None for widths by measured damage: within the
    bytes of 4 bits everywhere, within a packed ONNX file of target_bytes, or the smallest that lose at most
    target_drop points of mAP50-95 on calibration images held back (against labels where they have any, else against
    what the float network finds). block_size None means one by measured damage too, or (bits given) 16. blocks and
    scope as in `yolo.plan`; imgsz in pixels; samples the most calibration images used; activations int8, or float for
    a model whose weights alone are quantized; kds int, or float for the paper's real-valued shifts (4 bits unless bits
    says otherwise)."""

    calib: Path | None = None
    block_size: int | None = None
    bits: int | None = None
    target_bytes: int | None = None
    target_drop: float | None = None
    blocks: str = "all"
    scope: str = "all"
    imgsz: int = 640
    samples: int = 128
    seed: int = 0
    device: str = "cpu"
    activations: str = "int8"
    kds: str = "int"


@dataclass(frozen=True)
class Quantized:
    """A fitted model, the images it was calibrated on, how many files were unreadable, each layer's error, the points
    of mAP50-95 lost on held-back images where a target was set, and why the first unreadable file was so."""

    model: DSModel
    images: int
    skipped: int
    sqnr_db: Mapping[str, float]
    map_drop: float | None = None
    skipped_reason: str = ""


def quantize(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    command: str = "",
    progress: Progress | None = None,
    unfinished: Path | None = None,
    resume: bool = False,
) -> Quantized:
    """Convert a checkpoint. Raises InputError for options that do not fit it.

    Fitted layers are kept in the file `unfinished`, if one is named, until the whole is done; `resume` goes on from
    what an equal run left there."""
    _check(options, checkpoint)
    if options.kds == "float" and options.bits is None:
        options = replace(options, bits=UNIFORM.bits)
    torch.manual_seed(options.seed)
    report = progress or (lambda stage, done, total: None)
    network, device, head = checkpoint.network.to(options.device), options.device, checkpoint.head
    paths = None if options.calib is None else spread(calibration_images(options.calib), options.samples)
    held_back: list[Path] = []
    if options.target_drop is not None and paths is not None:
        held_back = paths[HELD_BACK - 1 :: HELD_BACK]
        paths = [p for p in paths if p not in set(held_back)]
    skipped: list[str] = []
    if paths is None:
        batches = _synthetic(checkpoint, options, report)
    else:
        batches, skipped = _decode(paths, options.imgsz, report)
    graph, params = split_detect(*lower(network.fuse()), head)
    chosen = sorted(choose_convs(network, graph, options.blocks, options.scope))
    value_bytes = 3 if options.activations == "int8" else 6
    kept = _bounded(graph, params, batches, device, LOCKSTEP_BYTES // value_bytes)
    images = sum(len(b) for b in kept)

    def measure(raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        return detection_measure(raw, reference, head)

    singles = _counted((image for b in _real(kept, device) for image in b.split(1)), "importance", images, report)
    sizes = [options.block_size] if options.block_size else BLOCK_SIZES
    errors = weight_errors(params, chosen if options.bits is None else [], BITS, sizes)
    importance = measure_importance(graph, params, singles, measure, options.seed, errors)
    own: dict[str, QParams] = {}
    if options.activations == "int8":
        own = choose_grids(graph, importance.samples, importance.clipping, options.seed)
    damage = importance.damage

    left: Mapping[str, QConv] = {}
    keep = None
    if unfinished is not None:
        key = run_key({**asdict(options), "calib": None}, checkpoint.sha256, *kept)
        left = read_unfinished(unfinished, key) if resume else {}
        keep = partial(write_unfinished, unfinished, key)

    def fitted(widths: Widths) -> DSModel:
        report("widths", 1, 1)
        wanted = [(n.name, _width(widths, n.name, params[n.name].weight)) for n in graph.convs()]
        convs = fit_lockstep(
            graph, params, _layer_fit(widths, options), own, _real(kept, device),
            lambda done, total: report("fit", done, total), importance.positions, usable(left, wanted), keep,
        )  # fmt: skip
        return DSModel(graph, convs, own, head, options.imgsz, _provenance(checkpoint, options, command, damage))

    def attempt(widths: Widths) -> tuple[DSModel, float]:
        model = fitted(widths)
        return model, map_drop(model, params, held_back, lambda done, total: report("evaluate", done, total))

    drop = None
    if options.target_drop is not None:
        found = smallest_within(params, damage, options.target_drop, attempt)
        model, drop = found.model, found.loss
    elif options.bits is None:
        model = fitted(_mixed(graph, params, own, head, damage, options))
    else:
        block = options.block_size or min(BLOCK_SIZES)
        model = fitted({name: used_width(options.bits, params[name].weight.shape[1], block) for name in chosen})
    sqnr = {name: _sqnr_db(params[name].weight.cpu(), conv.weight.weight()) for name, conv in model.convs.items()}
    return Quantized(model, images, len(skipped), sqnr, drop, skipped[0] if skipped else "")


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
    if (options.block_size or 1) < 1 or options.samples < 1:
        raise InputError("--block-size and --samples must be at least 1.")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {options.device} is not available on this machine; use --device cpu.")


def _decode(paths: Sequence[Path], side: int, report: Progress) -> tuple[list[Tensor], list[str]]:
    """Letterboxed uint8 batches, and why the others could not be read; images are decoded once."""
    batches, skipped = [], []
    for batch, bad in calibration_batches(paths, side, BATCH):
        skipped += bad
        if len(batch):
            batches.append((batch * 255).round().to(torch.uint8))
        report("images", min(len(batches) * BATCH, len(paths)), len(paths))
    if not batches:
        raise InputError(f"None of the {len(skipped)} calibration images could be read; the first: {skipped[0]}")
    return batches, skipped


def _synthetic(checkpoint: Checkpoint, options: QuantizeOptions, report: Progress) -> list[Tensor]:
    side = min(options.imgsz, SYNTHETIC_SIDE)
    count = min(options.samples, SYNTHETIC_IMAGES)
    try:
        batches = synthesize(
            checkpoint.network, count, side, SYNTHETIC_STEPS, options.seed,
            lambda done, total: report("synthesize", done, total),
        )  # fmt: skip
    except ValueError:
        raise InputError(
            f"{checkpoint.path} has its BatchNorm fused away, so images cannot be synthesised from it; give --calib."
        ) from None
    return [(part * 255).round().to(torch.uint8).cpu() for b in batches for part in b.split(BATCH)]


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


def _layer_fit(widths: Widths, options: QuantizeOptions) -> FitLayer:
    """DSConv with its width for the chosen convolutions, plain int8 per channel for the others."""

    def fit(node: Node, weight: Tensor, batches: Iterable[Seen]) -> DSTensor:
        width = _width(widths, node.name, weight)
        if options.kds == "float" and node.name in widths:
            return fit_layer_real(node, weight, *width, batches, options.seed)
        return fit_layer(node, weight, *width, batches, options.seed)

    return fit


def _counted(batches: Iterable[Tensor], stage: str, total: int, report: Progress) -> Iterable[Tensor]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        report(stage, done, total)


def _real(batches: Iterable[Tensor], device: str) -> Iterator[Tensor]:
    """uint8 batches as the network reads them, 0..1, made one at a time."""
    return (b.to(device).float() / 255 for b in batches)


def _bounded(
    graph: Graph, params: Mapping[str, ConvParams], batches: list[Tensor], device: str, most: int
) -> list[Tensor]:
    """As many of the batches, evenly spread, as give at most `most` values to keep at any time."""
    sizes: dict[str, int] = {}
    one = batches[0][:1].to(device).float() / 255

    def note(name: str, value: Tensor) -> None:
        if not float(value.abs().max()) < MOST_VALUE:  # NaN is not
            raise InputError(f"The values of layer {name} are infinite or beyond {MOST_VALUE}: it cannot be converted.")
        sizes[name] = value.numel()

    run_float(graph, params, one, note)
    alive, peak, last = 0, 0, graph.last_use()
    for index, node in enumerate(graph.nodes):
        alive += sizes[node.name]
        peak = max(peak, alive)
        alive -= sum(sizes[name] for name in set(node.inputs) if last[name] == index and name in sizes)
    fitting = max(1, most // (peak * len(batches[0])))
    count = min(fitting, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]


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
        "unreadable_images": result.skipped,
        "held_back_map_drop": result.map_drop,
        "weights": model.weight_count,
        "weight_bits": round(model.weight_bits, 4),
        "layers": [
            {**layer, "sqnr_db": result.sqnr_db[node.name]}
            for layer, node in zip(layer_table(model), model.graph.convs(), strict=True)
        ],
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
    """Write quantize.json and the model file into the folder; returns the model's path."""
    for name in (MODEL_FILE, REPORT_FILE):
        if (folder / name).exists() and not force:
            raise InputError(f"{folder / name} already exists; give --force to replace it, or another --out.")
    text = json.dumps(quantize_report(result), indent=1) + "\n"
    write_atomic(folder / REPORT_FILE, text.encode(), force)
    write_atomic(folder / MODEL_FILE, model_bytes(result.model), force)
    return folder / MODEL_FILE


def onnx_bytes(path: Path, layout: str, imgsz: int | None, ends: Ends = PLAIN, check: bool = True) -> bytes:
    """ONNX of a converted model in a layout, or the float32 network of a `.pt`.

    Raises CheckError when `check` finds that it does not compute what it should, see `export.check`."""
    photographs: list[Image] = []
    if path.suffix == ".pt":
        checkpoint = load_checkpoint(path)
        graph, params = lower(checkpoint.network.fuse())
        side, reference = imgsz or 640, float_reference(graph, params, checkpoint.head)
        made = named = export_float(graph, params, checkpoint.head, side, ends)
    else:
        model = load_model(path)
        side, reference = imgsz or model.imgsz, reference_of(model)
        named = export_quantized(model, layout, side, ends)
        made = compact(named)
        if check:
            check_accumulators(model)
            photographs = _first_calibration_image(model, side)
    data = made.SerializeToString(deterministic=True)
    if check:
        check_export(data, reference, ends, check_images(side, photographs), named.SerializeToString())
    return data


def _first_calibration_image(model: DSModel, side: int) -> list[Image]:
    """One of the images a model was calibrated on, (3, side, side); none when they are gone."""
    calib = model.provenance.get("options", {}).get("calib")
    try:
        path = calibration_images(Path(calib))[0] if calib else None
        return [] if path is None else [letterbox(read_image(path), side)[0].transpose(2, 0, 1)]
    except InputError:
        return []


def newest_result(root: Path) -> Path:
    """The model file written last under `root` (runs/dsconvert). Raises InputError when there is none."""
    found = sorted(root.glob(f"*/{MODEL_FILE}"), key=lambda p: p.stat().st_mtime_ns)
    if not found:
        raise InputError(f"There is no converted model under {root}; run dsconvert quantize first, or name a MODEL.")
    return found[-1]


@dataclass(frozen=True)
class Evaluated:
    """One model's accuracy and latency on the same images as the others."""

    candidate: Candidate
    metrics: Metrics
    latency: Latency


@dataclass(frozen=True)
class Entrants:
    """Models at one image size and the images they are judged on. The truth has nc classes: it is the labels beside
    the images, or (labelled False) what the first model finds with confidence."""

    candidates: Sequence[Candidate]
    paths: Sequence[Path]
    nc: int
    labelled: bool


def entrants(models: Sequence[Path], data: Path, imgsz: int | None = None, samples: int | None = None) -> Entrants:
    """Load models, and find the images of the val split of a data.yaml (its train split when there is no val) or of a
    folder. Raises InputError when a model's classes are not the data's, or the first model's."""
    labelled = data.suffix.lower() in (".yaml", ".yml")
    described = read_data_yaml(data) if labelled else None
    paths = list(described.val or described.train) if described else image_paths(data)
    if not paths:
        raise InputError(f"{data} names neither val nor train images.")
    if samples is not None:
        paths = spread(paths, samples)
    candidates = load_candidates(models, imgsz)
    whose, nc = (str(data), len(described.names)) if described else (str(models[0]), len(candidates[0].names))
    for c in candidates:
        if c.names and len(c.names) != nc:
            raise InputError(
                f"{c.path} has {len(c.names)} classes, {whose} has {nc}; give --data a folder of images to measure "
                "agreement with the first model without labels."
            )
    return Entrants(candidates, paths, nc, labelled)


def evaluate(
    models: Sequence[Path],
    data: Path,
    imgsz: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> list[Evaluated]:
    """Measure models on the images of `data`, see `entrants`."""
    report = progress or (lambda stage, done, total: None)
    given = entrants(models, data, imgsz, samples)
    metrics = evaluate_predictors(
        [c.predict for c in given.candidates],
        given.paths,
        given.candidates[0].side,
        given.nc,
        given.labelled,
        lambda done, total: report("evaluate", done, total),
    )
    latencies = interleaved_latency([c.run_once for c in given.candidates])
    return [Evaluated(c, m, t) for c, m, t in zip(given.candidates, metrics, latencies, strict=True)]
