"""The command `dsconvert compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dsconvert.base.errors import InputError, LimitMissed
from dsconvert.base.notes import so_far
from dsconvert.base.size import Size
from dsconvert.commands.imagesize import Sized, imgsz
from dsconvert.commands.inputs import chosen_input, input_options
from dsconvert.commands.shared import (
    PATH,
    as_json,
    bars,
    console,
    print_json,
    quiet,
    split_of,
    strict,
    table,
    tell,
    threads,
    verbose,
    warn,
)
from dsconvert.scoring.accuracy import CONFIDENT
from dsconvert.scoring.compare import MATCHING, Agreement
from dsconvert.scoring.detect import DetectOptions
from dsconvert.scoring.photos import Compared, compare_files, left_out


@click.command(cls=Sized)
@click.argument("first", type=PATH, metavar="A")
@click.argument("second", type=PATH, metavar="B")
@click.argument("source", type=PATH, required=False)
@click.option("--data", type=PATH, help="data.yaml instead of SOURCE; its labels are not read.")
@click.option("--conf-thres", default=0.25, show_default=True, help="Lowest score of an object.")
@click.option("--iou-thres", default=0.45, show_default=True, help="Largest overlap of two boxes of a class.")
@imgsz("Size of the images: 640, or 384 640 (height, width) (default: as exported)")
@click.option("--samples", type=click.IntRange(1), help="Most images used.")
@split_of("val")
@strict
@click.option("--min-agreement", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Exit with 3 if a smaller share of the objects match.")  # fmt: skip
@input_options
@threads
@quiet
@verbose("list what is found in each image")
@as_json
def compare(
    first: Path, second: Path, source: Path | None, data: Path | None, conf_thres: float, iou_thres: float,
    imgsz: Size | None, samples: int | None, split: str | None, strict: bool, min_agreement: float | None,
    threads: int, quiet: bool, verbose: bool, as_json: bool, **wanted: Any,
) -> None:  # fmt: skip
    """Measure how far models A and B find the same objects.

    A and B are .pt, .safetensors or .onnx files; SOURCE is an image, a folder of images, or a text file of paths. No
    labels are needed. Two boxes match if they have the same class and an IoU of at least 0.5. ONNX files whose outputs
    are not boxes are compared output by output.

    \b
    Examples: dsconvert compare best.pt best.onnx photos/
              dsconvert compare best.pt best.onnx photos/ --min-agreement 0.9
    """
    if (source is None) == (data is None):
        raise InputError(
            "compare needs one set of images: give either a SOURCE (a folder of images) or --data data.yaml."
        )
    options, preset = DetectOptions(conf_thres, iou_thres), chosen_input(wanted)
    with bars(quiet) as progress:
        found = compare_files(
            first, second, source or data or Path(), options, imgsz, samples, progress, split, strict, preset
        )
    if found.agreement is None:
        _show_outputs(found, as_json, quiet, min_agreement)
        return
    result = found.agreement
    if found.names_differ:
        warn("the models name their classes differently; class numbers are compared.")
    if found.skipped:
        warn(left_out(found.skipped))
    if shifted := result.scores.warning("A", "B"):
        warn(shifted)
    if as_json:
        print_json(_document(found, result))
    else:
        if verbose:
            for path, i in zip(found.read, result.images, strict=True):
                tell(f"{path}: {i.matched} by both, {i.only_first} only by A, {i.only_second} only by B")
        _print(result)
        if not quiet:
            _explain(result, found.read, conf_thres)
    if min_agreement is not None and not result.share >= min_agreement:  # written so that NaN fails
        raise LimitMissed(
            f"{first} and {second} agree on {100 * result.share:.1f} % of the objects, "
            f"less than --min-agreement {min_agreement:g}."
        )


def _show_outputs(found: Compared, as_json: bool, quiet: bool, min_agreement: float | None) -> None:
    """Print the comparison of files whose outputs are not boxes."""
    if min_agreement is not None:
        raise InputError(
            f"{found.first.path} gives no boxes that can be read, so --min-agreement cannot be checked; "
            "give --input if it belongs to a known family."
        )
    if found.skipped:
        warn(left_out(found.skipped))
    if as_json:
        print_json({
            "models": [str(found.first.path), str(found.second.path)], "imgsz": found.first.imgsz.json,
            "images": len(found.read), "skipped": len(found.skipped),
            "outputs": [asdict(o) for o in found.outputs], "warnings": so_far(),
        })  # fmt: skip
        return
    shown = table("output", "shape", "relative error", "cosine")
    for number, o in enumerate(found.outputs):
        shown.add_row(
            str(number), "x".join(map(str, o.shape)), _number(o.relative_error, ".4f"), _number(o.cosine, ".5f")
        )
    console().print(shown)
    if not quiet:
        tell(
            f"{len(found.read)} images. The outputs are not boxes that can be read, so they are compared as they are. "
            "Relative error: root of the squared difference over A's squares. Cosine: of the angle between both."
        )


def _document(found: Compared, result: Agreement) -> dict[str, Any]:
    return {
        "models": [str(found.first.path), str(found.second.path)], "imgsz": found.first.imgsz.json,
        "images": len(found.read), "skipped": len(found.skipped),
        "matched": result.matched, "only_first": result.only_first, "only_second": result.only_second,
        "agreement": result.share, "mean_iou": result.mean_iou, "mean_confidence_shift": result.mean_shift,
        "largest_confidence_shift": result.largest_shift, "map50_95": result.map50_95,
        "mean_best_score_first": result.scores.first_best, "mean_best_score_second": result.scores.second_best,
        "confident_boxes_first": result.scores.first_boxes, "confident_boxes_second": result.scores.second_boxes,
        "files": [{"path": str(p), **asdict(i)} for p, i in zip(found.read, result.images, strict=True)],
        "warnings": so_far(),
    }  # fmt: skip


def _print(result: Agreement) -> None:
    rows = {
        "found by both": f"{result.matched} ({100 * result.share:.1f} %)",
        "only by A": str(result.only_first),
        "only by B": str(result.only_second),
        "mean IoU": _number(result.mean_iou, ".4f"),
        "mean confidence shift": _number(result.mean_shift, "+.4f"),
        "largest confidence shift": _number(result.largest_shift, "+.4f"),
        "mAP50-95 of B against A": _number(result.map50_95, ".4f"),
        "best score of an image, mean": f"{result.scores.first_best:.4f} A, {result.scores.second_best:.4f} B",
        f"boxes above {CONFIDENT:g}": f"{result.scores.first_boxes} A, {result.scores.second_boxes} B",
    }
    shown = table("objects", "")
    for name, value in rows.items():
        shown.add_row(name, value)
    console().print(shown)


def _explain(result: Agreement, read: Sequence[Path], confidence: float) -> None:
    tell(
        f"{len(read)} images; objects above confidence {confidence:g}. Found by both: same class, IoU at least "
        f"{MATCHING:g}. Shift: B's confidence minus A's."
    )
    apart = sorted(
        zip(result.images, read, strict=True), key=lambda pair: pair[0].only_first + pair[0].only_second, reverse=True
    )
    worst = [f"{p} ({i.only_first} only by A, {i.only_second} only by B)" for i, p in apart[:3]
             if i.only_first + i.only_second]  # fmt: skip
    if worst:
        tell(f"They differ most in {', '.join(worst)}.")


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
