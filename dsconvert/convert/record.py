"""The record of a conversion: what the model file notes about its origin, and what quantize.json holds."""

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
    """A fitted model, and what its user should know about it."""

    model: DSModel
    images: int  # photographs that it was calibrated on
    views: int  # views of the photographs that were added because there are few
    synthesised: int  # synthesised images that were added because there are even fewer
    skipped: int  # files that could not be read
    sqnr_db: Mapping[str, float]  # signal-to-noise ratio of each layer's weight
    scores: ScoreShift  # scores of the float network and of the model, on some of the images
    map_drop: float | None = None  # points of mAP50-95 lost on held-back images, if a target was set
    skipped_reason: str = ""  # why the first file could not be read
    sameness: str = ""  # a warning if all images are the same
    tuned: Distilled[DSModel] | None = None  # the result of the brief fine-tune, if there was one


def provenance(checkpoint: Checkpoint, options: QuantizeOptions, command: str, damage: Damage) -> dict[str, Any]:
    """Return what a model file notes about how it was made."""
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
        # the expected damage of each width of each layer, which explains the chosen widths
        "damage": {
            name: {f"{w.bits}/{w.block_size}": float(f"{d:.4g}") for w, d in by_width.items()}
            for name, by_width in damage.items()
        },
    }


def quantize_report(result: Quantized) -> dict[str, Any]:
    """Return the content of quantize.json."""
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
    """Return what quantize.json holds about the brief fine-tune.

    `kept_step` is 0 if the fit was kept. `error_fell_by` is measured on the held-back images.
    """
    return {
        "kept_step": tuned.kept,
        "error_fell_by": tuned.gain,
        "standard_error": tuned.uncertainty,
        "error_of_activations": tuned.activations,
        "images_held_back": tuned.judges,
        "curve": [asdict(look) for look in tuned.curve],
    }


def layer_table(model: DSModel) -> list[dict[str, Any]]:
    """Return one row for each convolution.

    A row has name, shape, kind, bits, block size, bytes of the stored weight and of float32. It also has the expected
    damage of each number of bits at that block size, or None where widths were not allocated.
    """
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
    """Write quantize.json and the model file into a folder; return the model's path.

    Raises InputError when there is a model already and `force` is off. A report without a model was left by a run that
    was killed, and is replaced.
    """
    model, report = folder / MODEL_FILE, folder / REPORT_FILE
    if model.exists() and not force:
        raise already_there(model)
    text = (json.dumps(quantize_report(result), indent=1) + "\n").encode()
    write_atomic(report, text, force=True)
    write_atomic(model, model_bytes(result.model), force)
    # another run wrote it at the same time; that run will fail, as there is a model now
    if report.read_bytes() != text:
        write_atomic(report, text, force=True)
    return model
