"""The command `dsconvert quantize`."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import CHECKPOINT, MODEL, ONNX, file_kind
from dsconvert.base.notes import so_far, unheard
from dsconvert.commands.folders import run_folder
from dsconvert.commands.imagesize import Sized, imgsz
from dsconvert.commands.inputs import INPUT_OPTIONS, input_options
from dsconvert.commands.job import Done, Job, given
from dsconvert.commands.quantize_onnx import convert_onnx
from dsconvert.commands.shared import (
    PATH,
    RUNS,
    ByteSize,
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
from dsconvert.convert import quantize as pipeline
from dsconvert.convert.advice import advice, bits_of_layers
from dsconvert.convert.config import read_config, recipe_names
from dsconvert.convert.onnx import KINDS
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.record import (
    MODEL_FILE,
    REPORT_FILE,
    Quantized,
    layer_table,
    quantize_report,
    save_quantized,
)
from dsconvert.convert.resume import NAME as UNFINISHED
from dsconvert.photos.dataset import calibration_images
from dsconvert.tune.distil import Distilled
from dsconvert.yolo.cfgfile import chosen_blocks
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.plan import SCOPES


@dataclass(frozen=True)
class Only:
    """An option for files of one kind."""

    kind: str  # CHECKPOINT or ONNX
    harmless: object = None  # value that has no effect on other files


# all other options mean the same for both kinds
ONLY = {
    **{name: Only(CHECKPOINT) for name in ("target_drop", "blocks", "scope", "cfg", "device", "resume")},
    "kds": Only(CHECKPOINT, harmless="int"),
    **{name: Only(ONNX) for name in ("layout", *INPUT_OPTIONS)},
}  # fmt: skip
REFUSED = {
    CHECKPOINT: "{} is for a checkpoint; an ONNX file is always converted as a whole, by one process, on the CPU.",
    ONNX: "{} is for an ONNX file; leave it out for a checkpoint.",
}


# the options of a configuration file, and their parameters
CONFIGURABLE = {f.name.replace("_", "-"): f.name for f in fields(QuantizeOptions)}
CONFIGURABLE["target-size"] = CONFIGURABLE.pop("target-bytes")
CONFIGURABLE["target-map-drop"] = CONFIGURABLE.pop("target-drop")


def _configure(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Make the values of a configuration file the defaults; the command line wins."""
    if value is not None:
        read = read_config(value, CONFIGURABLE)
        context.default_map = {CONFIGURABLE[option]: text for option, text in read.items()}


@click.command(cls=Sized)
@click.argument("checkpoint", type=PATH)
@click.option("--calib", type=PATH, help="Calibration images: a folder, data.yaml, or text file of paths.")
@click.option("--config", is_eager=True, expose_value=False, callback=_configure, metavar="RECIPE",
              help=f"{', '.join(recipe_names())}, or a YAML file of these options.")  # fmt: skip
@click.option("--block-size", type=click.IntRange(1),
              help="Input channels that share a KDS, the group size (default: by layer).")  # fmt: skip
@click.option("--bits", type=click.IntRange(2, 8),
              help="Bits of every weight (default: by layer, the size of 4 bits).")  # fmt: skip
@click.option("--target-size", "target_bytes", type=ByteSize(), metavar="SIZE",
              help="Largest packed ONNX file, such as 0.9MB; sets bits by layer.")  # fmt: skip
@click.option("--target-map-drop", "target_drop", type=float, metavar="POINTS",
              help="Smallest file that loses at most this much mAP50-95 on held-back images.")  # fmt: skip
@click.option("--blocks", default="all", show_default=True,
              help="Part to convert: all, head, backbone, or C3 layers: 13,17,20,23.")  # fmt: skip
@click.option("--scope", type=click.Choice(SCOPES), default="all", show_default=True, help="Convolutions to convert.")
@click.option("--cfg", type=PATH, metavar="FILE",
              help="Model yaml whose DSConv2D_C3 rows choose the layers; replaces --blocks, --scope.")  # fmt: skip
@imgsz("Size of the images: 640, or 384 640 (height, width) (default: 640, or the ONNX file's)",
       default="640")  # fmt: skip
