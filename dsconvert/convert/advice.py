"""Warn about what is unusual in a conversion, and say what its user can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dsconvert.base.text import Sentence
from dsconvert.convert.division import HELD_BACK
from dsconvert.convert.record import Quantized, layer_table, quantize_report
from dsconvert.graph.grids import QParams
from dsconvert.model.model import DSModel

FEW_IMAGES = 32
LARGE_SHARE = 0.3  # of the expected damage, in one layer; in yolov5n on COCO the largest share is 0.11
LOW_SQNR_DB = 10.0  # below this the rounding noise has over a tenth of the weights' power
# times the median range: 4 of a layer's 8 bits are lost; in yolov5n on COCO the widest is 9 times the median
WIDE = 16.0


def advice(result: Quantized, available: int) -> list[str]:
    """Return warnings, the most important first; none if all is as usual.

    available: how many calibration images there were; 0 if they were synthesised.
    """
    options = result.model.provenance["options"]
    rows = quantize_report(result)["layers"]
    worst = _largest_error(rows, options) if options["bits"] else _largest_damage(rows, options)
    shifted = result.scores.warning("the float model", "the converted one")
    return [
        *([result.sameness] if result.sameness else []), *([shifted[:1].upper() + shifted[1:]] if shifted else []),
        *_few_images(result, options, available), *worst, *_wide_ranges(result.model.activations),
    ]  # fmt: skip


def bits_of_layers(model: DSModel) -> str:
    """Say how many DSConv layers have how many bits, such as `10 with 3 bits, 22 with 4 bits`."""
    widths = [row["bits"] for row in layer_table(model) if row["kind"] == "DSConv"]
    return ", ".join(f"{widths.count(bits)} with {bits} bits" for bits in sorted(set(widths))) or "none"


def _few_images(result: Quantized, options: Mapping[str, Any], available: int) -> list[str]:
    """Warn about few calibration images."""
    if not available or result.images >= FEW_IMAGES:
        return []
    read = result.images + result.skipped
    if options["target_drop"] is not None:
        read += min(available, options["samples"]) // HELD_BACK
    used = f"Only {result.images} calibration images were used, so the weights may fit other images badly;"
    if available <= read:
        return [Sentence(f"{used} give {{images}} about 100 photos of what the model will see (no labels needed).")]
    return [Sentence(f"{used} leave out {{samples}} {options['samples']}.")]


def _largest_damage(rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[str]:
    """Warn about a layer that is expected to do a large part of the damage, unless it has 8 bits already."""
    damages = {row["name"]: (row["damage"][str(row["bits"])], row["bits"]) for row in rows if row["damage"]}
    total = sum(damage for damage, _ in damages.values())
    name, (damage, bits) = max(damages.items(), key=lambda item: item[1][0], default=("", (0.0, 8)))
    # there is no damage at all where nothing reaches the detections
    if bits == 8 or not damage or damage < LARGE_SHARE * total:
        return []
    remedy = Sentence("a {target_size} above this file's size")
    if options["target_bytes"]:
        remedy = Sentence("a {target_size} above {:.2f}MB", options["target_bytes"] / 1e6)
    elif options["target_drop"] is not None:
        remedy = Sentence("a {target_map_drop} below {:g}", options["target_drop"])
    sentence = "{}, at {} bits, is expected to cause {:.0f} % of the loss; {} gives it more bits."
    return [Sentence(sentence, name, bits, 100 * damage / total, remedy)]


def _largest_error(rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[str]:
    """Warn about the layer with the largest weight error, if it is large; damage is not measured with one width for
    all.
    """
    row = min(rows, key=lambda r: r["sqnr_db"])
    if row["sqnr_db"] >= LOW_SQNR_DB or row["bits"] == 8:
        return []
    sentence = (
        "{} loses most: at {} bits its weights are only {:.1f} dB above their rounding error; leave out {bits} {}, and "
        "layers that matter get more bits, or give more bits to all."
    )
    return [Sentence(sentence, row["name"], row["bits"], row["sqnr_db"], options["bits"])]


def _wide_ranges(grids: Mapping[str, QParams]) -> list[str]:
    """Warn about values whose int8 steps are far coarser than in other layers."""
    usual = median(g.scale for g in grids.values()) if grids else 0.0
    wide = sorted((n for n, g in grids.items() if g.scale > WIDE * usual), key=lambda n: -grids[n].scale)
    if not wide:
        return []
    name, scale = wide[0].removesuffix(".conv"), grids[wide[0]].scale
    others = f" (and of {len(wide) - 1} other layers)" if len(wide) > 1 else ""
    sentence = (
        "The values of {}{} span {:.4g}, {:.0f} times the usual range in this model, so their int8 steps are coarse. "
        "If accuracy disappoints, try {activations} float, and check that {images} holds photos of what the "
        "model will see."
    )
    return [Sentence(sentence, name, others, 255 * scale, scale / usual)]
