"""dsconvert quantize."""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsconvert import pipeline, workers
from dsconvert.advice import advice, bits_of_layers
from dsconvert.anyonnx.rewrite import LAYOUTS
from dsconvert.commands import quantize_onnx
from dsconvert.commands.folders import refuse_to_lose, run_folder
from dsconvert.commands.shared import (
    PATH,
    RUNS,
    as_json,
    bars,
    cell,
    console,
    device,
    force,
    in_options,
    print_json,
    quiet,
    split_of,
    strict,
    table,
    tell,
    threads,
    typed_command,
    verbose,
    warn,
)
from dsconvert.config import read_config, recipe_names
from dsconvert.errors import InputError
from dsconvert.filekinds import CHECKPOINT, MODEL, ONNX, file_kind
from dsconvert.files import check_target, check_writable
from dsconvert.notes import so_far, unheard
from dsconvert.train.distil import Distilled
from dsconvert.unfinished import NAME as UNFINISHED
from dsconvert.yolo.cfgfile import chosen_blocks
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.dataset import calibration_images
from dsconvert.yolo.plan import SCOPES


class ByteSize(click.ParamType):
    """A number of bytes as people write it: 900000, 900kB, 0.9MB (powers of ten)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size such as 0.9MB, 900kB or 900000.", param, ctx)
        return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6}[found[2]])


# What a configuration file may set, and the parameter that each option fills.
CONFIGURABLE = {f.name.replace("_", "-"): f.name for f in fields(pipeline.QuantizeOptions)}
CONFIGURABLE["target-size"] = CONFIGURABLE.pop("target-bytes")
CONFIGURABLE["target-map-drop"] = CONFIGURABLE.pop("target-drop")


def _configure(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Values of a configuration file become defaults: the command line wins."""
    if value is not None:
        read = read_config(value, CONFIGURABLE)
        context.default_map = {CONFIGURABLE[option]: text for option, text in read.items()}


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--calib", type=PATH, help="Folder of images, data.yaml, or text file of paths.")
@click.option("--config", is_eager=True, expose_value=False, callback=_configure, metavar="RECIPE",
              help=f"{', '.join(recipe_names())}, or a YAML file of these options.")  # fmt: skip
@click.option("--block-size", type=click.IntRange(1),
              help="Input channels a shift covers (default: by layer; of an .onnx 32).")  # fmt: skip
@click.option("--bits", type=click.IntRange(2, 8),
              help="Bits of every weight (default: by layer, the bytes of 4; of an .onnx 4).")  # fmt: skip
@click.option("--target-size", "target_bytes", type=ByteSize(), metavar="SIZE",
              help="Largest packed ONNX file, such as 0.9MB; layers share it.")  # fmt: skip
@click.option("--target-map-drop", "target_drop", type=float, metavar="POINTS",
              help="Smallest file that loses at most this much mAP50-95 on images held back.")  # fmt: skip
@click.option("--blocks", default="all", show_default=True, help="all, head, backbone or C3 layers: 13,17,20,23.")
@click.option("--scope", type=click.Choice(SCOPES), default="all", show_default=True, help="Which convolutions.")
@click.option("--cfg", type=PATH, metavar="FILE",
              help="Model yaml whose DSConv2D_C3 rows choose the layers; replaces --blocks, --scope.")  # fmt: skip
@click.option("--imgsz", default=640, show_default="640; of an .onnx its own",
              help="Side of the square images, pixels.")  # fmt: skip
@click.option("--samples", default=256, show_default=True, help="Most calibration images used.")
@click.option("--activations", type=click.Choice(["int8", "float"]), default="int8",
              show_default="int8; of an .onnx float", help="float: only the weights are quantized.")  # fmt: skip
@click.option("--kds", type=click.Choice(["int", "float"]), default="int", show_default=True,
              help="float: the paper's real-valued shifts; needs --activations float.")  # fmt: skip
@click.option("--finetune-steps", type=click.IntRange(0), metavar="N",
              help="Steps of the brief fine-tune; 0: none (default: as many as seem of use).")  # fmt: skip
