"""The command `dsconvert report`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import MODEL, file_kind
from dsconvert.base.files import check_target, check_writable, write_atomic
from dsconvert.base.size import Size
from dsconvert.commands.folders import refuse_to_lose
from dsconvert.commands.imagesize import Sized, imgsz
from dsconvert.commands.shared import PATH, RUNS, bars, force, split_of, strict, tell, threads, warn
from dsconvert.convert import exporting
from dsconvert.convert.origin import known_images, known_source
from dsconvert.model.file import load_model


@click.command(cls=Sized, short_help="Write one HTML page about MODEL.")
@click.argument("model", type=PATH, required=False)
@click.option("--data", type=PATH, help="data.yaml with labels, or a folder of images without labels.")
@click.option("--against", type=PATH, multiple=True, metavar="FILE",
              help="ONNX file to compare with; may be given several times.")  # fmt: skip
@click.option(
    "--float", "float_model", type=PATH, metavar="FILE", help="Float checkpoint (default: the one converted)."
)
@click.option("--images", type=click.IntRange(0, 100), default=6, show_default=True, help="Most photos on the page.")
@imgsz("Size of the images: 640, or 384 640 (height, width) (default: as calibrated)")
@click.option("--samples", type=click.IntRange(1), help="Most images evaluated.")
@split_of("val")
@strict
@click.option("--no-latency", is_flag=True, help="Leave out times, so that equal inputs give equal bytes.")
@threads
@click.option("--out", type=PATH, help="File to write (default: report.html beside MODEL).")
@force
def report(
    model: Path | None, data: Path | None, against: tuple[Path, ...], float_model: Path | None, images: int,
    imgsz: Size | None, samples: int | None, split: str | None, strict: bool, no_latency: bool, threads: int,
    out: Path | None, force: bool,
) -> None:  # fmt: skip
    """Write one HTML page about MODEL (default: the newest quantize result).

    Size, accuracy and latency against the float checkpoint and other files;
    photos with both models' boxes; every class and layer; weights and
    activations on their grids. The page loads nothing from the network.

    Example: dsconvert report --data data.yaml --against int8.onnx
    """
    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise InputError(f"The report needs {' and '.join(missing)}; pip install 'dsconvert[report]'.")
    from dsconvert.report.gather import ReportOptions, gather
    from dsconvert.report.page import page_bytes
    from dsconvert.scoring.contest import nothing_found

    path = model or exporting.newest_result(RUNS)
    target = out or path.with_name("report.html")
    refuse_to_lose([target], [path, data, float_model, *against])
    check_target(target, force)  # checked before minutes of work
    check_writable(target.parent)
    if file_kind(path) != MODEL:
        raise InputError(f"{path} is not a converted model (.safetensors); name ONNX files with --against, beside one.")
    if data is None or float_model is None:
        provenance = load_model(path).provenance
        float_model = float_model or known_source(provenance, path, "give it with --float")
        data = data or known_images(provenance, path)
    options = ReportOptions(path, data, float_model, against, images, imgsz, samples, not no_latency, split, strict)
    with bars() as progress:
        found = gather(options, progress)
        page = page_bytes(found)
    write_atomic(target, page, force)
    if shifted := found.scores.warning("the float model", "the converted one"):
        warn(shifted)
    if found.skipped:
        warn(f"{len(found.skipped)} images were left out; the first: {found.skipped[0]}")
    if found.rows[0].metrics is None:
        warn(nothing_found(found.rows[0].label))
    tell(f"Wrote {target} ({len(page) / 1e6:.2f} MB). Open it in a browser.")
