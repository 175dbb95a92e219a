"""What a conversion's own figures say is unusual about it, and what its owner can do."""

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
LARGE_SHARE = 0.3  # of the expected damage, in one layer; in the yolov5n of COCO the largest is 0.11
LOW_SQNR_DB = 10.0  # the noise has a tenth of the weights' power
WIDE = 16.0  # times the median range: 4 of a layer's 8 bits are gone; in the yolov5n of COCO the widest is 9


def advice(result: Quantized, available: int) -> list[str]:
    """Sentences, the most important first; empty when all is as usual. `available` is the number of calibration
    images that there were (0: none, they were synthesised)."""
    options = result.model.provenance["options"]
    rows = quantize_report(result)["layers"]
    worst = _largest_error(rows, options) if options["bits"] else _largest_damage(rows, options)
    shifted = result.scores.warning("the float model", "the converted one")
    return [
        *([result.sameness] if result.sameness else []), *([shifted[:1].upper() + shifted[1:]] if shifted else []),
        *_few_images(result, options, available), *worst, *_wide_ranges(result.model.activations),
    ]  # fmt: skip


def bits_of_layers(model: DSModel) -> str:
    """How many DSConv layers have how many bits, such as `10 with 3 bits, 22 with 4 bits`."""
    widths = [row["bits"] for row in layer_table(model) if row["kind"] == "DSConv"]
    return ", ".join(f"{widths.count(bits)} with {bits} bits" for bits in sorted(set(widths))) or "none"


def _few_images(result: Quantized, options: Mapping[str, Any], available: int) -> list[str]:
    if not available or result.images >= FEW_IMAGES:
        return []
    read = result.images + result.skipped
    if options["target_drop"] is not None:
        read += min(available, options["samples"]) // HELD_BACK
    used = f"Only {result.images} calibration images were used, so the weights fit little else;"
    if available <= read:
        return [
            Sentence(f"{used} give {{images}} about 100 photos like those that the model will see (no labels needed).")
        ]
    return [Sentence(f"{used} leave out {{samples}} {options['samples']}.")]


def _largest_damage(rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[str]:
    """The layer expected to do most of the damage, if it does a lot; at 8 bits there is nothing to be done."""
    damages = {row["name"]: (row["damage"][str(row["bits"])], row["bits"]) for row in rows if row["damage"]}
    total = sum(damage for damage, _ in damages.values())
    name, (damage, bits) = max(damages.items(), key=lambda item: item[1][0], default=("", (0.0, 8)))
    if bits == 8 or not damage or damage < LARGE_SHARE * total:  # none at all where nothing reaches the detections
        return []
    remedy = Sentence("a {target_size} above this file's size")
    if options["target_bytes"]:
        remedy = Sentence("a {target_size} above {:.2f}MB", options["target_bytes"] / 1e6)
    elif options["target_drop"] is not None:
        remedy = Sentence("a {target_map_drop} below {:g}", options["target_drop"])
    sentence = "{}, at {} bits, hurts most: {:.0f} % of the expected damage; {} gives it more bits."
    return [Sentence(sentence, name, bits, 100 * damage / total, remedy)]


def _largest_error(rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[str]:
    """With one width for all, damage was not measured: the layer with the largest weight error, if it is large."""
    row = min(rows, key=lambda r: r["sqnr_db"])
    if row["sqnr_db"] >= LOW_SQNR_DB or row["bits"] == 8:
        return []
    sentence = (
        "{} hurts most: at {} bits its weights are only {:.1f} dB above their error; leave out {bits} {}, and layers "
        "that matter get more bits, or give more bits to all."
    )
    return [Sentence(sentence, row["name"], row["bits"], row["sqnr_db"], options["bits"])]


def _wide_ranges(grids: Mapping[str, QParams]) -> list[str]:
    """Values whose int8 steps are far coarser than the other layers'."""
    usual = median(g.scale for g in grids.values()) if grids else 0.0
    wide = sorted((n for n, g in grids.items() if g.scale > WIDE * usual), key=lambda n: -grids[n].scale)
    if not wide:
        return []
    name, scale = wide[0].removesuffix(".conv"), grids[wide[0]].scale
    others = f" (and {len(wide) - 1} other layers')" if len(wide) > 1 else ""
    sentence = (
        "{}'s values{} span {:.4g}, {:.0f} times the usual range in this model, so int8 steps are coarse there; if "
        "accuracy disappoints, see what {activations} float gives, and check that {images} holds photos like those "
        "that the model will see."
    )
    return [Sentence(sentence, name, others, 255 * scale, scale / usual)]