@click.option("--samples", default=256, show_default=True, help="Most calibration images used.")
@click.option("--activations", type=click.Choice(["int8", "float"]), default="int8", show_default=True,
              help="float: quantize only the weights.")  # fmt: skip
@click.option("--kds", type=click.Choice(["int", "float"]), default="int", show_default=True,
              help="float: the paper's real-valued KDS; needs --activations float.")  # fmt: skip
@click.option("--finetune-steps", type=click.IntRange(0), metavar="N",
              help="Steps of the brief fine-tune; 0: none (default: as many as are useful).")  # fmt: skip
@click.option("--finetune-time", type=click.FloatRange(0), metavar="SECONDS",
              help="Stop the brief fine-tune after this time; 0: none (default: no limit).")  # fmt: skip
@click.option("--layout", type=click.Choice(KINDS["int8"]), default="packed", show_default=True,
              help="For an .onnx: how weights are written (see dsconvert export).")  # fmt: skip
@input_options
@split_of("train")
@strict
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@threads
@device
@click.option(
    "--cache",
    type=PATH,
    help="Folder that keeps calibrations for later runs on the same images; for an .onnx, temporary values.",
)
@click.option("--out", type=PATH, help="Folder to write to (default: runs/dsconvert/NAME).")
@click.option("--resume", is_flag=True, help="Continue a stopped run that had the same options.")
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

    They are fitted on the images of --calib; a hundred are enough, and no labels are needed. Writes model.safetensors
    and quantize.json.

    CHECKPOINT may also be a float ONNX file of any network with one image input. The result is then an ONNX file with
    integer weights and activations; its decoding stays float.

    \b
    Examples: dsconvert quantize best.pt --calib data.yaml --block-size 32
              dsconvert quantize best.pt --calib photos/ --target-size 0.9MB
              dsconvert quantize classifier.onnx --calib photos/
    """
    began = time.perf_counter()
    kind = file_kind(checkpoint, CHECKPOINT)
    if kind == MODEL:
        raise InputError(f"{checkpoint} is a safetensors file; quantize takes a checkpoint (.pt) or a float ONNX file.")
    _refuse_what_is_for_others(kind)
    job = Job(checkpoint, calib, cfg, cache, out, resume, force, quiet)
    done = (convert_onnx if kind == ONNX else _of_checkpoint)(job, options)
    if done is None:
        return
    seconds = time.perf_counter() - began
    if done.unreadable:
        warn(f"{done.unreadable} images could not be read and were left out; the first: {done.reason}")
    for sentence in done.advice:
        warn(sentence)
    if as_json:
        warnings = list(map(in_options, (*so_far(), *done.said, *done.advice)))
        print_json({**done.document, "seconds": round(seconds, 2), "warnings": warnings})
    elif quiet:
        tell(str(done.path))
    else:
        if verbose:
            done.layers()
        done.result(seconds)


def _of_checkpoint(job: Job, options: dict[str, Any]) -> Done | None:
    """Convert a checkpoint. Returns None in all processes except the one that writes and prints."""
    if job.cfg is not None:
        _refuse_two_choices()
    workers.start()
    loaded = load_checkpoint(job.source)
    chosen = {name: value for name, value in options.items() if name not in ONLY or ONLY[name].kind == CHECKPOINT}
    if job.cfg is not None:
        chosen |= {"blocks": chosen_blocks(job.cfg, loaded.network.kinds), "scope": "bottleneck"}
    plan = QuantizeOptions(calib=job.calib, **_typed_wins({**chosen, "imgsz": chosen["imgsz"].json}))
    if workers.number():
        pipeline.quantize(loaded, plan, cache=job.cache)
        return None
    out, targets = job.out, dict[Path, bool]()
    if out is not None:  # a report without a model was left by a run that was killed
        targets = {out / MODEL_FILE: job.force, out / REPORT_FILE: True}
    job.check(out or RUNS, [out, *targets, out / UNFINISHED] if out else [], targets)
    if job.calib is None:
        warn(
            "Without --calib, images are synthesised from the checkpoint's BatchNorm statistics; about 100 of your own "
            "(no labels needed) with --calib FOLDER would lose less accuracy."
        )
    command = typed_command()
    with (
        run_folder(out, RUNS / job.source.stem, UNFINISHED, job.resume) as folder,
        bars(job.quiet, lines=True) as progress,
    ):
        result = pipeline.quantize(loaded, plan, command, progress, folder / UNFINISHED, job.resume, job.cache)
    written = save_quantized(result, folder, job.force)
    (folder / UNFINISHED).unlink(missing_ok=True)
    with unheard():
        available = 0 if job.calib is None else len(calibration_images(job.calib, plan.split))
    document = {**quantize_report(result), "path": str(written), "available_images": available}
    return Done(
        written, result.skipped, result.skipped_reason, [], advice(result, available), document,
        lambda: _print_layers(result), lambda seconds: _print_quantized(result, loaded, available, written, seconds),
    )  # fmt: skip


def _refuse_what_is_for_others(kind: str) -> None:
    """Raise InputError for an option that files of this kind do not have."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        only = ONLY.get(name, Only(kind))
        if only.kind != kind and given(name) and context.params[name] != only.harmless:
            raise InputError(REFUSED[only.kind].format(parameter.opts[0]))


