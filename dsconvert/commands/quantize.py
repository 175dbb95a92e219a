"""dsconvert quantize."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import CHECKPOINT, MODEL, ONNX, file_kind
from dsconvert.base.files import check_target, check_writable, claim_folder, scratch_in, write_atomic
from dsconvert.base.notes import so_far, unheard
from dsconvert.commands.folders import refuse_to_lose, run_folder
from dsconvert.commands.inputs import INPUT_OPTIONS, chosen_input, input_options
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
from dsconvert.convert.onnx import OnnxPlan, quantize_onnx
from dsconvert.convert.onnx_rewrite import LAYOUTS
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.record import MODEL_FILE, REPORT_FILE, Quantized, layer_table, quantize_report, save_quantized
from dsconvert.convert.resume import NAME as UNFINISHED
from dsconvert.onnxfile.presets import Preset
from dsconvert.photos.dataset import calibration_images
from dsconvert.tune.distil import Distilled
from dsconvert.yolo.cfgfile import chosen_blocks
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.plan import SCOPES


@dataclass(frozen=True)
class Only:
    """An option that files of one kind alone can be asked for."""

    kind: str  # CHECKPOINT or ONNX
    harmless: object = None  # the value that asks nothing of other files


# All other options mean the same for both kinds.
ONLY = {
    **{name: Only(CHECKPOINT) for name in ("target_bytes", "target_drop", "blocks", "scope", "cfg", "device", "resume",
                                           "finetune_steps", "finetune_time")},
    "activations": Only(CHECKPOINT, harmless="float"),
    "kds": Only(CHECKPOINT, harmless="int"),
    **{name: Only(ONNX) for name in ("layout", *INPUT_OPTIONS)},
}  # fmt: skip
REFUSED = {
    CHECKPOINT: "{} is for a checkpoint; of an ONNX file the weights alone are quantized, with --bits in every layer.",
    ONNX: "{} is for an ONNX file; a checkpoint has no use for it.",
}


@dataclass(frozen=True)
class Job:
    """What a run reads and writes, and how loudly."""

    source: Path  # the checkpoint or ONNX file
    calib: Path | None  # its calibration images
    cfg: Path | None  # the model yaml that chooses layers
    cache: Path | None  # folder where calibrations are kept, or values wait
    out: Path | None  # folder to write; of an ONNX file, perhaps the file itself
    resume: bool  # go on where a run was stopped
    force: bool  # replace what is there
    quiet: bool  # no progress

    def check(self, place: Path, outputs: list[Path], targets: dict[Path, bool]) -> None:
        """Raises InputError, before any work, for folders that cannot be written, for `outputs` that are inputs, and
        for `targets` that are there, unless they may be replaced."""
        check_writable(place)
        if self.cache is not None:
            check_writable(self.cache)
        refuse_to_lose(outputs, [self.source, self.calib, self.cfg])
        for target, replaced in targets.items():
            check_target(target, replaced)


@dataclass(frozen=True)
class Done:
    """A conversion, as it is told of."""

    path: Path  # the file written
    unreadable: int  # images that were left out
    reason: str  # why the first of them was
    said: list[str]  # what was warned of while it ran
    advice: list[str]  # what is still to be warned of
    document: dict[str, Any]  # of --json, but for seconds and warnings
    layers: Callable[[], None]  # prints a table of them
    result: Callable[[float], None]  # prints what came of it in so many seconds


# What a configuration file may set, and the parameter that each option fills.
CONFIGURABLE = {f.name.replace("_", "-"): f.name for f in fields(QuantizeOptions)}
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
@input_options
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
    _refuse_what_is_for_others(kind)
    job = Job(checkpoint, calib, cfg, cache, out, resume, force, quiet)
    done = (_of_onnx if kind == ONNX else _of_checkpoint)(job, options)
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
    """Convert a checkpoint; None in all processes but the one that speaks for all, and writes."""
    if job.cfg is not None:
        _refuse_two_choices()
    workers.start()
    loaded = load_checkpoint(job.source)
    chosen = {name: value for name, value in options.items() if name not in ONLY or ONLY[name].kind == CHECKPOINT}
    if job.cfg is not None:
        chosen |= {"blocks": chosen_blocks(job.cfg, loaded.network.kinds), "scope": "bottleneck"}
    plan = QuantizeOptions(calib=job.calib, **_typed_wins(chosen))
    if workers.number():
        pipeline.quantize(loaded, plan, cache=job.cache)
        return None
    out, targets = job.out, dict[Path, bool]()
    if out is not None:  # a report alone was left by a run that was killed
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


def _of_onnx(job: Job, options: dict[str, Any]) -> Done:
    """Convert an ONNX file."""
    if job.calib is None:
        raise InputError("An ONNX file is converted on images: give --calib FOLDER.")
    preset = chosen_input(options) or Preset()
    plan = OnnxPlan(
        options["bits"] or 4, options["block_size"] or 32, options["layout"],
        options["imgsz"] if _given("imgsz") else None, options["samples"], preset.form, preset.decode, options["seed"],
        options["split"], options["strict"],
    )  # fmt: skip
    name, single = f"{job.source.stem}-{plan.layout}.onnx", job.out is not None and job.out.suffix == ".onnx"
    target = None if job.out is None else job.out if single else job.out / name
    place = target.parent if target else RUNS
    job.check(place, [target] if target else [], {target: job.force} if target else {})
    with scratch_in(job.cache or place), bars(job.quiet, lines=True) as progress:
        made = quantize_onnx(job.source, job.calib, plan, progress, warn)
    data = made.model.SerializeToString()
    written = target or claim_folder(RUNS / job.source.stem) / name
    write_atomic(written, data, job.force)
    weights = [(layer, made.fitted[layer.index].weight.bits) for layer in made.layers]
    document = {
        "path": str(written), "layout": plan.layout, "size_bytes": written.stat().st_size,
        "source_bytes": job.source.stat().st_size, "weight_bits": made.weight_bits, "calibration_images": made.images,
        "layers": [{"name": layer.name, "shape": list(layer.weight.shape), "bits": bits} for layer, bits in weights],
    }  # fmt: skip
    return Done(
        written, len(made.skipped), made.skipped[0] if made.skipped else "", list(made.warnings), [], document,
        lambda: _print_onnx_layers(document), lambda seconds: _print_onnx(document, job.source, seconds),
    )  # fmt: skip


def _given(name: str) -> bool:
    """Whether an option was typed or configured."""
    return click.get_current_context().get_parameter_source(name) not in (None, ParameterSource.DEFAULT)


def _refuse_what_is_for_others(kind: str) -> None:
    """Raises InputError when an option was given that files of this kind know nothing of."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        only = ONLY.get(name, Only(kind))
        if only.kind != kind and _given(name) and context.params[name] != only.harmless:
            raise InputError(REFUSED[only.kind].format(parameter.opts[0]))


