"""Size, latency, load and conversion time of dsconvert against peers; writes docs/performance.json and .md.

    python benchmarks/speed.py --checkpoint yolov5n.pt --data coco.yaml --sections latency openvino

Needs the `bench` extra and a quiet machine. What is compared takes turns: calls in one process, or fresh processes.
Models are kept in --work. Each section takes the place of its last result in docs/performance.json, and the page is
written from all results there are; --sections without a name writes the page alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from conversion import (
    measure_busy,
    measure_growth,
    measure_many,
    measure_memory,
    measure_networks,
    measure_quantize,
    measure_start,
)
from growth import SIZES
from inference import (
    ONNX_RUNTIME,
    measure_latency,
    measure_load,
    measure_mnn,
    measure_openvino,
    measure_profile,
    measure_roofline,
    measure_sizes,
)
from machine import cpu_name
from performance_page import write_page
from setting import Bench

from dsconvert.base.files import write_atomic
from dsconvert.scoring.bench import only_cpus

MEASURE: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "quantize": measure_quantize, "busy": measure_busy, "many": measure_many, "memory": measure_memory,
    "networks": measure_networks, "start": measure_start, "sizes": measure_sizes, "latency": measure_latency,
    "openvino": measure_openvino, "mnn": measure_mnn, "load": measure_load, "profile": measure_profile,
    "roofline": measure_roofline, "growth": measure_growth,
}  # fmt: skip
SECTIONS = tuple(MEASURE)
BY_ITSELF = ("busy", "start")  # take no checkpoint and no data


def machine(b: Bench, section: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    kind = "AVX-512 VNNI" if "avx512_vnni" in flags else "AVX VNNI" if "avx_vnni" in flags else "no VNNI"
    imgsz = b.growth_imgsz if section in ("growth", "networks") else b.imgsz
    named = {} if section in BY_ITSELF else {"checkpoint": b.checkpoint.name, "imgsz": imgsz}
    return {
        "cpu": cpu_name(), "int8": kind, "threads": b.threads, "versions": versions(),
        "load": round(os.getloadavg()[0], 1), **named,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the libraries that the figures depend on, where they are installed."""
    found = {}
    for name in ("torch", "numba", "onnxruntime", "openvino", "nncf", "MNN"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def parse() -> tuple[Bench, Sequence[str], Path]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="all sections but busy and start need it")
    parser.add_argument("--data", type=Path, help="calibration images, data.yaml or folder; needed by the same")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"), help="where models are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"), help="its .json is beside it")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model", type=Path, help="a converted model.safetensors to use instead of quantizing")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3, help="of quantize, busy, many, networks")
    parser.add_argument("--runs", type=int, default=100, help="rounds of every latency measurement")
    parser.add_argument("--loads", type=int, default=41, help="fresh processes a file is loaded in")
    parser.add_argument("--load-files", nargs="*", choices=ONNX_RUNTIME, default=list(ONNX_RUNTIME))
    parser.add_argument("--starts", type=int, default=41, help="fresh processes of every kind of start")
    parser.add_argument("--before", type=Path, help="start: a worktree of the commit to compare with")
    parser.add_argument("--many", type=int, nargs="+", default=[128, 512], help="many: numbers of images")
    parser.add_argument("--memory-samples", type=int, default=1024, help="memory: images")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[1, 3], help="busy: processes a core")
    parser.add_argument("--busy-samples", type=int, default=128, help="busy: most images of the demo, which has 64")
    parser.add_argument("--most-busy", type=float, default=3600, help="seconds after which a neighbour ends by itself")
    parser.add_argument("--growth-imgsz", type=int, default=320, help="growth and networks: pixels")
    parser.add_argument("--growth-images", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--growth-samples", type=int, default=8, help="images for every size of network")
    parser.add_argument("--growth-sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    args = vars(parser.parse_args())
    sections, out = args.pop("sections"), args.pop("out")
    if set(sections) - set(BY_ITSELF) and not (args["checkpoint"] and args["data"]):
        parser.error("--checkpoint and --data are needed by all sections but busy and start.")
    if "start" in sections and args["before"] is None:
        parser.error("start compares with --before, a worktree of an earlier commit.")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    return Bench(**args), sections, out


def read_results(path: Path) -> dict[str, Any]:
    """Every section's last result."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def keep_result(path: Path, name: str, found: dict[str, Any]) -> None:
    """Put a section's result in the place of its last one."""
    results = {**read_results(path), name: found}
    text = json.dumps({n: results[n] for n in SECTIONS if n in results}, indent=1) + "\n"
    write_atomic(path, text.encode(), force=True)


def main() -> None:
    bench, sections, out = parse()
    bench.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(bench.threads)
    kept = out.with_suffix(".json")
    with only_cpus(bench.threads):
        for name in SECTIONS:
            if name in sections:
                bench.say(f"== {name}")
                about = {
                    "command": shlex.join(["python", *sys.argv]), "date": datetime.date.today().isoformat(),
                    "machine": machine(bench, name),
                }  # fmt: skip
                keep_result(kept, name, {**about, **MEASURE[name](bench)})
    write_page(read_results(kept), out)
    bench.say(f"wrote {out}")


if __name__ == "__main__":
    main()
