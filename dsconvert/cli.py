"""The command line: parse, call the pipeline, print.

Exit codes: 0 done, 1 a fault of dsconvert, 2 bad input or a machine that refuses (memory, disk), 130 interrupted."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import click
import onnx
from rich.table import Table

import dsconvert
from dsconvert import pipeline
from dsconvert.commands.bench import bench
from dsconvert.commands.export import export
from dsconvert.commands.shared import PATH, RUNS, as_json, bars, console, force, print_json, say, short, threads
from dsconvert.errors import CheckError, InputError, system_fault
from dsconvert.evaluate.candidates import Candidate
from dsconvert.export.inspect import conv_weights
from dsconvert.files import check_writable, claim_folder
from dsconvert.model import DSModel
from dsconvert.modelfile import load_model
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.lower import lower
from dsconvert.yolo.plan import SCOPES


class ByteSize(click.ParamType):
    """A number of bytes as people write it: 900000, 900kB, 0.9MB (powers of ten)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size such as 0.9MB, 900kB or 900000.", param, ctx)
        return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6}[found[2]])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(dsconvert.__version__, prog_name="dsconvert")
def cli() -> None:
    """Make a trained YOLOv5 detector several times smaller and faster.

    \b
    dsconvert quantize best.pt --calib images/   fit 4-bit DSConv weights
    dsconvert export --onnx                      integer weights in ONNX
    dsconvert eval --data data.yaml              accuracy, size, latency
    dsconvert bench a.onnx b.onnx                speed and memory, side by side
    """


