"""The command `dsconvert eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsconvert.base import notes, workers
from dsconvert.base.errors import InputError, LimitMissed
from dsconvert.base.size import Size
from dsconvert.commands.imagesize import Sized, imgsz
from dsconvert.commands.inputs import chosen_input, input_options
from dsconvert.commands.shared import (
    PATH,
    RUNS,
    as_json,
    bars,
    cell,
    console,
    print_json,
    quiet,
    say,
    short,
    split_of,
    strict,
    table,
    tell,
    threads,
    verbose,
    warn,
)
from dsconvert.convert import exporting
from dsconvert.convert.origin import known_images, known_source
from dsconvert.model.file import load_model
from dsconvert.photos.dataset import is_data_yaml
from dsconvert.scoring import contest
from dsconvert.scoring.accuracy import OVERLAP, VAL_OVERLAP, most_overlap
from dsconvert.scoring.candidates import Candidate
from dsconvert.scoring.coco import Metrics
from dsconvert.scoring.detect import class_name
from dsconvert.yolo.boxes import LEAST

ACCURACY = ("map50_95", "map50", "precision", "recall")


@click.command("eval", cls=Sized, short_help="Measure accuracy, size and latency of each MODEL.")
@click.argument("models", type=PATH, nargs=-1, metavar="[MODEL]...")
@click.option("--data", type=PATH, help="data.yaml with labels, or a folder of images without labels.")
@imgsz("Size of the images: 640, or 384 640 (height, width) (default: as exported)")
@click.option("--samples", type=click.IntRange(1), help="Most images used.")
@split_of("val")
@strict
@click.option("--conf-thres", default=LEAST, show_default=True, help="Boxes with a score up to this are ignored.")
@click.option("--iou-thres", type=float, help=f"Largest overlap of two boxes of a class (default: {VAL_OVERLAP:g} with "
              f"labels, {OVERLAP:g} without).")  # fmt: skip
@click.option("--max-map-drop", type=click.FloatRange(0, 100), metavar="POINTS",
              help="Exit with 3 if a model loses more mAP50-95 than this against the first.")  # fmt: skip
@input_options
@threads
@quiet
@verbose("show the average precision of each class")
@as_json
def evaluate(
    models: tuple[Path, ...], data: Path | None, imgsz: Size | None, samples: int | None, split: str | None,
    strict: bool, conf_thres: float, iou_thres: float | None, max_map_drop: float | None, threads: int, quiet: bool,
    verbose: bool, as_json: bool, **wanted: Any,
) -> None:  # fmt: skip
    """Measure accuracy, size and latency of each MODEL on labelled images.

    MODEL is a .pt, .safetensors or .onnx file; by default the newest quantize result and its checkpoint. All latencies
    are measured in ONNX Runtime. --data defaults to the calibration data. Without labels (a folder), the truth is what
    the first model finds, and the others' rows are agreement.

    \b
    Examples: dsconvert eval best.pt best.onnx --data data.yaml
              dsconvert eval best.pt best.onnx --data data.yaml --max-map-drop 0.5
    """
    if not (0 <= conf_thres < 1 and (iou_thres is None or 0 <= iou_thres <= 1)):
        raise InputError("--conf-thres must lie in 0..1 (below 1), and --iou-thres in 0..1.")
    paths, preset = list(models), chosen_input(wanted)
    if not paths or data is None:
        newest = exporting.newest_result(RUNS)
        provenance = load_model(newest).provenance
        paths = paths or [known_source(provenance, newest, "name the models: dsconvert eval CHECKPOINT MODEL"), newest]
        if data is None:
            data = known_images(provenance, newest)
            if not is_data_yaml(data):
                notes.note(f"Measured on {data}, the calibration images; give --data other images.")
    if max_map_drop is not None and len(paths) < 2:
        raise InputError("--max-map-drop measures the drop against the first model; name another one too.")
    workers.start()
    if workers.number():  # one process prints for all
        contest.look(contest.entrants(paths, data, imgsz, samples, split, strict, conf_thres, iou_thres, preset))
        return
    with bars(quiet) as progress:
        rows = contest.evaluate(paths, data, imgsz, samples, progress, split, strict, conf_thres, iou_thres, preset)
    for r in rows:
        if r.candidate.batch > 1:
            say(f"{short(r.candidate.path)} takes {r.candidate.batch} images at once; its ms is for all of them.")
    if as_json:
        print_json({
            "models": [_row(r) for r in rows], "data": str(data), "split": rows[0].split, "conf_thres": conf_thres,
            "iou_thres": most_overlap(iou_thres, is_data_yaml(data)), "warnings": notes.so_far(),
        })  # fmt: skip
    else:
        if verbose and rows[0].metrics:
            _print_classes(rows)
        _print_evaluation(rows, quiet)
    if rows[0].metrics is None:
        warn(contest.nothing_found(paths[0], conf_thres))
    if max_map_drop is not None:
        _hold(rows, max_map_drop)


def _hold(rows: list[contest.Evaluated], most: float) -> None:
    """Raise LimitMissed, naming every model that loses more than `most` points against the first."""
    measured = [(r.candidate.path, r.metrics.map50_95) for r in rows if r.metrics]
    if not measured:
        raise InputError("--max-map-drop cannot be checked on images in which nothing is found.")
    first = measured[0][1]
    drops = [(path, 100 * (first - value)) for path, value in measured[1:]]
    # 1e-7 points allow for the rounding of binary fractions
    missed = [f"{path} loses {drop:.2f} points" for path, drop in drops if not drop <= most + 1e-7]
    if missed:
        against = f"of mAP50-95 against {rows[0].candidate.path}"
        raise LimitMissed(f"{' and '.join(missed)} {against}, more than --max-map-drop {most:g}.")


def _row(r: contest.Evaluated) -> dict[str, Any]:
    c, m, t = r.candidate, r.metrics, r.latency
    accuracy = {"map50_95": m.map50_95, "map50": m.map50, "precision": m.precision, "recall": m.recall} if m else {}
    return {
        "path": str(c.path), "format": c.format, **(accuracy or dict.fromkeys(ACCURACY)),
        "size_bytes": c.size_bytes, "weight_bits": c.weight_bits,
        "latency_ms": {"median": t.median_ms, "min": t.min_ms, "spread": t.spread_ms}, "images": r.images,
        "skipped": len(r.skipped),
        **({} if m is None or m.mask_map50 is None else {
            "mask_map50_95": m.mask_map50_95, "mask_map50": m.mask_map50,
            "mask_precision": m.mask_precision, "mask_recall": m.mask_recall,
        }),
    }  # fmt: skip


def _print_classes(rows: list[contest.Evaluated]) -> None:
    """Print AP50-95 of each class in the images, by model."""
    shown = table("AP50-95", *(short(r.candidate.path) for r in rows))
    names = next((r.candidate.names for r in rows if r.candidate.names), ())
    measured = [r.metrics.per_class for r in rows if r.metrics]
    for number in sorted(measured[0]):
        shown.add_row(cell(class_name(number, names)), *(f"{per_class[number]:.4f}" for per_class in measured))
    console().print(shown)


def _print_evaluation(rows: list[contest.Evaluated], quiet: bool) -> None:
    masks = any(r.metrics and r.metrics.mask_map50 is not None for r in rows)
    of_masks = ("masks 50-95", "50", "P", "R") if masks else ()
    shown = table("model", "mAP50-95", "mAP50", "P", "R", *of_masks, "MB", "bits", "ms", "±")
    for r in rows:
        t, c = r.latency, r.candidate
        shown.add_row(
            cell(short(c.path)), *_accuracy(r.metrics, masks),
            f"{c.size_bytes / 1e6:.2f}", _bits(c), f"{t.median_ms:.1f}", f"{t.spread_ms:.1f}",
        )  # fmt: skip
    console().print(shown)
    if quiet:
        return
    first = rows[0]
    tell(
        f"{first.images} images. bits: stored bits a weight. ms: median of {first.latency.runs} interleaved ONNX "
        "Runtime runs; ±: interquartile range."
    )
    if first.skipped:
        say(f"{len(first.skipped)} images could not be read and were left out; the first: {first.skipped[0]}")


def _accuracy(m: Metrics | None, masks: bool) -> list[str]:
    """Return a model's cells, empty where nothing was measured."""
    if m is None:
        return [""] * (8 if masks else 4)
    boxes = (m.map50_95, m.map50, m.precision, m.recall)
    of_masks = (m.mask_map50_95, m.mask_map50, m.mask_precision, m.mask_recall) if masks else ()
    return [_or_none(value, digits) for value, digits in zip((*boxes, *of_masks), (4, 4, 3, 3) * 2, strict=False)]


def _or_none(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _bits(c: Candidate) -> str:
    return f"{c.weight_bits:.2f}"
