"""The command `dsconvert export`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import CHECKPOINT, MODEL, file_kind
from dsconvert.base.files import check_target, check_writable, scratch_in, write_atomic
from dsconvert.base.size import Size
from dsconvert.commands.folders import refuse_to_lose
from dsconvert.commands.imagesize import Sized, imgsz
from dsconvert.commands.shared import PATH, RUNS, as_json, force, print_json, tell
from dsconvert.convert import exporting
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends
from dsconvert.export.weights.layouts import LAYOUTS, PACKED, layout_named, run_by
from dsconvert.model.file import load_model
from dsconvert.photos.dataset import SPLITS, is_data_yaml, read_data_yaml


@click.command(cls=Sized)
@click.argument("model", type=PATH, required=False)
@click.option("--onnx", is_flag=True, expose_value=False, help="Write ONNX, the only format; may be left out.")
@click.option("--layout", type=click.Choice(list(LAYOUTS)), default=PACKED.name, show_default=True,
              help=" ".join(f"{x.name}: {x.about}." for x in LAYOUTS.values())
              + f" OpenVINO runs {', '.join(run_by('OpenVINO'))}.")  # fmt: skip
@imgsz("Size of the input: 640, or 384 640 (height, width) (default: as calibrated)")
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open.")
@click.option("--dynamic", is_flag=True, help="Leave batch size, height and width open, for ONNX Runtime; slower.")
@click.option("--uint8-input", is_flag=True, help="Input is the image's bytes, 0..255, without division by 255.")
@click.option("--half-input", is_flag=True, help="Input is float16, 0..1, as for YOLOv5's detect.py --half.")
@click.option(
    "--nms",
    "with_nms",
    is_flag=True,
    help="Add non-maximum suppression: detections (k, 7) = image, x1, y1, x2, y2, score, class.",
)
@click.option("--conf-thres", type=float, help=f"With --nms: lowest score (default: {Nms.confidence}).")
@click.option("--iou-thres", type=float, help=f"With --nms: largest overlap of two boxes (default: {Nms.iou}).")
@click.option("--max-det", type=int, help=f"With --nms: most boxes in an image (default: {Nms.most}).")
@click.option("--no-check", is_flag=True, help="Do not compare the file's outputs with torch's before writing it.")
@click.option("--out", type=PATH, help="File to write (default: beside the model).")
@force
@as_json
def export(
    model: Path | None, layout: str, imgsz: Size | None, dynamic_batch: bool, dynamic: bool, uint8_input: bool,
    half_input: bool, with_nms: bool, conf_thres: float | None, iou_thres: float | None, max_det: int | None,
    no_check: bool, out: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write MODEL (default: the newest quantize result) as ONNX.

    A .pt gives the float32 network, for comparison. Before it is written, the
    file is run in ONNX Runtime on two images and must give torch's numbers.

    \b
    Examples: dsconvert export --onnx --layout packed
              dsconvert export --onnx --uint8-input --nms --conf-thres 0.3
    """
    if uint8_input and half_input:
        raise InputError("--uint8-input and --half-input exclude each other; give one of them.")
    ends = Ends(
        dynamic_batch,
        "uint8" if uint8_input else "float16" if half_input else "float32",
        _nms(with_nms, {"confidence": conf_thres, "iou": iou_thres, "most": max_det}),
        dynamic,
    )
    path = model or exporting.newest_result(RUNS)
    float_source = exporting.exportable(path) == CHECKPOINT
    suffix = "float32" if float_source else layout
    target = out or path.with_name(f"{path.stem}-{suffix}{_mark(ends)}.onnx")
    refuse_to_lose([target], [path])
    check_target(target, force)  # before the file is made and run
    check_writable(target.parent)
    with scratch_in(target.parent):
        data = exporting.onnx_bytes(path, layout_named(layout), imgsz, ends, not no_check)
    write_atomic(target, data, force)
    if as_json:
        print_json(
            {"path": str(target), "layout": suffix, "input": ends.input_type, "nms": with_nms, "size_bytes": len(data)}
        )
        return
    tell(f"Wrote {target} ({len(data) / 1e6:.2f} MB, {suffix}).")
    for line in _next_lines(path, target):
        tell(line)


def _next_lines(model: Path, target: Path) -> list[str]:
    """Return the command that compares the file with the checkpoint, on images that did not calibrate it."""
    provenance = load_model(model).provenance if file_kind(model) == MODEL else {}
    source, options = provenance.get("source"), provenance.get("options")
    calib, split = (options.get("calib"), options.get("split")) if isinstance(options, dict) else (None, None)
    against = [source] if isinstance(source, str) and os.path.isfile(source) else []
    start = ["Next:", "dsconvert", "eval", *against, str(target), "--data"]
    if not isinstance(calib, str):
        return [shlex.join([*start, "data.yaml"])]
    fresh = _unseen_split(Path(calib), split)
    if fresh is None:
        return [
            shlex.join([*start, "OTHER"]),
            f"OTHER stands for images other than {calib}, which calibrated the model.",
        ]
    return [shlex.join([*start, calib, *(["--split", fresh] if fresh != "val" else [])])]


def _unseen_split(calib: Path, split: Any) -> str | None:
    """Return the split of a data.yaml to measure on, if another split was used for calibration."""
    if not is_data_yaml(calib):
        return None
    try:
        splits = read_data_yaml(calib).splits
    except InputError:
        return None
    used = str(split) if split else next((s for s in SPLITS if splits[s]), "")
    seen = set(splits.get(used, ()))
    return next((s for s in ("val", "test") if splits[s] and s != used and not seen & set(splits[s])), None)


def _nms(wanted: bool, given: dict[str, float | None]) -> Nms | None:
    """Return the suppression that the options ask for; None keeps a default."""
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if chosen and not wanted:
        raise InputError("--conf-thres, --iou-thres and --max-det work only with --nms; give it too.")
    return Nms(**chosen) if wanted else None


def _mark(ends: Ends) -> str:
    """Return what a file's name says about an unusual input type or suppression."""
    kind = "" if ends.input_type == "float32" else f"-{ends.input_type}"
    return kind + ("-nms" if ends.nms else "")
