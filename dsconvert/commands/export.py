"""dsconvert export."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from dsconvert import pipeline
from dsconvert.commands.shared import PATH, RUNS, as_json, force, print_json
from dsconvert.errors import InputError
from dsconvert.export.layouts import LAYOUT_OPSET
from dsconvert.files import write_atomic


@click.command()
@click.argument("model", type=PATH, required=False)
@click.option("--onnx", "to_onnx", is_flag=True, help="Write ONNX (the one format so far).")
@click.option("--layout", type=click.Choice(list(LAYOUT_OPSET)), default="packed", show_default=True,
              help="packed: smallest file. blocked: ONNX block scales. int8: runs on old engines.")  # fmt: skip
@click.option("--imgsz", type=int, help="Side of the input, pixels (default: as calibrated).")
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open.")
@click.option("--out", type=PATH, help="File to write (default: beside the model).")
@force
@as_json
def export(
    model: Path | None, to_onnx: bool, layout: str, imgsz: int | None, dynamic_batch: bool, out: Path | None,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write MODEL (default: the newest quantize result) as ONNX.

    A .pt gives the float32 network, for comparison.

    Example: dsconvert export --onnx --layout packed
    """
    if not to_onnx:
        raise InputError("Say what to export to: dsconvert export --onnx.")
    path = model or pipeline.newest_result(RUNS)
    float_source = path.suffix == ".pt"
    suffix = "float32" if float_source else layout
    target = out or path.with_name(f"{path.stem}-{suffix}.onnx")
    data = pipeline.onnx_bytes(path, layout, imgsz, dynamic_batch)
    write_atomic(target, data, force)
    if as_json:
        print_json({"path": str(target), "layout": suffix, "size_bytes": len(data)})
        return
    click.echo(f"Wrote {target} ({len(data) / 1e6:.2f} MB, {suffix}).")
    click.echo(f"Next: dsconvert eval {shlex.quote(str(target))} --data data.yaml")
