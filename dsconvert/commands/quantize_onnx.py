"""dsconvert quantize, of a float ONNX file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsconvert.anyonnx.convert import OnnxConverted, OnnxPlan, quantize_onnx
from dsconvert.anyonnx.images import Normalisation
from dsconvert.commands.folders import refuse_to_lose
from dsconvert.commands.shared import RUNS, bars, cell, console, in_options, print_json, table, tell, warn
from dsconvert.errors import InputError
from dsconvert.files import check_target, check_writable, claim_folder, scratch_in, write_atomic
from dsconvert.notes import so_far

# What only a checkpoint can be asked for, and what only an ONNX file can.
CHECKPOINT_ONLY = ("target_bytes", "target_drop", "blocks", "scope", "cfg", "activations", "kds", "device",
                   "resume", "finetune_steps", "finetune_time")  # fmt: skip
ONNX_ONLY = ("layout", "mean", "std")


class Numbers(click.ParamType):
    """One or several numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not numbers such as 0.485,0.456,0.406.", param, ctx)


def refuse_onnx_only() -> None:
    """Raises InputError when an option that is for ONNX files was given."""
    for name in ONNX_ONLY:
        if _given(name):
            raise InputError(f"--{name} is for an ONNX file; a checkpoint has no use for it.")


def run(path: Path, calib: Path | None, out: Path | None, cache: Path | None, options: Mapping[str, Any]) -> None:
    """Convert the file, write it and say so. `options` are the command's, by parameter. Values of the network wait in
    the folder `cache`, or beside the file to come."""
    began = time.perf_counter()
    for parameter in click.get_current_context().command.params:
        name = str(parameter.name)
        harmless = (name, options.get(name)) in (("activations", "float"), ("kds", "int"))
        if name in CHECKPOINT_ONLY and _given(name) and not harmless:
            raise InputError(
                f"{parameter.opts[0]} is for a checkpoint; of an ONNX file the weights alone are quantized, "
                "with --bits in every layer."
            )
    if calib is None:
        raise InputError("An ONNX file is converted on images: give --calib FOLDER.")
    plan = OnnxPlan(
        options["bits"] or 4, options["block_size"] or 32, options["layout"],
        options["imgsz"] if _given("imgsz") else None, options["samples"], _normal(options), options["seed"],
        options["split"], options["strict"],
    )  # fmt: skip
    force, quiet = options["force"], options["quiet"]
    single = out is not None and out.suffix == ".onnx"
    name = f"{path.stem}-{plan.layout}.onnx"
    place = out.parent if out and single else out or RUNS
    check_writable(place)
    if cache is not None:
        check_writable(cache)
    target = None if out is None else out if single else out / name
    if target is not None:
        refuse_to_lose([target], [path, calib])
        check_target(target, force)
    with scratch_in(cache or place), bars(quiet, lines=True) as progress:
        made = quantize_onnx(path, calib, plan, progress, warn)
    data = made.model.SerializeToString()
    target = target or claim_folder(RUNS / path.stem) / name
    write_atomic(target, data, force)
    _tell(made, path, target, plan, options, time.perf_counter() - began)


def _given(name: str) -> bool:
    """Whether an option was typed or configured."""
    return click.get_current_context().get_parameter_source(name) not in (None, ParameterSource.DEFAULT)


def _normal(options: Mapping[str, Any]) -> Normalisation | None:
    if options["mean"] is None and options["std"] is None:
        return None
    return Normalisation(options["mean"] or (0.0,), options["std"] or (1.0,))


def _tell(
    made: OnnxConverted, source: Path, target: Path, plan: OnnxPlan, options: Mapping[str, Any], seconds: float
) -> None:
    if made.skipped:
        warn(f"{len(made.skipped)} images could not be read and were left out; the first: {made.skipped[0]}")
    before, after = source.stat().st_size, target.stat().st_size
    layers = [
        {"name": layer.name, "shape": list(layer.weight.shape), "bits": made.fitted[layer.index].weight.bits}
        for layer in made.layers
    ]
    if options["as_json"]:
        document = {
            "path": str(target), "layout": plan.layout, "size_bytes": after, "source_bytes": before,
            "weight_bits": made.weight_bits, "calibration_images": made.images, "layers": layers,
            "seconds": round(seconds, 2), "warnings": [*so_far(), *map(in_options, made.warnings)],
        }  # fmt: skip
        print_json(document)
        return
    if options["quiet"]:
        tell(str(target))
        return
    if options["verbose"]:
        shown = table("layer", "shape", "bits")
        for layer in made.layers:
            shape = "x".join(map(str, layer.weight.shape))
            shown.add_row(cell(layer.name), shape, str(made.fitted[layer.index].weight.bits))
        console().print(shown)
    tell(
        f"Converted {len(layers)} layers to DSConv, {made.weight_bits:.2f} bits a weight, on {made.images} images in "
        f"{seconds:.0f} s."
    )
    tell(f"Wrote {target} ({after / 1e6:.2f} MB, {plan.layout}; {source.name} has {before / 1e6:.2f} MB).")
