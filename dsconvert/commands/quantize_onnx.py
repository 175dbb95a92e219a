"""The command `dsconvert quantize` for a float ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsconvert.base.errors import InputError
from dsconvert.base.files import claim_folder, scratch_in, write_atomic
from dsconvert.commands.inputs import chosen_input
from dsconvert.commands.job import Done, Job, given
from dsconvert.commands.shared import RUNS, bars, cell, console, table, tell, warn
from dsconvert.convert.onnx import OnnxConverted, OnnxPlan, quantize_onnx
from dsconvert.convert.onnx_int8 import OnnxInt8
from dsconvert.convert.record import tuning_report
from dsconvert.onnxfile.presets import Preset


def convert_onnx(job: Job, options: dict[str, Any]) -> Done:
    """Convert an ONNX file."""
    if job.calib is None:
        raise InputError("An ONNX file needs calibration images: give --calib FOLDER.")
    preset = chosen_input(options) or Preset()
    plan = OnnxPlan(
        options["bits"], options["block_size"], options["layout"], options["imgsz"] if given("imgsz") else None,
        options["samples"], preset.form, preset.decode, options["seed"], options["split"], options["strict"],
        options["activations"], options["target_bytes"], options["finetune_steps"], options["finetune_time"],
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
    document = {
        "path": str(written), "layout": plan.layout, "size_bytes": written.stat().st_size,
        "source_bytes": job.source.stat().st_size, "weight_bits": made.weight_bits, "calibration_images": made.images,
        "layers": [{"name": name, "shape": list(shape), "bits": bits} for name, shape, bits in made.table],
        **_activations_of(made),
    }  # fmt: skip
    return Done(
        written, len(made.skipped), made.skipped[0] if made.skipped else "", list(made.warnings), [], document,
        lambda: _print_onnx_layers(document), lambda seconds: _print_onnx(document, job.source, seconds),
    )  # fmt: skip


def _activations_of(made: OnnxConverted | OnnxInt8) -> dict[str, Any]:
    """Return whether activations are integers, and what stayed float: operators, and the share of multiplications."""
    if isinstance(made, OnnxConverted):
        return {"activations": "float"}
    return {
        "activations": "int8", "float_operators": dict(made.low.stayed),
        "float_multiplications": round(made.low.float_share, 6),
        "finetune": None if made.tuned is None else tuning_report(made.tuned),
    }  # fmt: skip


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
    if document["activations"] == "int8":
        stayed = ", ".join(f"{count} {kind}" for kind, count in document["float_operators"].items()) or "nothing"
        share = 100 * document["float_multiplications"]
        tell(f"Still float: {share:.1f} % of the multiplications, and these operators: {stayed}.")
    before, after = document["source_bytes"] / 1e6, document["size_bytes"] / 1e6
    tell(f"Wrote {document['path']} ({after:.2f} MB, {document['layout']}; {source.name} has {before:.2f} MB).")
