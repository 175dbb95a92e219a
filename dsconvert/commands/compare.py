"""dsconvert compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dsconvert.commands.shared import PATH, as_json, bars, console, print_json, say, table, tell, threads
from dsconvert.errors import InputError, LimitMissed
from dsconvert.evaluate.candidates import Candidate, load_candidates
from dsconvert.evaluate.compare import MATCHING, Agreement
from dsconvert.evaluate.compare import compare as measure
from dsconvert.evaluate.detect import DetectOptions
from dsconvert.pipeline import Progress
from dsconvert.yolo.images import Image, evaluation_images, read_image, spread


@click.command()
@click.argument("first", type=PATH, metavar="A")
@click.argument("second", type=PATH, metavar="B")
@click.argument("source", type=PATH, required=False)
@click.option("--data", type=PATH, help="data.yaml instead of SOURCE; its labels are not read.")
@click.option("--conf-thres", default=0.25, show_default=True, help="Least score of an object.")
@click.option("--iou-thres", default=0.45, show_default=True, help="Most overlap of two boxes of a class.")
@click.option("--imgsz", type=int, help="Side of the images, pixels (default: as exported).")
@click.option("--samples", type=click.IntRange(1), help="Most images used.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Exit with 3 if a smaller share of the objects matches.")  # fmt: skip
@threads
@as_json
def compare(
    first: Path, second: Path, source: Path | None, data: Path | None, conf_thres: float, iou_thres: float,
    imgsz: int | None, samples: int | None, min_agreement: float | None, threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure how far model B finds the objects that model A finds.

    A and B are .pt, .safetensors or .onnx files; SOURCE is an image, a folder
    of images, or a text file of paths. No labels are needed. Two boxes match
    when their class is the same and their IoU at least 0.5.

    \b
    Examples: dsconvert compare best.pt best.onnx photos/
              dsconvert compare best.pt best.onnx photos/ --min-agreement 0.9
    """
    if (source is None) == (data is None):
        raise InputError("Which images? Give either a SOURCE (a folder of images) or --data data.yaml.")
    options = DetectOptions(conf_thres, iou_thres)
    paths = evaluation_images(source or data or Path())
    paths = paths if samples is None else spread(paths, samples)
    a, b = load_candidates([first, second], imgsz)
    _check_classes(a, b)
    read: list[Path] = []
    skipped: list[str] = []
    with bars() as progress:
        images = _readable(paths, read, skipped, progress)
        result = measure(a.predict, b.predict, images, a.side, options)
    if skipped:
        say(f"Warning: {len(skipped)} images were left out; the first: {skipped[0]}")
    if as_json:
        print_json(_document(a, b, result, read, len(skipped)))
    else:
        _print(result, read, conf_thres)
    if min_agreement is not None and not result.share >= min_agreement:  # so that nan fails
        raise LimitMissed(
            f"{first} and {second} agree on {100 * result.share:.1f} % of the objects, "
            f"less than --min-agreement {min_agreement:g}."
        )


def _check_classes(a: Candidate, b: Candidate) -> None:
    """Raises InputError when the models cannot be meant to agree."""
    if a.names and b.names and len(a.names) != len(b.names):
        raise InputError(f"{a.path} has {len(a.names)} classes, {b.path} has {len(b.names)}; they cannot be compared.")
    if a.names and b.names and a.names != b.names:
        say("Warning: the models name their classes differently; class numbers are compared.")


def _readable(paths: Sequence[Path], read: list[Path], skipped: list[str], progress: Progress) -> Iterator[Image]:
    """The images that can be decoded; fills `read` with their paths and `skipped` with reasons."""
    for number, path in enumerate(paths, 1):
        try:
            image = read_image(path)
        except InputError as error:
            skipped.append(str(error))
        else:
            read.append(path)
            yield image
        progress("compare", number, len(paths))
    if not read:
        raise InputError(f"None of the {len(skipped)} images could be read; the first: {skipped[0]}")


def _document(a: Candidate, b: Candidate, result: Agreement, read: Sequence[Path], skipped: int) -> dict[str, Any]:
    return {
        "models": [str(a.path), str(b.path)], "imgsz": a.side, "images": len(read), "skipped": skipped,
        "matched": result.matched, "only_first": result.only_first, "only_second": result.only_second,
        "agreement": result.share, "mean_iou": result.mean_iou, "mean_confidence_shift": result.mean_shift,
        "largest_confidence_shift": result.largest_shift, "map50_95": result.map50_95,
        "files": [{"path": str(p), **asdict(i)} for p, i in zip(read, result.images, strict=True)],
    }  # fmt: skip


def _print(result: Agreement, read: Sequence[Path], confidence: float) -> None:
    rows = {
        "found by both": f"{result.matched} ({100 * result.share:.1f} %)",
        "only by A": str(result.only_first),
        "only by B": str(result.only_second),
        "mean IoU": _number(result.mean_iou, ".4f"),
        "mean confidence shift": _number(result.mean_shift, "+.4f"),
        "largest confidence shift": _number(result.largest_shift, "+.4f"),
        "mAP50-95 of B against A": _number(result.map50_95, ".4f"),
    }
    shown = table("objects", "")
    for name, value in rows.items():
        shown.add_row(name, value)
    console().print(shown)
    tell(
        f"{len(read)} images; objects above confidence {confidence:g}. Found by both: same class, IoU at least "
        f"{MATCHING:g}. Shift: B's confidence less A's."
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
