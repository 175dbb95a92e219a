"""The steps strung together: what the command line calls, and the Python API.

checkpoint -> network -> plan -> calibrate -> fit -> DSModel -> file -> ONNX
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsconvert
from dsconvert.budget import WIDTHS, Damage, bits_for_file, bits_like_uniform, packed_size
from dsconvert.dsconv.tensor import DSTensor, used_block_size
from dsconvert.errors import InputError
from dsconvert.evaluate.accuracy import evaluate_predictors
from dsconvert.evaluate.candidates import Candidate, load_candidate
from dsconvert.evaluate.coco import Metrics
from dsconvert.evaluate.latency import Latency, interleaved_latency
from dsconvert.export.compact import compact
from dsconvert.export.onnx import PLAIN, Ends, export_float, export_quantized
from dsconvert.files import write_atomic
from dsconvert.fit.gptq import fit_layer
from dsconvert.fit.importance import measure_importance
from dsconvert.fit.lockstep import FitLayer, fit_lockstep
from dsconvert.fit.ranges import choose_grids
from dsconvert.fit.seen import Seen
from dsconvert.fit.sensitivity import weight_errors
from dsconvert.fit.synthesize import synthesize
from dsconvert.graph.integer import QParams
from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.graph.run import run_float
from dsconvert.model import DSModel, display_name, is_dsconv
from dsconvert.modelfile import load_model, model_bytes
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.images import calibration_batches, calibration_images, image_paths, read_data_yaml, spread
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.network import Head
from dsconvert.yolo.plan import choose_convs

MODEL_FILE, REPORT_FILE = "model.safetensors", "quantize.json"
BATCH = 4
# What lockstep fitting may keep of both networks' values: 3 bytes each (half, uint8), or 6 with float activations
# (half, float32). More images than fit in are left out.
LOCKSTEP_BYTES = 5 << 28
SYNTHETIC_IMAGES, SYNTHETIC_SIDE, SYNTHETIC_STEPS = 16, 320, 80

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything that decides the result of `quantize` besides the checkpoint and the machine.

    calib None means data-free. bits 2..8 for every DSConv layer, or None for widths by measured damage, within the
    bytes of 4 bits everywhere or within a packed ONNX file of target_bytes. blocks and scope as in `yolo.plan`; imgsz
    in pixels; samples the most calibration images used; activations int8, or float for a model whose weights alone
    are quantized."""

    calib: Path | None = None
    block_size: int = 32
    bits: int | None = None
    target_bytes: int | None = None
    blocks: str = "all"
    scope: str = "all"
    imgsz: int = 640
    samples: int = 128
    seed: int = 0
    device: str = "cpu"
    activations: str = "int8"


@dataclass(frozen=True)
class Quantized:
    """A fitted model, the images it was calibrated on, how many files were unreadable, and each layer's error."""

    model: DSModel
    images: int
    skipped: int
    sqnr_db: Mapping[str, float]


def quantize(
    checkpoint: Checkpoint, options: QuantizeOptions, command: str = "", progress: Progress | None = None
) -> Quantized:
    """Convert a checkpoint. Raises InputError for options that do not fit it."""
    _check(options, checkpoint)
    torch.manual_seed(options.seed)
    report = progress or (lambda stage, done, total: None)
    network, device = checkpoint.network.to(options.device), options.device
    calib_paths = None if options.calib is None else spread(calibration_images(options.calib), options.samples)
    if calib_paths is None:
        batches, skipped = _synthetic(checkpoint, options, report), 0
    else:
        batches, skipped = _decode(calib_paths, options.imgsz, report)
    head = checkpoint.head
    graph, params = split_detect(*lower(network.fuse()), head)
    chosen = choose_convs(network, graph, options.blocks, options.scope)
    value_bytes = 3 if options.activations == "int8" else 6
    kept = _bounded(graph, params, batches, device, LOCKSTEP_BYTES // value_bytes)
    images = sum(len(b) for b in kept)

    def measure(raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        return detection_measure(raw, reference, head)

    singles = _counted((image for b in _real(kept, device) for image in b.split(1)), "importance", images, report)
    errors = weight_errors(params, sorted(chosen) if options.bits is None else [], options.block_size, WIDTHS)
    importance = measure_importance(graph, params, singles, measure, options.seed, errors)
    own: dict[str, QParams] = {}
    if options.activations == "int8":
        own = choose_grids(graph, importance.samples, options.seed)
    damage = importance.damage
    bits = dict.fromkeys(sorted(chosen), options.bits or 0)
    if options.bits is None:
        bits = _mixed(graph, params, own, head, damage, options)
    convs = fit_lockstep(
        graph, params, _layer_fit(bits, options), own, _real(kept, device),
        lambda done, total: report("fit", done, total), importance.positions,
    )  # fmt: skip
    sqnr = {name: _sqnr_db(params[name].weight.cpu(), conv.weight.weight()) for name, conv in convs.items()}
    model = DSModel(
        graph, convs, own, checkpoint.head, options.imgsz, _provenance(checkpoint, options, command, damage)
    )
    return Quantized(model, images, skipped, sqnr)


def _check(options: QuantizeOptions, checkpoint: Checkpoint) -> None:
    stride = checkpoint.head.stride
    if options.imgsz % stride or not stride <= options.imgsz <= 4096:
        raise InputError(f"--imgsz {options.imgsz} is not a multiple of the model's stride {stride} up to 4096.")
    if options.bits is not None and options.target_bytes is not None:
        raise InputError("--bits fixes every layer's width and --target-size chooses it; give one of them.")
    if options.bits is not None and not 2 <= options.bits <= 8:
        raise InputError(f"--bits {options.bits} is not a number from 2 to 8.")
    if options.block_size < 1 or options.samples < 1:
        raise InputError("--block-size and --samples must be at least 1.")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {options.device} is not available on this machine; use --device cpu.")


def _decode(paths: Sequence[Path], side: int, report: Progress) -> tuple[list[Tensor], int]:
    """Letterboxed uint8 batches; images are decoded once."""
    batches, skipped = [], 0
    for batch, bad in calibration_batches(paths, side, BATCH):
        skipped += bad
        if len(batch):
            batches.append((batch * 255).round().to(torch.uint8))
        report("images", min(len(batches) * BATCH, len(paths)), len(paths))
    if not batches:
        raise InputError(f"None of the {skipped} calibration images could be read.")
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
) -> dict[str, int]:
    """Bits by name within the options' budget."""
    if options.target_bytes is None:
        return bits_like_uniform(params, damage, options.block_size)

    def file_size(bits: Mapping[str, int]) -> int:
        return packed_size(graph, params, own, head, options.imgsz, bits, options.block_size)

    return bits_for_file(params, damage, options.block_size, options.target_bytes, file_size)


def _layer_fit(bits: Mapping[str, int], options: QuantizeOptions) -> FitLayer:
    """DSConv with its bits for the chosen convolutions, plain int8 per channel for the others."""

    def fit(node: Node, weight: Tensor, batches: Iterable[Seen]) -> DSTensor:
        width = bits.get(node.name, 8)
        block_size = used_block_size(width, weight.shape[1], options.block_size)
        return fit_layer(node, weight, width, block_size, batches, options.seed)

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
    run_float(graph, params, one, lambda name, value: sizes.__setitem__(name, value.numel()))
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
        "source_sha256": hashlib.sha256(checkpoint.path.read_bytes()).hexdigest(),
        "source_bytes": checkpoint.size_bytes,
        "dsconvert": dsconvert.__version__,
        "command": command,
        "options": {
            **asdict(options),
            "calib": None if options.calib is None else str(options.calib.resolve()),
        },
        # what each width of each layer was expected to cost: why the layers have the bits they have
        "damage": {name: {str(b): float(f"{d:.4g}") for b, d in by_bits.items()} for name, by_bits in damage.items()},
    }


