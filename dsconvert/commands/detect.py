"""dsconvert detect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import click
import numpy as np

from dsconvert.commands.shared import PATH, as_json, bars, force, print_json, quiet, tell, threads, verbose, warn
from dsconvert.errors import InputError
from dsconvert.evaluate.candidates import Candidate, load_candidate
from dsconvert.evaluate.detect import (
    DetectOptions,
    Found,
    class_name,
    class_numbers,
    coco_document,
    counts,
    draw,
    encoded,
    label_names,
    names_below,
    picture_name,
    yolo_lines,
)
from dsconvert.evaluate.masks import PlacedMask
from dsconvert.evaluate.photos import Skipped, detect_files, left_out, photo_paths
from dsconvert.files import free_folder, write_atomic
from dsconvert.notes import so_far
from dsconvert.yolo.images import Image

FOLDER = Path("runs/detect/exp")
DOCUMENT = "detections.json"


@click.command()
@click.argument("model", type=PATH)
@click.argument("sources", type=PATH, nargs=-1, required=True, metavar="SOURCE...")
@click.option("--conf-thres", default=0.25, show_default=True, help="Least score of an object.")
@click.option("--iou-thres", default=0.45, show_default=True, help="Most overlap of two boxes of a class.")
@click.option("--max-det", default=1000, show_default=True, help="Most objects an image.")
@click.option("--classes", multiple=True, help="Only these: numbers or names, such as 0,2 or person.")
@click.option("--agnostic-nms", is_flag=True, help="Boxes of different classes suppress each other too.")
@click.option("--imgsz", "--img", "--img-size", type=int, help="Side of the input, pixels (default: as exported).")
@click.option("--save-txt", is_flag=True, help="Write labels/NAME.txt in YOLO format (of masks: polygons).")
@click.option("--save-conf", is_flag=True, help="With --save-txt: the score at the end of each line.")
@click.option("--save-json", is_flag=True, help=f"Write {DOCUMENT}, one COCO document.")
@click.option("--nosave", is_flag=True, help="Write no images.")
@click.option("--line-thickness", type=click.IntRange(1, 100), default=3, show_default=True, help="Pixels.")
@click.option("--hide-labels", is_flag=True, help="Draw boxes only.")
@click.option("--hide-conf", is_flag=True, help="Draw no scores.")
@click.option("--out", type=PATH, help=f"Folder to write (default: {FOLDER}, exp2, ...).")
@force
@threads
@quiet
@verbose("list what is found in each image")
@as_json
def detect(
    model: Path, sources: tuple[Path, ...], conf_thres: float, iou_thres: float, max_det: int,
    classes: tuple[str, ...], agnostic_nms: bool, imgsz: int | None, save_txt: bool, save_conf: bool, save_json: bool,
    nosave: bool, line_thickness: int, hide_labels: bool, hide_conf: bool, out: Path | None, force: bool,
    threads: int, quiet: bool, verbose: bool, as_json: bool,
) -> None:  # fmt: skip
    """Find objects in images and draw them.

    MODEL is a .pt, .safetensors or .onnx file. SOURCE is an image, a folder of
    images, or a text file of paths. Options and defaults are those of YOLOv5's
    detect.py.

    \b
    Examples: dsconvert detect best.onnx photos/
              dsconvert detect best.pt a.jpg b.jpg --save-txt --classes person
    """
    if save_conf and not save_txt:
        raise InputError("--save-conf adds scores to what --save-txt writes; give --save-txt too.")
    DetectOptions(conf_thres, iou_thres, max_det)  # before anything is loaded
    paths = photo_paths(sources)
    candidate = load_candidate(model, imgsz)
    options = DetectOptions(conf_thres, iou_thres, max_det, class_numbers(classes, candidate.names), agnostic_nms)
    if candidate.limits and (kept := options.beyond(candidate.limits)):
        warn(f"{model} suppresses boxes itself, and keeps only those within {kept}; "
            "to find more, export it again without --nms.")  # fmt: skip
    folder = out or free_folder(FOLDER)
    names = names_below(paths)
    jobs = _jobs(paths, names, folder, not nosave, save_txt)
    document = folder / DOCUMENT if save_json else None
    if not force:
        _refuse_to_overwrite([t for j in jobs for t in (j.picture, j.label)] + [document])

    def save(job: _Job, image: Image, found: Found, masks: Sequence[PlacedMask] | None) -> None:
        if job.picture:
            drawn = draw(image, found, candidate.names, line_thickness, not hide_labels, not hide_conf, masks)
            write_atomic(job.picture, encoded(drawn, job.picture.suffix), force)
        if job.label:
            write_atomic(job.label, yolo_lines(found, image.shape[:2], save_conf, masks).encode(), force)

    finished: list[_Finished] = []
    skipped: list[Skipped] = []
    outlines: list[list[list[float]]] = []
    by_path = {job.source: job for job in jobs}
    with bars(quiet) as progress:
        for path, image, found, masks in detect_files(candidate, paths, options, skipped, progress):
            save(by_path[path], image, found, masks)
            finished.append(_Finished(by_path[path], found.tobytes(), image.shape[:2]))
            if document and masks is not None:
                outlines.append([mask.polygon().flatten().tolist() for mask in masks])
    if document:
        shapes, founds = [f.shape for f in finished], [f.found for f in finished]
        content = coco_document([f.job.name for f in finished], shapes, founds, candidate.names, outlines)
        write_atomic(document, (json.dumps(content, indent=1) + "\n").encode(), force)
    if skipped:
        warn(left_out(skipped))
    if as_json:
        print_json(_summary(candidate, folder, finished, skipped, document))
        return
    if verbose:
        for f in finished:
            tell(f"{f.job.source}: {_kinds([f], candidate.names) or 'nothing'}")
    if not quiet or nosave:
        kinds = _kinds(finished, candidate.names)
        total = sum(len(f.found) for f in finished)
        tell(f"Found {total} objects in {len(finished)} images" + (f": {kinds}." if kinds else "."))
    for what, there in (
        (f"{len(finished)} images", not nosave and folder), ("labels", save_txt and folder / "labels"),
        ("all of it as COCO", document),
    ):  # fmt: skip
        if there:
            tell(str(there) if quiet else f"Wrote {what}: {there}")


@dataclass(frozen=True)
class _Job:
    """An image, its name among the others, and the files to write for it."""

    source: Path
    name: str
    picture: Path | None
    label: Path | None


@dataclass(frozen=True)
class _Finished:
    """An image's objects, in pixels, as bytes; its height and width.

    Bytes, because Python keeps them apart from arrays: a small array kept for every image lies in the middle of what
    the image's large arrays leave free, and 40 kB an image could not be used again."""

    job: _Job
    packed: bytes
    shape: tuple[int, int]

    @property
    def found(self) -> Found:
        """(n, 6), see `detect.Found`."""
        return np.frombuffer(self.packed, np.float32).reshape(-1, 6)


