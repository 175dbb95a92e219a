"""The command `dsconvert bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dsconvert.base.size import Size
from dsconvert.commands.imagesize import Sized, imgsz
from dsconvert.commands.shared import PATH, as_json, bars, cell, console, print_json, quiet, short, table, tell, threads
from dsconvert.onnxfile.engines import ENGINES
from dsconvert.scoring.bench import Benchmarked
from dsconvert.scoring.bench import bench as measure


@click.command(cls=Sized)
@click.argument("models", type=PATH, nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--engine",
    "engines",
    type=click.Choice(ENGINES),
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    help="Engine to run in; may be given several times.",
)
@click.option("--runs", type=click.IntRange(2), default=50, show_default=True, help="Timed rounds, 60 s at most.")
@imgsz("Size of inputs that leave it open: 640, or 384 640 (height, width) (default: 640)")
@threads
@quiet
@as_json
def bench(
    models: tuple[Path, ...], engines: tuple[str, ...], runs: int, imgsz: Size | None, threads: int, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure the speed and memory of each ONNX MODEL.

    All models run in turn in one process, so that changes of the machine's speed affect all of them. Ratios are
    relative to the first row. Load time and peak memory are measured in fresh processes.

    Example: dsconvert bench float32.onnx packed.onnx --engine onnxruntime
    """
    with bars(quiet) as progress:
        rows = measure(models, tuple(dict.fromkeys(engines)), threads, runs, imgsz, progress)
    if as_json:
        print_json({"threads": threads, "models": [_row(r) for r in rows]})
        return
    _print(rows, threads, quiet)


def _row(r: Benchmarked) -> dict[str, Any]:
    return {
        "path": str(r.path), "engine": r.engine, "engine_version": r.engine_version, "size_bytes": r.size_bytes,
        "latency_ms": {"median": r.latency.median_ms, "min": r.latency.min_ms, "spread": r.latency.spread_ms,
                       "runs": r.latency.runs},
        "ratio": asdict(r.ratio), **asdict(r.footprint),
    }  # fmt: skip


def _print(rows: list[Benchmarked], threads: int, quiet: bool) -> None:
    shown = table("model", "engine", "ms", "min", "±", "ratio", "95 %", "load ms", "peak MB", "file MB")
    for r in rows:
        t, f = r.latency, r.footprint
        shown.add_row(
            cell(short(r.path)), r.engine, f"{t.median_ms:.1f}", f"{t.min_ms:.1f}", f"{t.spread_ms:.1f}",
            f"{r.ratio.value:.3f}", f"{r.ratio.low:.3f}..{r.ratio.high:.3f}", f"{f.load_ms:.0f}",
            "" if f.peak_bytes is None else f"{f.peak_bytes / 1e6:.0f}", f"{r.size_bytes / 1e6:.2f}",
        )  # fmt: skip
    console().print(shown)
    if quiet:
        return
    bases = {r.engine: r.footprint.base_bytes for r in rows}
    base = ", ".join(f"{b / 1e6:.0f} MB for {e}" for e, b in bases.items() if b is not None)
    tell(
        f"{threads} threads on as many CPUs. ms: median of {rows[0].latency.runs} interleaved runs; ±: interquartile "
        f"range; ratio: median divided by the first row's; load, peak: medians over fresh processes"
        + (f", which use {base} before loading." if base else "; this system does not tell their memory.")
    )