def _refuse_two_choices() -> None:
    """Raise InputError for --blocks or --scope, typed or configured, beside --cfg, which also chooses layers."""
    for name in ("blocks", "scope"):
        if given(name):
            raise InputError(f"--cfg and --{name} each choose the layers; give one of them.")


def _typed_wins(options: dict[str, Any]) -> dict[str, Any]:
    """Let one of --bits, --target-size and --target-map-drop that was typed replace a configured one, as they exclude
    each other.
    """
    context = click.get_current_context()
    several = ("bits", "target_bytes", "target_drop")
    typed = [name for name in several if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    return {**options, **{name: None for name in several if name not in typed}} if len(typed) == 1 else options


def _print_layers(result: Quantized) -> None:
    shown = table("layer", "kind", "bits", "SQNR dB")
    for row in quantize_report(result)["layers"]:
        shown.add_row(cell(row["name"]), row["kind"], str(row["bits"]), f"{row['sqnr_db']:.1f}")
    console().print(shown)


def _finetune_line(tuned: Distilled[Any]) -> str:
    """Return a sentence about the brief fine-tune."""
    before, steps = tuned.curve[0].held_back, tuned.curve[-1].step
    if not tuned.tried:
        share = 100 * tuned.activations / before
        return (
            f"No fine-tuning: rounded activations, which it does not change, cause {share:.0f} % of the error on "
            f"{tuned.judges} held-back images."
        )
    if not tuned.kept:
        return (
            f"Fine-tuning, {steps} steps, did not lower the error on {tuned.judges} held-back images ({before:.3g}) by "
            "more than chance, so the fit was kept."
        )
    return (
        f"Fine-tuning, {tuned.kept} steps, lowered the error on {tuned.judges} held-back images by "
        f"{100 * tuned.gain / before:.0f} % ({before:.3g} to {before - tuned.gain:.3g})."
    )


def _print_quantized(result: Quantized, source: Checkpoint, available: int, written: Path, seconds: float) -> None:
    model = result.model
    used = f"{result.images} of {available} images" if available > result.images else f"{result.images} images"
    views = f" and {result.views} views of them" if result.views else ""
    views += f" and {result.synthesised} synthesised ones" if result.synthesised else ""
    kinds = [row["kind"] for row in layer_table(model)]
    tell(
        f"Converted {kinds.count('DSConv')} of {len(kinds)} convolutions to DSConv ({bits_of_layers(model)}), "
        f"the others to int8, on {used}{views} in {seconds:.0f} s."
    )
    if result.tuned is not None:
        tell(_finetune_line(result.tuned))
    if result.map_drop is not None:
        tell(f"Lost on the held-back images: {result.map_drop:.2f} points of mAP50-95.")
    shown = table("", "weights", "bits each", "MB")
    count = f"{model.weight_count:,}"
    shown.add_row("float", count, str(source.stored_bits), f"{source.size_bytes / 1e6:.2f}")
    shown.add_row("DSConv", count, f"{model.weight_bits:.2f}", f"{written.stat().st_size / 1e6:.2f}")
    console().print(shown)
    tell(f"Wrote {written}")
    tell(f"Next: dsconvert export {shlex.quote(str(written))} --onnx")
