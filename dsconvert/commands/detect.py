"""The command `dsconvert detect`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.files import refuse_inputs, write_atomic
from dsconvert.base.notes import so_far
from dsconvert.base.size import Size
from dsconvert.commands.folders import run_folder
from dsconvert.commands.imagesize import Sized, imgsz
from dsconvert.commands.inputs import INPUT_OPTIONS, chosen_input, input_options
from dsconvert.commands.shared import (
    PATH,
    as_json,
    bars,
    device,
    force,
    in_options,
    print_json,
    quiet,
    tell,
    threads,
    verbose,
    warn,
)
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.detect import DetectOptions, class_name, class_numbers
from dsconvert.scoring.media import Gathered, Looked, Run
from dsconvert.scoring.photos import left_out
from dsconvert.scoring.saving import CROPS, LABELS, SaveOptions, Saver, check_jobs, jobs_of
from dsconvert.scoring.sources import Sources, find_sources
from dsconvert.scoring.video import live_name

PROJECT, NAME = Path("runs/detect"), "exp"
DOCUMENT = "detections.json"


class _Detect(Sized):
    """A command whose --classes takes several words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, after `spread_classes`."""
        return super().parse_args(ctx, spread_classes(self.joined(args), self.with_value()))


def spread_classes(args: Sequence[str], with_value: set[str]) -> list[str]:
    """Rewrite `--classes 0 2` as `--classes 0 --classes 2`, with all words up to the next option.

    Words that are not numbers are taken only if model and source come before, as they may be these.
    """
    spread: list[str] = []
    rest = list(args)
    words, has_source = 0, any(a.partition("=")[0] == "--source" for a in args)
    while rest:
        word = rest.pop(0)
        spread.append(word)
        if word == "--":
            return spread + rest
        name, joined, _ = word.partition("=")
        if not word.startswith("-") or word == "-":
            words += 1
        elif name in with_value and not joined and rest:
            spread.append(rest.pop(0))
        if name == "--classes":
            while rest and not rest[0].startswith("-") and (_is_number(rest[0]) or words > 1 - has_source):
                spread += ["--classes", rest.pop(0)]
    return spread


def _is_number(word: str) -> bool:
    return all(part.strip().isdecimal() for part in word.split(","))


def _no_windows(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        raise InputError("--view-img is not possible, as dsconvert's OpenCV opens no windows; look at the files that "
                         "are written.")  # fmt: skip


@click.command(cls=_Detect)
@click.argument("model", type=PATH)
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("--source", "more", multiple=True, metavar="SOURCE", help="The same as SOURCE.")
@click.option("--conf-thres", default=0.25, show_default=True, help="Lowest score of an object.")
@click.option("--iou-thres", default=0.45, show_default=True, help="Largest overlap of two boxes of a class.")
@click.option("--max-det", default=1000, show_default=True, help="Most objects in an image.")
@click.option("--classes", multiple=True, metavar="CLASS...",
              help="Only these classes, by number or name: 0 2, 0,2 or person.")  # fmt: skip
@click.option("--agnostic-nms", is_flag=True, help="Let boxes of different classes suppress each other too.")
@imgsz("Size of the input: 640, or 384 640 (height, width) (default: as exported)", "--img", "--img-size")
@click.option("--half", is_flag=True, help="Require a MODEL with float16 input (export --half-input).")
@click.option("--vid-stride", type=click.IntRange(1, 100_000), default=1, show_default=True,
              help="Look only at every so many frames of a video.")  # fmt: skip
@click.option("--save-txt", is_flag=True, help="Write labels/NAME.txt in YOLO format (polygons for masks).")
@click.option("--save-conf", is_flag=True, help="Add the score to each line of --save-txt.")
@click.option("--save-crop", is_flag=True, help="Write each object's part of the image to crops/CLASS/NAME.jpg.")
@click.option("--save-json", is_flag=True, help=f"Write {DOCUMENT}, one COCO document.")
@click.option("--nosave", is_flag=True, help="Write no drawn images and videos.")
@click.option("--line-thickness", type=click.IntRange(1, 100), default=3, show_default=True,
              help="Thickness of boxes in pixels.")  # fmt: skip
@click.option("--hide-labels", is_flag=True, help="Draw boxes without labels.")
@click.option("--hide-conf", is_flag=True, help="Draw labels without scores.")
@click.option("--project", type=PATH, metavar="FOLDER", help=f"Parent of the result's folder (default: {PROJECT}).")
@click.option("--name", metavar="NAME", help=f"Name of the result's folder; if taken, with a number (default: {NAME}).")
@click.option("--exist-ok", is_flag=True, help="Write into an existing folder, without a number.")
@click.option("--out", type=PATH, help="Folder to write to, instead of --project and --name.")
@input_options
@force
@threads
@device
@click.option("--view-img", is_flag=True, hidden=True, expose_value=False, callback=_no_windows)
@quiet
@verbose("list what is found in each image")
@as_json
def detect(
    model: Path, sources: tuple[str, ...], more: tuple[str, ...], conf_thres: float, iou_thres: float, max_det: int,
    classes: tuple[str, ...], agnostic_nms: bool, imgsz: Size | None, half: bool, vid_stride: int, save_json: bool,
    project: Path | None, name: str | None, exist_ok: bool, out: Path | None, force: bool, threads: int, device: str,
    quiet: bool, verbose: bool, as_json: bool, **saving: Any,
) -> None:  # fmt: skip
    """Find objects in images and videos, and draw them.

    MODEL is a .pt, .safetensors or .onnx file. SOURCE is an image, a video, a
    folder of them, a pattern such as 'photos/*.jpg', a text file of paths, or a
    data.yaml. It may also be the number of a webcam, or the address of a stream
    (rtsp, rtmp, http). Options that YOLOv5's detect.py has too have its
    defaults, except --imgsz and --device.

    \b
    Examples: dsconvert detect best.onnx photos/
              dsconvert detect best.pt a.jpg b.mp4 --save-txt --classes person
              dsconvert detect best.onnx --source 0 --classes 0 2
    """
    preset = chosen_input({name: saving.pop(name) for name in INPUT_OPTIONS})
    wishes = _save_options(**saving)
    DetectOptions(conf_thres, iou_thres, max_det)  # checked before anything is loaded
    if not sources and not more:
        raise click.UsageError("Missing argument 'SOURCE...': an image, a video, a folder, 0 for a webcam.")
    if out is not None and (project is not None or name is not None or exist_ok):
        raise InputError("--out takes the place of --project, --name and --exist-ok; give one or the other.")
    base = _base(project, name)
    workers.check_device(device)
    found = find_sources([*sources, *more])
    if save_json and found.live:
        raise InputError("--save-json writes one document at the end, and a live source may have none; leave it out.")
    candidate = load_candidate(model, imgsz, device, preset).named
    if half and candidate.input_type is not np.float16:
        raise InputError(f"{model} takes no float16 input: export it with --half-input, or leave out --half.")
    options = DetectOptions(conf_thres, iou_thres, max_det, class_numbers(classes, candidate.names), agnostic_nms)
    if candidate.limits and (kept := options.beyond(candidate.limits)):
        warn(f"{model} suppresses boxes itself, and keeps only boxes within {in_options(kept)}; "
            "to find more, export it again without --nms.")  # fmt: skip
    wanted = out or (base if exist_ok else None)
    writes = wishes.anything or save_json
    with run_folder(wanted, base, "", resume=False) if writes else nullcontext(base) as folder:
        jobs = jobs_of(found, folder, wishes)
        document = folder / DOCUMENT if save_json else None
        targets = [folder, document, *(t for job in jobs for t in (job.picture, job.label))]
        given = [model, *map(Path, (*sources, *more)), *found.images, *found.videos]
        if writes:
            refuse_inputs([t for t in targets if t], given)
            check_jobs(jobs, document, folder, wishes, force)
        saver = Saver(folder, wishes, candidate.names, force)
        with bars(quiet) as progress:
            run = Run(candidate, options, saver, progress, Gathered() if save_json else None)
            run.through(jobs, vid_stride)
        if document and run.gathered:
            content = run.gathered.document(candidate.names)
            write_atomic(document, (json.dumps(content, indent=1) + "\n").encode(), force)
    for remark in run.remarks:
        warn(remark)
    if run.skipped:
        warn(left_out(run.skipped, _kinds_of(found)))
    written = _written(run, folder, wishes, document)
    if as_json:
        print_json(_summary(run, folder if writes else None, wishes, document))
        return
    if verbose:
        for looked in run.looked:
            tell(f"{_shown(looked)}: {_kinds(looked.by_class, candidate.names) or 'nothing'}")
    if not quiet or not written:
        tell(_result(run, candidate.names))
    for what, where in written.items():
        tell(str(where) if quiet else f"Wrote {what}: {where}")


def _save_options(
    save_txt: bool, save_conf: bool, save_crop: bool, nosave: bool, line_thickness: int, hide_labels: bool,
    hide_conf: bool,
) -> SaveOptions:  # fmt: skip
    if save_conf and not save_txt:
        raise InputError("--save-conf adds scores to what --save-txt writes; give --save-txt too.")
    return SaveOptions(not nosave, save_txt, save_conf, save_crop, line_thickness, not hide_labels, not hide_conf)


def _base(project: Path | None, name: str | None) -> Path:
    """Return the folder to write to, before a number makes it a new one."""
    if name is not None and name in ("", ".", ".."):
        raise InputError("--name is the name of a folder; give it in letters.")
    return (PROJECT if project is None else project) / (NAME if name is None else name)


def _kinds_of(sources: Sources) -> str:
    return "images" if not sources.videos else "videos" if not sources.images else "images and videos"


def _shown(looked: Looked) -> str:
    source = looked.job.source
    return live_name(source) if isinstance(source, str) else str(source)


def _sums(looked: Sequence[Looked]) -> dict[int, int]:
    """Return objects by class, the most frequent first."""
    sums: dict[int, int] = {}
    for one in looked:
        for kind, objects in one.by_class.items():
            sums[kind] = sums.get(kind, 0) + objects
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _how_many(run: Run) -> tuple[int, int, int]:
    """Return the numbers of images, videos, and their frames."""
    frames = [one.frames for one in run.looked if one.frames is not None]
    return len(run.looked) - len(frames), len(frames), sum(frames)


def _result(run: Run, names: Sequence[str]) -> str:
    by_class = _sums(run.looked)
    images, videos, frames = _how_many(run)
    places = [f"{images} images"] if images or not videos else []
    places += [f"{frames} frames of {videos} video{'' if videos == 1 else 's'}"] if videos else []
    kinds = _kinds(by_class, names)
    return f"Found {sum(by_class.values())} objects in {' and '.join(places)}" + (f": {kinds}." if kinds else ".")


def _written(run: Run, folder: Path, wishes: SaveOptions, document: Path | None) -> dict[str, Path]:
    """Return what was written, in words, and where."""
    images, videos, _ = _how_many(run)
    pictures = [f"{n} {what}" for n, what in ((images, "images"), (videos, "videos")) if n]
    rows = (
        (" and ".join(pictures), wishes.pictures and folder), ("labels", wishes.labels and folder / LABELS),
        ("crops", wishes.crops and run.saver.crops and folder / CROPS), ("all of it as COCO", document),
    )  # fmt: skip
    return {what: where for what, where in rows if where}


def _summary(run: Run, folder: Path | None, wishes: SaveOptions, document: Path | None) -> dict[str, Any]:
    by_class = _sums(run.looked)
    images, videos, frames = _how_many(run)
    names = run.model.names
    return {
        "model": str(run.model.path), "imgsz": run.model.imgsz.json, "out": folder and str(folder),
        "images": images, "videos": videos, "frames": frames, "detections": sum(by_class.values()),
        "classes": [{"class": c, "name": class_name(c, names), "detections": n} for c, n in by_class.items()],
        "files": [_file(one) for one in run.looked],
        "crops": str(folder / CROPS) if folder and wishes.crops and run.saver.crops else None,
        "coco": document and str(document),
        "warnings": so_far(), "remarks": run.remarks,
        "skipped": [{"path": str(s.path), "reason": s.reason} for s in run.skipped],
    }  # fmt: skip


def _file(one: Looked) -> dict[str, Any]:
    """Return a source for the JSON; for a video, `labels` is the folder of its frames' files."""
    job = one.job
    common = {"path": _shown(one), "detections": one.objects}
    if one.frames is None:
        return {**common, "image": job.picture and str(job.picture), "labels": job.label and str(job.label)}
    labels = job.label and str(job.label.parent)
    return {**common, "frames": one.frames, "video": job.picture and str(job.picture), "labels": labels}


def _kinds(by_class: Mapping[int, int], names: Sequence[str]) -> str:
    """Return text such as `7 person, 2 dog`, with the ten most frequent classes."""
    kinds = [f"{n} {class_name(c, names)}" for c, n in by_class.items()]
    return ", ".join(kinds[:10]) + (f" and {len(kinds) - 10} other classes" if len(kinds) > 10 else "")