def quantize_report(result: Quantized) -> dict[str, Any]:
    """What quantize.json holds."""
    model = result.model
    return {
        "model": MODEL_FILE,
        "provenance": model.provenance,
        "calibration_images": result.images,
        "unreadable_images": result.skipped,
        "weights": model.weight_count,
        "weight_bits": round(model.weight_bits, 4),
        "layers": [
            {**layer, "sqnr_db": result.sqnr_db[node.name]}
            for layer, node in zip(layer_table(model), model.graph.convs(), strict=True)
        ],
    }


def layer_table(model: DSModel) -> list[dict[str, Any]]:
    """One row a convolution: name, shape, kind, bits, block size, stored weight bytes, float32 bytes,
    and the damage expected of each width (None where widths were not allocated)."""
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
                "damage": damage.get(node.name),
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


def onnx_bytes(path: Path, layout: str, imgsz: int | None, ends: Ends = PLAIN) -> bytes:
    """ONNX of a converted model in a layout, or the float32 network of a `.pt`."""
    if path.suffix == ".pt":
        checkpoint = load_checkpoint(path)
        graph, params = lower(checkpoint.network.fuse())
        made = export_float(graph, params, checkpoint.head, imgsz or 640, ends)
    else:
        model = load_model(path)
        made = compact(export_quantized(model, layout, imgsz or model.imgsz, ends))
    return made.SerializeToString(deterministic=True)


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


def evaluate(
    models: Sequence[Path],
    data: Path,
    imgsz: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> list[Evaluated]:
    """Measure models on the val split of a data.yaml (its train split when there is no val).

    When `data` is a folder of images instead, the truth is what the first model finds with confidence.
    Raises InputError when a model's classes are not the data's, or the first model's."""
    report = progress or (lambda stage, done, total: None)
    labelled = data.suffix.lower() in (".yaml", ".yml")
    described = read_data_yaml(data) if labelled else None
    paths = list(described.val or described.train) if described else image_paths(data)
    if not paths:
        raise InputError(f"{data} names neither val nor train images.")
    if samples is not None:
        paths = spread(paths, samples)
    candidates = _candidates(models, imgsz)
    whose, nc = (str(data), len(described.names)) if described else (str(models[0]), len(candidates[0].names))
    for c in candidates:
        if c.names and len(c.names) != nc:
            raise InputError(
                f"{c.path} has {len(c.names)} classes, {whose} has {nc}; give --data a folder of images to measure "
                "agreement with the first model without labels."
            )
    metrics = evaluate_predictors(
        [c.predict for c in candidates],
        paths,
        candidates[0].side,
        nc,
        labelled,
        lambda done, total: report("evaluate", done, total),
    )
    latencies = interleaved_latency([c.run_once for c in candidates])
    return [Evaluated(c, m, t) for c, m, t in zip(candidates, metrics, latencies, strict=True)]


def _candidates(models: Sequence[Path], imgsz: int | None) -> list[Candidate]:
    """All models at one image size: the one asked for, else the one the others were made for (a `.pt` fits any)."""
    sized = {p: load_candidate(p, imgsz) for p in models if p.suffix != ".pt"}
    sides = {c.side for c in sized.values()}
    if len(sides) > 1:
        raise InputError(f"The models were made for different image sizes {sorted(sides)}; give --imgsz.")
    side = sides.pop() if sides else imgsz
    return [sized[p] if p in sized else load_candidate(p, side) for p in models]
