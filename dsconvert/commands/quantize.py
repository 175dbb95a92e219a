"""dsconvert quantize."""

from __future__ import annotations

import contextlib
import glob
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from dsconvert import pipeline
from dsconvert.commands.shared import PATH, RUNS, as_json, bars, force, print_json, say, tell, threads
from dsconvert.errors import InputError
from dsconvert.files import check_writable, claim_folder
from dsconvert.text import printable
from dsconvert.unfinished import NAME as UNFINISHED
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.plan import SCOPES


class ByteSize(click.ParamType):
    """A number of bytes as people write it: 900000, 900kB, 0.9MB (powers of ten)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size such as 0.9MB, 900kB or 900000.", param, ctx)
        return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6}[found[2]])


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--calib", type=PATH, help="Folder of images, data.yaml, or text file of paths.")
@click.option("--block-size", type=click.IntRange(1), help="Input channels a shift covers (default: by layer).")
@click.option("--bits", type=click.IntRange(2, 8),
              help="Bits of every weight (default: by layer, the bytes of 4 bits).")  # fmt: skip
@click.option("--target-size", "target_bytes", type=ByteSize(), metavar="SIZE",
              help="Largest packed ONNX file, such as 0.9MB; layers share it.")  # fmt: skip
@click.option("--target-map-drop", "target_drop", type=float, metavar="POINTS",
              help="Smallest file that loses at most this much mAP50-95 on images held back.")  # fmt: skip
@click.option("--blocks", default="all", show_default=True, help="all, head, backbone or C3 layers: 13,17,20,23.")
@click.option("--scope", type=click.Choice(SCOPES), default="all", show_default=True, help="Which convolutions.")
@click.option("--imgsz", default=640, show_default=True, help="Side of the square images, pixels.")
@click.option("--samples", default=128, show_default=True, help="Most calibration images used.")
@click.option("--activations", type=click.Choice(["int8", "float"]), default="int8", show_default=True,
              help="float: only the weights are quantized.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@threads
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--out", type=PATH, help="Folder to write (default: runs/dsconvert/NAME).")
@click.option("--resume", is_flag=True, help="Go on where a stopped run with the same options left off.")
@force
@as_json
def quantize(
    checkpoint: Path,
    calib: Path | None,
    threads: int,
    out: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert the C3 blocks of a YOLOv5 CHECKPOINT to DSConv.

    Example: dsconvert quantize best.pt --calib data.yaml --block-size 32
    """
    began = time.perf_counter()
    loaded = load_checkpoint(checkpoint)
    check_writable(out or RUNS)
    if out is not None and not force and (out / pipeline.MODEL_FILE).exists():
        raise InputError(f"{out / pipeline.MODEL_FILE} already exists; give --force to replace it.")
    if calib is None:
        say(
            "No --calib: calibrating on images synthesised from the checkpoint's BatchNorm statistics.\n"
            "About 100 of your own images (no labels needed) with --calib FOLDER would lose less accuracy."
        )
    folder = out or (_stopped(checkpoint.stem) if resume else claim_folder(RUNS / checkpoint.stem))
    try:
        with bars() as progress:
            result = pipeline.quantize(
                loaded,
                pipeline.QuantizeOptions(calib=calib, **options),
                shlex.join(["dsconvert", *(word for word in sys.argv[1:] if word != "--resume")]),
                progress,
                folder / UNFINISHED,
                resume,
            )
    except BaseException:
        if out is None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when nothing was fitted yet
        raise
    written = pipeline.save_quantized(result, folder, force)
    (folder / UNFINISHED).unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    if as_json:
        report = pipeline.quantize_report(result)
        print_json({**report, "path": str(written), "seconds": round(seconds, 2)})
        return
    if result.skipped:
        say(f"{result.skipped} images could not be read and were left out; the first: {result.skipped_reason}")
    _print_quantized(result, loaded.size_bytes, written, seconds)


def _stopped(stem: str) -> Path:
    """The folder of the checkpoint's runs where a run was stopped last."""
    left = sorted(RUNS.glob(f"{glob.escape(stem)}*/{UNFINISHED}"), key=lambda p: p.stat().st_mtime_ns)
    if not left:
        raise InputError(f"There is nothing to resume: no run of {printable(stem)} under {RUNS} was stopped.")
    return left[-1].parent


def _print_quantized(result: pipeline.Quantized, source_bytes: int, written: Path, seconds: float) -> None:
    model = result.model
    kinds = [row["kind"] for row in pipeline.layer_table(model)]
    size = written.stat().st_size
    tell(
        f"Converted {kinds.count('DSConv')} of {len(kinds)} convolutions to DSConv, the others to int8, "
        f"on {result.images} images in {seconds:.0f} s."
    )
    tell(
        f"Weights: {model.weight_bits:.2f} bits each, {32 / model.weight_bits:.2f} times smaller than float32. "
        f"File: {size / 1e6:.2f} MB (checkpoint {source_bytes / 1e6:.2f} MB)."
    )
    if result.map_drop is not None:
        tell(f"Lost on the images held back: {result.map_drop:.2f} points of mAP50-95.")
    tell(f"Wrote {written}")
    tell("Next: dsconvert export --onnx")