def _jobs(paths: Sequence[Path], names: Sequence[PurePath], folder: Path, pictures: bool, labels: bool) -> list[_Job]:
    return [
        _Job(path, name.as_posix(), folder / picture_name(name) if pictures else None,
             folder / "labels" / label if labels else None)
        for path, name, label in zip(paths, names, label_names(names), strict=True)
    ]  # fmt: skip


def _refuse_to_overwrite(targets: Sequence[Path | None]) -> None:
    """Before any work is done, as some of the files would be written before the first that is there."""
    for target in targets:
        if target is not None and target.exists():
            raise InputError(f"{target} already exists; give --force to replace it, or another --out.")


def _summary(
    candidate: Candidate, folder: Path, finished: Sequence[_Finished], skipped: Sequence[Skipped],
    document: Path | None,
) -> dict[str, Any]:  # fmt: skip
    by_class = counts([f.found for f in finished])
    return {
        "model": str(candidate.path), "imgsz": candidate.side, "out": str(folder),
        "images": len(finished), "detections": sum(by_class.values()),
        "classes": [{"class": c, "name": class_name(c, candidate.names), "detections": n} for c, n in by_class.items()],
        "files": [
            {"path": str(f.job.source), "detections": len(f.found), "image": f.job.picture and str(f.job.picture),
             "labels": f.job.label and str(f.job.label)}
            for f in finished
        ],
        "coco": document and str(document),
        "warnings": so_far(),
        "skipped": [{"path": str(s.path), "reason": s.reason} for s in skipped],
    }  # fmt: skip


def _kinds(finished: Sequence[_Finished], names: Sequence[str]) -> str:
    """Such as `7 person, 2 dog`; the ten most frequent."""
    by_class = counts([f.found for f in finished])
    kinds = [f"{n} {class_name(c, names)}" for c, n in by_class.items()]
    return ", ".join(kinds[:10]) + (f" and {len(kinds) - 10} other classes" if len(kinds) > 10 else "")
