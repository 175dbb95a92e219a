"""The command `dsconvert info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import CHECKPOINT, MODEL, file_kind
from dsconvert.commands.shared import PATH, RUNS, as_json, cell, console, print_json, table, tell
from dsconvert.convert import exporting
from dsconvert.convert.record import layer_table
from dsconvert.model.file import load_model
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.external import parsed
from dsconvert.onnxfile.inspect import conv_weights
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.lower import lower

MAX_COUNT = 1 << 40  # weights of one layer, and bytes


@click.command()
@click.argument("model", type=PATH, required=False)
@as_json
def info(model: Path | None, as_json: bool) -> None:
    """Show the layers of MODEL: shapes, kinds, bits, bytes.

    Example: dsconvert info runs/dsconvert/best/model.safetensors
    """
    path = model or exporting.newest_result(RUNS)
    facts = _facts(path)
    if as_json:
        print_json({"path": str(path), **facts})
        return
    harm = _harm(facts["layers"])
    shown = table("layer", "shape", "kind", "bits", "block", "bytes", *(("harm at 4 bits", "harm") if harm else ()))
    for row in facts["layers"]:
        shape = "x".join(map(str, row["shape"]))
        block = str(row.get("block_size") or "")
        cells = (cell(row["name"]), shape, cell(row["kind"]), str(row["bits"]), block, f"{row['bytes']:,}")
        shown.add_row(*cells, *harm.get(row["name"], ()))
    console().print(shown)
    if harm:
        tell("harm: expected share of the damage to the detections, relative to 4 bits in every layer.")
    stored = sum(row["bytes"] for row in facts["layers"])
    full = sum(row["float32_bytes"] for row in facts["layers"])
    tell(
        f"{path}: file {facts['size_bytes'] / 1e6:.2f} MB; weights {stored / 1e6:.2f} MB, "
        f"float32 {full / 1e6:.2f} MB, {full / max(stored, 1):.2f} times smaller."
    )


def _harm(layers: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return by layer the damage expected at 4 bits and at the layer's bits, in per cent of 4 bits in every layer."""
    known = {row["name"]: (row["damage"], str(row["bits"])) for row in layers if row.get("damage")}
    total = sum(damage["4"] for damage, _ in known.values()) or 1.0
    return {name: (f"{100 * d['4'] / total:.2f} %", f"{100 * d[b] / total:.2f} %") for name, (d, b) in known.items()}


def _facts(path: Path) -> dict[str, Any]:
    """Return the layers of any model file."""
    kind = file_kind(path)
    if kind == CHECKPOINT:
        network = load_checkpoint(path).network.fused()
        graph, params = lower(network)
        convs = [(n.name.removesuffix(".conv"), tuple(params[n.name].weight.shape)) for n in graph.convs()]
        rows = [_plain_row(name, shape, "float32", 32) for name, shape in convs]
    elif kind == MODEL:
        model = load_model(path)
        return {"format": "safetensors", "size_bytes": path.stat().st_size, **_model_facts(model)}
    else:
        try:
            weights = conv_weights(parsed(path).model)
        except InputError:
            raise
        except Exception:  # onnx raises many kinds on malformed files
            raise InputError(f"{path} is not a readable ONNX file.") from None
        if any(max(w.count, w.bits // 8) > MAX_COUNT for w in weights):
            raise InputError(f"{path} declares larger weights than any file holds.")
        rows = [{**_plain_row(w.name, w.shape, w.type, 0), "bits": round(w.bits / max(w.count, 1), 3),
                 "bytes": w.bits // 8} for w in weights]  # fmt: skip
    return {"format": kind, "size_bytes": path.stat().st_size, "layers": rows}


def _model_facts(model: DSModel) -> dict[str, Any]:
    return {
        "layers": layer_table(model),
        "weight_bits": round(model.weight_bits, 4),
        "provenance": model.provenance,
    }


def _plain_row(name: str, shape: tuple[int, ...], kind: str, bits: int) -> dict[str, Any]:
    count = 1
    for n in shape:
        count *= n
    return {"name": name, "shape": list(shape), "kind": kind, "bits": bits, "block_size": None,
            "bytes": count * bits // 8, "float32_bytes": count * 4}  # fmt: skip