def _refuse_two_choices() -> None:
    """--cfg says which layers; so do --blocks and --scope, typed or from a configuration file."""
    for name in ("blocks", "scope"):
        if _given(name):
            raise InputError(f"--cfg and --{name} each choose the layers; give one of them.")


def _typed_wins(options: dict[str, Any]) -> dict[str, Any]:
    """--bits, --target-size and --target-map-drop exclude each other, so one that was typed also takes the place of a
    configured one."""
    context = click.get_current_context()
    several = ("bits", "target_bytes", "target_drop")
    typed = [name for name in several if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    return {**options, **{name: None for name in several if name not in typed}} if len(typed) == 1 else options


def _print_layers(result: Quantized) -> None:
    shown = table("layer", "kind", "bits", "SQNR dB")
    for row in quantize_report(result)["layers"]:
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
        tell(f"Lost on the images held back: {result.map_drop:.2f} points of mAP50-95.")
    shown = table("", "weights", "bits each", "MB")
    count = f"{model.weight_count:,}"
    shown.add_row("float", count, str(source.stored_bits), f"{source.size_bytes / 1e6:.2f}")
    shown.add_row("DSConv", count, f"{model.weight_bits:.2f}", f"{written.stat().st_size / 1e6:.2f}")
    console().print(shown)
    tell(f"Wrote {written}")
    tell(f"Next: dsconvert export {shlex.quote(str(written))} --onnx")


def _print_onnx_layers(document: dict[str, Any]) -> None:
    shown = table("layer", "shape", "bits")
    for layer in document["layers"]:
        shown.add_row(cell(layer["name"]), "x".join(map(str, layer["shape"])), str(layer["bits"]))
    console().print(shown)


def _print_onnx(document: dict[str, Any], source: Path, seconds: float) -> None:
    tell(
        f"Converted {len(document['layers'])} layers to DSConv, {document['weight_bits']:.2f} bits a weight, on "
        f"{document['calibration_images']} images in {seconds:.0f} s."
    )
    before, after = document["source_bytes"] / 1e6, document["size_bytes"] / 1e6
    tell(f"Wrote {document['path']} ({after:.2f} MB, {document['layout']}; {source.name} has {before:.2f} MB).")
