"""What is known of a conversion: what the model file notes of its origin, and what quantize.json holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsconvert.base.files import already_there, write_atomic
from dsconvert.base.version import VERSION
from dsconvert.convert.options import QuantizeOptions
from dsconvert.graph.ir import display_name
from dsconvert.model.file import model_bytes
from dsconvert.model.model import DSModel, damage_by_bits, is_dsconv
from dsconvert.scoring.compare import ScoreShift
from dsconvert.tune.distil import Distilled
from dsconvert.widths.size import Damage
from dsconvert.yolo.checkpoint import Checkpoint

MODEL_FILE, REPORT_FILE = "model.safetensors", "quantize.json"


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
    tuned: Distilled[DSModel] | None = None  # what the brief fine-tune did, where there was one


def provenance(checkpoint: Checkpoint, options: QuantizeOptions, command: str, damage: Damage) -> dict[str, Any]:
    """What a model file notes of how it was made."""
    return {
        "source": str(checkpoint.path.resolve()),
        "source_sha256": checkpoint.sha256,
        "source_bytes": checkpoint.size_bytes,
        "dsconvert": VERSION,
        "command": command,
        "options": {
            **options.plain(),
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


def tuning_report(tuned: Distilled[Any]) -> dict[str, Any]:
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
        raise already_there(model)
    text = (json.dumps(quantize_report(result), indent=1) + "\n").encode()
    write_atomic(report, text, force=True)
    write_atomic(model, model_bytes(result.model), force)
    if report.read_bytes() != text:  # of a run at the same time, which now finds a model
        write_atomic(report, text, force=True)
    return model