@cli.command()
@click.argument("checkpoint", type=PATH)
@click.option("--calib", type=PATH, help="Folder of images, data.yaml, or text file of paths.")
@click.option("--block-size", default=32, show_default=True, help="Input channels a shift covers.")
@click.option("--bits", type=click.IntRange(2, 8), help="Bits of every weight (default: mixed, 4 on average).")
@click.option("--target-size", "target_bytes", type=ByteSize(), metavar="SIZE",
              help="Largest packed ONNX file, such as 0.9MB; layers share it.")  # fmt: skip
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
@force
@as_json
def quantize(
    checkpoint: Path,
    calib: Path | None,
    threads: int,
    out: Path | None,
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
    with bars() as progress:
        result = pipeline.quantize(
            loaded,
            pipeline.QuantizeOptions(calib=calib, **options),
            shlex.join(["dsconvert", *sys.argv[1:]]),
            progress,
        )
    folder = out or claim_folder(RUNS / checkpoint.stem)  # now, not before: another run may have taken the name
    written = pipeline.save_quantized(result, folder, force)
    seconds = time.perf_counter() - began
    if as_json:
        report = pipeline.quantize_report(result)
        print_json({**report, "path": str(written), "seconds": round(seconds, 2)})
        return
    if result.skipped:
        say(f"{result.skipped} images could not be read and were left out; the first: {result.skipped_reason}")
    _print_quantized(result, loaded.size_bytes, written, seconds)


@cli.command("eval")
@click.argument("models", type=PATH, nargs=-1, metavar="[MODEL]...")
@click.option("--data", type=PATH, help="data.yaml with labels, or a folder of images without.")
@click.option("--imgsz", type=int, help="Side of the images, pixels (default: as exported).")
@click.option("--samples", type=click.IntRange(1), help="Most images used.")
@threads
@as_json
def evaluate(
    models: tuple[Path, ...], data: Path | None, imgsz: int | None, samples: int | None,
    threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure accuracy, size and latency of each MODEL on labelled images.

    MODEL is a .pt, .safetensors or .onnx file; by default the newest quantize
    result and the checkpoint it came from. Latency is ONNX Runtime's for all.
    --data defaults to what was calibrated on. Without labels (a folder), the
    truth is what the first model finds: the others' rows are agreement.

    Example: dsconvert eval best.pt best.onnx --data data.yaml
    """
    paths = list(models)
    if not paths or data is None:
        newest = pipeline.newest_result(RUNS)
        provenance = load_model(newest).provenance
        paths = paths or [Path(provenance["source"]), newest]
        data = data or _data_of(provenance)
    with bars() as progress:
        rows = pipeline.evaluate(paths, data, imgsz, samples, progress)
    if as_json:
        print_json({"models": [_row(r) for r in rows], "data": str(data)})
        return
    _print_evaluation(rows)


@cli.command()
@click.argument("model", type=PATH, required=False)
@as_json
def info(model: Path | None, as_json: bool) -> None:
    """Show the layers of MODEL: shapes, kinds, bits, bytes.

    Example: dsconvert info runs/dsconvert/best/model.safetensors
    """
    path = model or pipeline.newest_result(RUNS)
    facts = _facts(path)
    if as_json:
        print_json({"path": str(path), **facts})
        return
    harm = _harm(facts["layers"])
    table = Table("layer", "shape", "kind", "bits", "block", "bytes", *(("harm at 4 bits", "harm") if harm else ()))
    for row in facts["layers"]:
        shape = "x".join(map(str, row["shape"]))
        block = str(row.get("block_size") or "")
        cells = (row["name"], shape, row["kind"], str(row["bits"]), block, f"{row['bytes']:,}")
        table.add_row(*cells, *harm.get(row["name"], ()))
    console().print(table)
    if harm:
        click.echo("harm: expected share of the damage that 4 bits in every layer would do to the detections.")
    stored = sum(row["bytes"] for row in facts["layers"])
    full = sum(row["float32_bytes"] for row in facts["layers"])
    click.echo(
        f"{path}: file {facts['size_bytes'] / 1e6:.2f} MB; weights {stored / 1e6:.2f} MB, "
        f"float32 {full / 1e6:.2f} MB, {full / max(stored, 1):.2f} times smaller."
    )


def _harm(layers: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """By layer, the damage expected at 4 bits and at the bits it got, in per cent of that of 4 bits everywhere."""
    known = {row["name"]: (row["damage"], str(row["bits"])) for row in layers if row.get("damage")}
    total = sum(damage["4"] for damage, _ in known.values()) or 1.0
    return {name: (f"{100 * d['4'] / total:.2f} %", f"{100 * d[b] / total:.2f} %") for name, (d, b) in known.items()}


def _facts(path: Path) -> dict[str, Any]:
    """Layer rows of any model file."""
    if path.suffix == ".pt":
        network = load_checkpoint(path).network.fuse()
        graph, params = lower(network)
        convs = [(n.name.removesuffix(".conv"), tuple(params[n.name].weight.shape)) for n in graph.convs()]
        rows = [_plain_row(name, shape, "float32", 32) for name, shape in convs]
    elif path.suffix == ".safetensors":
        model = load_model(path)
        return {"format": "safetensors", "size_bytes": path.stat().st_size, **_model_facts(model)}
    elif path.suffix == ".onnx" and path.is_file():
        try:
            weights = conv_weights(onnx.load(path, load_external_data=False))
        except Exception:  # onnx raises many kinds on malformed files
            raise InputError(f"{path} is not a readable ONNX file.") from None
        rows = [{**_plain_row(w.name, w.shape, w.type, 0), "bits": round(w.bits / max(w.count, 1), 3),
                 "bytes": w.bits // 8} for w in weights]  # fmt: skip
    else:
        raise InputError(f"{path} is not a .pt, .safetensors or .onnx file that is there.")
    return {"format": path.suffix[1:], "size_bytes": path.stat().st_size, "layers": rows}


def _model_facts(model: DSModel) -> dict[str, Any]:
    return {
        "layers": pipeline.layer_table(model),
        "weight_bits": round(model.weight_bits, 4),
        "provenance": model.provenance,
    }


def _plain_row(name: str, shape: tuple[int, ...], kind: str, bits: int) -> dict[str, Any]:
    count = 1
    for n in shape:
        count *= n
    return {"name": name, "shape": list(shape), "kind": kind, "bits": bits, "block_size": None,
            "bytes": count * bits // 8, "float32_bytes": count * 4}  # fmt: skip


def _data_of(provenance: Any) -> Path:
    calib = provenance["options"]["calib"]
    if not calib:
        raise InputError("Which images? Give --data data.yaml, or a folder of images to measure agreement.")
    return Path(calib)


def _row(r: pipeline.Evaluated) -> dict[str, Any]:
    c, m, t = r.candidate, r.metrics, r.latency
    return {
        "path": str(c.path), "format": c.format, "map50_95": m.map50_95, "map50": m.map50, "precision": m.precision,
        "recall": m.recall, "size_bytes": c.size_bytes, "weight_bits": c.weight_bits,
        "latency_ms": {"median": t.median_ms, "min": t.min_ms, "spread": t.spread_ms}, "images": m.images,
        "skipped": len(m.skipped),
    }  # fmt: skip


def _print_evaluation(rows: list[pipeline.Evaluated]) -> None:
    table = Table("model", "mAP50-95", "mAP50", "P", "R", "MB", "bits", "ms", "±")
    for r in rows:
        m, t, c = r.metrics, r.latency, r.candidate
        table.add_row(
            short(c.path), f"{m.map50_95:.4f}", f"{m.map50:.4f}", f"{m.precision:.3f}", f"{m.recall:.3f}",
            f"{c.size_bytes / 1e6:.2f}", _bits(c), f"{t.median_ms:.1f}", f"{t.spread_ms:.1f}",
        )  # fmt: skip
    console().print(table)
    m = rows[0].metrics
    if m.skipped:
        say(f"{len(m.skipped)} images could not be read and were left out; the first: {m.skipped[0]}")
    click.echo(
        f"{m.images} images. bits: stored bits a weight. ms: median of {rows[0].latency.runs} interleaved ONNX "
        "Runtime runs; ±: interquartile range."
    )


def _bits(c: Candidate) -> str:
    return f"{c.weight_bits:.2f}"


def _print_quantized(result: pipeline.Quantized, source_bytes: int, written: Path, seconds: float) -> None:
    model = result.model
    kinds = [row["kind"] for row in pipeline.layer_table(model)]
    size = written.stat().st_size
    click.echo(
        f"Converted {kinds.count('DSConv')} of {len(kinds)} convolutions to DSConv, the others to int8, "
        f"on {result.images} images in {seconds:.0f} s."
    )
    click.echo(
        f"Weights: {model.weight_bits:.2f} bits each, {32 / model.weight_bits:.2f} times smaller than float32. "
        f"File: {size / 1e6:.2f} MB (checkpoint {source_bytes / 1e6:.2f} MB)."
    )
    click.echo(f"Wrote {written}")
    click.echo("Next: dsconvert export --onnx")


cli.add_command(export)
cli.add_command(bench)


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2; only a fault of ours shows a traceback."""
    try:
        cli.main(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except click.exceptions.Abort:
        _fail("Interrupted.", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except CheckError as error:
        _fail(str(error), 1)
    except Exception as error:
        if said := system_fault(error):
            _fail(said, 2)
        traceback.print_exc()
        _fail("This is a fault of dsconvert; please report it with the lines above.", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