@click.option("--finetune-time", type=click.FloatRange(0), metavar="SECONDS",
              help="Stop the brief fine-tune after so long; 0: none (default: never).")  # fmt: skip
@click.option("--layout", type=click.Choice(list(LAYOUTS)), default="packed", show_default=True,
              help="Of an .onnx: packed, or int8, which keeps its opset.")  # fmt: skip
@click.option("--mean", type=quantize_onnx.Numbers(), metavar="R,G,B",
              help="Of an .onnx: images are cropped, and (pixel / 255 - mean) / std.")  # fmt: skip
@click.option("--std", type=quantize_onnx.Numbers(), metavar="R,G,B", help="See --mean.")
@split_of("train")
@strict
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@threads
@device
@click.option(
    "--cache",
    type=PATH,
    help="Folder where calibrations are kept for further runs on the same images; of an .onnx, where values wait.",
)
@click.option("--out", type=PATH, help="Folder to write (default: runs/dsconvert/NAME).")
@click.option("--resume", is_flag=True, help="Go on where a stopped run with the same options left off.")
@force
@quiet
@verbose("show every layer's bits and error")
@as_json
def quantize(
    checkpoint: Path,
    calib: Path | None,
    cfg: Path | None,
    threads: int,
    cache: Path | None,
    out: Path | None,
    resume: bool,
    force: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert the convolutions of a YOLOv5 CHECKPOINT to DSConv.

    They are fitted on the images of --calib; a hundred are enough, and no
    labels are needed. Writes model.safetensors and quantize.json.

    Of a float ONNX file with one image input, from wherever, the weights are
    converted, and an ONNX file is written; its activations stay float.

    \b
    Examples: dsconvert quantize best.pt --calib data.yaml --block-size 32
              dsconvert quantize best.pt --calib photos/ --target-size 0.9MB
              dsconvert quantize classifier.onnx --calib photos/
    """
    began = time.perf_counter()
    kind = file_kind(checkpoint, CHECKPOINT)
    if kind == MODEL:
        raise InputError(f"{checkpoint} is a safetensors file; quantize takes a checkpoint (.pt) or a float ONNX file.")
    if kind == ONNX:
        rest = {"threads": threads, "force": force, "quiet": quiet, "verbose": verbose, "as_json": as_json}
        quantize_onnx.run(checkpoint, calib, out, cache, {**options, **rest})
        return
    quantize_onnx.refuse_onnx_only()
    for name in quantize_onnx.ONNX_ONLY:
        del options[name]
    if cfg is not None:
        _refuse_two_choices()
    workers.start()
    loaded = load_checkpoint(checkpoint)
    if cfg is not None:
        options |= {"blocks": chosen_blocks(cfg, loaded.network.kinds), "scope": "bottleneck"}
    chosen = pipeline.QuantizeOptions(calib=calib, **_typed_wins(options))
    if workers.number():  # one speaks for all, and writes
        pipeline.quantize(loaded, chosen, cache=cache)
        return
    check_writable(out or RUNS)
    if cache is not None:
        check_writable(cache)
    if out is not None:
        targets = [out / name for name in (pipeline.MODEL_FILE, pipeline.REPORT_FILE, UNFINISHED)]
        refuse_to_lose([out, *targets], [checkpoint, calib, cfg])
        check_target(targets[0], force)
        check_target(targets[1], force=True)  # a report alone was left by a run that was killed
    if calib is None:
        warn(
            "Without --calib, images are synthesised from the checkpoint's BatchNorm statistics; about 100 of your own "
            "(no labels needed) with --calib FOLDER would lose less accuracy."
        )
    command = typed_command()
    with (
        run_folder(out, RUNS / checkpoint.stem, UNFINISHED, resume) as folder,
        bars(quiet, lines=True) as progress,
    ):
        result = pipeline.quantize(loaded, chosen, command, progress, folder / UNFINISHED, resume, cache)
    written = pipeline.save_quantized(result, folder, force)
    (folder / UNFINISHED).unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    if result.skipped:
        warn(f"{result.skipped} images could not be read and were left out; the first: {result.skipped_reason}")
    said = so_far()
    with unheard():
        available = 0 if calib is None else len(calibration_images(calib, chosen.split))
    warnings = [in_options(sentence) for sentence in advice(result, available)]
    for sentence in warnings:
        warn(sentence)
    if as_json:
        report = pipeline.quantize_report(result)
        more = {"path": str(written), "available_images": available, "seconds": round(seconds, 2)}
        print_json({**report, **more, "warnings": [*said, *warnings]})
    elif quiet:
        tell(str(written))
    else:
        if verbose:
            _print_layers(result)
        _print_quantized(result, loaded, available, written, seconds)


def _refuse_two_choices() -> None:
    """--cfg says which layers; so do --blocks and --scope, typed or from a configuration file."""
    context = click.get_current_context()
    for name in ("blocks", "scope"):
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise InputError(f"--cfg and --{name} each choose the layers; give one of them.")


def _typed_wins(options: dict[str, Any]) -> dict[str, Any]:
    """--bits, --target-size and --target-map-drop exclude each other, so one that was typed also takes the place of a
    configured one."""
    context = click.get_current_context()
    several = ("bits", "target_bytes", "target_drop")
    typed = [name for name in several if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    return {**options, **{name: None for name in several if name not in typed}} if len(typed) == 1 else options


def _print_layers(result: pipeline.Quantized) -> None:
    shown = table("layer", "kind", "bits", "SQNR dB")
    for row in pipeline.quantize_report(result)["layers"]:
        shown.add_row(cell(row["name"]), row["kind"], str(row["bits"]), f"{row['sqnr_db']:.1f}")
    console().print(shown)


def _finetune_line(tuned: Distilled) -> str:
    """What the brief fine-tune did, in a sentence."""
    before, steps = tuned.curve[0].held_back, tuned.curve[-1].step
    if not tuned.tried:
        share = 100 * tuned.activations / before
        return (
            f"No fine-tuning: rounded activations, which it does not change, do {share:.0f} % of the error on "
            f"{tuned.judges} images held back."
        )
    if not tuned.kept:
        return (
            f"Fine-tuning, {steps} steps, did not lower the error on {tuned.judges} images held back ({before:.3g}) by "
            "more than chance; the fit is kept as it was."
        )
    return (
        f"Fine-tuning, {tuned.kept} steps, lowered the error on {tuned.judges} images held back by "
        f"{100 * tuned.gain / before:.0f} % ({before:.3g} to {before - tuned.gain:.3g})."
    )


def _print_quantized(
    result: pipeline.Quantized, source: Checkpoint, available: int, written: Path, seconds: float
) -> None:
    model = result.model
    used = f"{result.images} of {available} images" if available > result.images else f"{result.images} images"
    views = f" and {result.views} views of them" if result.views else ""
    views += f" and {result.synthesised} synthesised ones" if result.synthesised else ""
    kinds = [row["kind"] for row in pipeline.layer_table(model)]
    tell(
        f"Converted {kinds.count('DSConv')} of {len(kinds)} convolutions to DSConv ({bits_of_layers(model)}), "
        f"the others to int8, on {used}{views} in {seconds:.0f} s."
    )
    if result.tuned is not None:
        tell(_finetune_line(result.tuned))
    if result.map_drop is not None:
        tell(f"Lost on the images held back: {result.map_drop:.2f} points of mAP50-95.")
    shown = table("", "weights", "bits each", "MB")
    count = f"{model.weight_count:,}"
    shown.add_row("float", count, str(source.stored_bits), f"{source.size_bytes / 1e6:.2f}")
    shown.add_row("DSConv", count, f"{model.weight_bits:.2f}", f"{written.stat().st_size / 1e6:.2f}")
    console().print(shown)
    tell(f"Wrote {written}")
    tell(f"Next: dsconvert export {shlex.quote(str(written))} --onnx")
