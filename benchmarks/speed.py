"""Size, latency, load and conversion time of dsconvert against int8 peers; writes docs/performance.md.

    python benchmarks/speed.py --checkpoint yolov5n.pt --data coco.yaml

Needs the `bench` extra and a quiet machine. All ratios are measured side by side in one process (load time: in fresh
processes, in turn). Models and results are kept in --work: --sections measures some parts again, and the page is
written from all results there are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import SIZES, fit_seconds, parameters, point, random_checkpoint
from machine import cpu_name
from numpy.typing import NDArray
from peers import nncf_int8, ort_static
from performance_page import write_page
from profiles import int8_peak, network_macs, op_times

from dsconvert.evaluate.bench import only_cpus
from dsconvert.evaluate.engines import engine_version, open_model
from dsconvert.evaluate.footprint import measure_footprint
from dsconvert.evaluate.latency import Times, interleaved_times, ratio, summary
from dsconvert.pipeline import QuantizeOptions, onnx_bytes, quantize, save_quantized
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.dataset import calibration_images
from dsconvert.yolo.images import calibration_batches, spread
from dsconvert.yolo.lower import lower

TURNS = 3  # of quantize and NNCF
SECTIONS = ("quantize", "sizes", "latency", "openvino", "load", "profile", "roofline", "growth")
ONNX_RUNTIME = ("float32", "packed", "fused", "int8", "ort-convs", "ort-all")
OPENVINO = ("nncf", "blocked", "packed", "float32")


@dataclass(frozen=True)
class Bench:
    """What to measure, where to keep it, and how thoroughly."""

    checkpoint: Path
    data: Path
    work: Path
    imgsz: int
    samples: int
    threads: int
    runs: int
    loads: int
    model: Path | None
    growth_imgsz: int
    growth_images: tuple[int, ...]
    growth_samples: int
    growth_sizes: tuple[str, ...]

    def say(self, text: str) -> None:
        """Progress, on stdout."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    @property
    def options(self) -> QuantizeOptions:
        """The product as it comes."""
        return QuantizeOptions(calib=self.data, imgsz=self.imgsz, samples=self.samples)

    def images(self) -> list[NDArray[np.float32]]:
        """The calibration images, decoded: the same for everybody."""
        paths = spread(calibration_images(self.data), self.samples)
        return [b.numpy() for b, _ in calibration_batches(paths, self.imgsz, 1)]

    def converted(self) -> Path:
        """The default model, quantized unless there is one."""
        path = self.model or self.work / "default" / "model.safetensors"
        if not path.exists():
            self.say("quantizing with the defaults")
            save_quantized(quantize(load_checkpoint(self.checkpoint), self.options), path.parent, force=True)
        return path

    def file(self, name: str) -> Path:
        """The file of a model by its short name, made unless it is there."""
        path = self.work / (f"{name}.xml" if name == "nncf" else f"{name}.onnx")
        if path.exists():
            return path
        self.say(f"making {path.name}")
        if name == "nncf":
            nncf_int8(self.file("float32"), path, self.images())
        elif name.startswith("ort-"):
            ort_static(self.file("float32"), path, self.images(), convs_only=name == "ort-convs")
        else:
            source = self.checkpoint if name == "float32" else self.converted()
            path.write_bytes(onnx_bytes(source, "packed" if name == "float32" else name, self.imgsz))
        return path


def measure_sizes(b: Bench) -> dict[str, Any]:
    """Bytes of every file; of NNCF's the weights alone."""
    files = {name: b.file(name) for name in (*ONNX_RUNTIME, "blocked")}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes["nncf weights"] = b.file("nncf").with_suffix(".bin").stat().st_size
    sizes["checkpoint"] = b.checkpoint.stat().st_size
    return {"bytes": sizes}


def _interleaved(b: Bench, names: Sequence[str], engine: str) -> dict[str, Times]:
    calls = [open_model(b.file(name), engine, b.threads, b.imgsz) for name in names]
    shown = max(1, b.runs // 5)

    def progress(done: int, total: int) -> None:
        if done % shown == 0:
            b.say(f"{engine}: round {done} of {total}")

    return dict(zip(names, interleaved_times(calls, b.runs, 5, 1800, progress), strict=True))


def _compared(times: Mapping[str, Times], base: str) -> dict[str, Any]:
    return {
        "base": base,
        "models": {n: asdict(summary(t)) for n, t in times.items()},
        "ratios": {n: asdict(ratio(t, times[base])) for n, t in times.items()},
    }


def measure_latency(b: Bench) -> dict[str, Any]:
    """All ONNX files in ONNX Runtime, against float32; ours also against the faster of the peers."""
    times = _interleaved(b, ONNX_RUNTIME, "onnxruntime")
    faster = min(("ort-convs", "ort-all"), key=lambda n: float(np.median(times[n])))
    against = {f"{n} / faster peer": asdict(ratio(times[n], times[faster])) for n in ("packed", "fused")}
    return {**_compared(times, "float32"), "faster peer": faster, **against}


def measure_openvino(b: Bench) -> dict[str, Any]:
    """Ours and NNCF's in OpenVINO, against NNCF's."""
    return _compared(_interleaved(b, OPENVINO, "openvino"), "nncf")


def measure_load(b: Bench) -> dict[str, Any]:
    """Milliseconds to load, and peak memory, of fresh processes in turn; against float32."""
    names = ONNX_RUNTIME
    feet: dict[str, list[Any]] = {n: [] for n in names}
    for turn in range(b.loads):
        for name in names:
            feet[name].append(measure_footprint(b.file(name), "onnxruntime", b.threads, b.imgsz))
        b.say(f"load: round {turn + 1} of {b.loads}")
    times = {n: np.array([f.load_ms for f in all_of]) for n, all_of in feet.items()}
    peaks = {n: int(np.median([f.peak_bytes for f in all_of])) for n, all_of in feet.items()}
    return {**_compared(times, "float32"), "peak bytes": peaks}


def measure_quantize(b: Bench) -> dict[str, Any]:
    """Seconds of quantize and of NNCF's post-training quantization on the same decoded images, in turn."""
    import nncf
    import openvino  # noqa: F401 (importing is no part of the time)

    source, images = b.file("float32"), b.images()
    theirs, ours = [], []
    for turn in range(TURNS):
        began = time.perf_counter()
        nncf_int8(source, b.work / "nncf-timed.xml", images)
        theirs.append(time.perf_counter() - began)
        seconds, decoding, used = fit_seconds(load_checkpoint(b.checkpoint), b.options)
        ours.append(seconds)
        b.say(f"turn {turn + 1} of {TURNS}: NNCF took {theirs[-1]:.1f} s, dsconvert {seconds:.1f} s")
    return {
        "seconds": ours, "nncf seconds": theirs, "decoding": decoding, "images": used, "nncf": nncf.__version__,
        "ratio": float(np.median(ours) / np.median(theirs)),
    }  # fmt: skip


def measure_profile(b: Bench) -> dict[str, Any]:
    """Milliseconds a frame by kind of node, of the float32, a peer's and the packed file."""
    return {n: op_times(b.file(n), b.threads, max(5, b.runs // 2)) for n in ("float32", "ort-all", "packed")}


def measure_roofline(b: Bench) -> dict[str, Any]:
    """Multiplications of the network, the best any int8 kernel reaches, and the packed file's time beside it."""
    checkpoint = load_checkpoint(b.checkpoint)
    macs = network_macs(*lower(checkpoint.network.fuse()), b.imgsz)
    peak = int8_peak(b.threads, max(5, b.runs // 2))
    times = _interleaved(b, ("packed",), "onnxruntime")["packed"]
    kernels = op_times(b.file("packed"), b.threads, max(5, b.runs // 2)).get("QLinearConv", 0.0)
    return {"macs": macs, "peak GMAC/s": peak, "packed ms": summary(times).median_ms, "QLinearConv ms": kernels}


def measure_growth(b: Bench) -> dict[str, Any]:
    """Seconds and peak memory of quantize by images, and by parameters."""
    images = []
    for count in b.growth_images:
        images.append({"images": count, **point(b.checkpoint, b.data, b.growth_imgsz, count, b.threads)})
        b.say(f"growth: {images[-1]}")
    sizes = []
    like = load_checkpoint(b.checkpoint)
    for size in b.growth_sizes:
        path = b.work / f"random-{size}.pt"
        if not path.exists():
            random_checkpoint(like, size, path)
        found = point(path, b.data, b.growth_imgsz, b.growth_samples, b.threads)
        sizes.append({"size": size, "parameters": parameters(path), **found})
        b.say(f"growth: {sizes[-1]}")
    return {"imgsz": b.growth_imgsz, "by images": images, "by size": sizes}


MEASURE: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "quantize": measure_quantize, "sizes": measure_sizes, "latency": measure_latency, "openvino": measure_openvino,
    "load": measure_load, "profile": measure_profile, "roofline": measure_roofline, "growth": measure_growth,
}  # fmt: skip


def machine(b: Bench) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    kind = "AVX-512 VNNI" if "avx512_vnni" in flags else "AVX VNNI" if "avx_vnni" in flags else "no VNNI"
    versions = {engine: engine_version(engine) for engine in ("onnxruntime", "openvino")}
    return {
        "cpu": cpu_name(), "int8": kind, "threads": b.threads, "imgsz": b.imgsz, "versions": versions,
        "checkpoint": b.checkpoint.name,
    }  # fmt: skip


def parse() -> tuple[Bench, Sequence[str], Path]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="calibration images: data.yaml or folder")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"))
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model", type=Path, help="a converted model.safetensors to use instead of quantizing")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=100, help="rounds of every latency measurement")
    parser.add_argument("--loads", type=int, default=11, help="fresh processes a file is loaded in")
    parser.add_argument("--growth-imgsz", type=int, default=320)
    parser.add_argument("--growth-images", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--growth-samples", type=int, default=16, help="images for every size of network")
    parser.add_argument("--growth-sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    args = vars(parser.parse_args())
    sections, out = args.pop("sections"), args.pop("out")
    args |= {key: tuple(args[key]) for key in ("growth_images", "growth_sizes")}
    return Bench(**args), sections, out


def main() -> None:
    bench, sections, out = parse()
    bench.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(bench.threads)
    with only_cpus(bench.threads):
        for name in SECTIONS:
            if name in sections:
                bench.say(f"== {name}")
                command = shlex.join(["python", *sys.argv])
                found = {"command": command, "machine": machine(bench), **MEASURE[name](bench)}
                (bench.work / f"{name}.json").write_text(json.dumps(found, indent=1))
    results = {n: json.loads(p.read_text()) for n in SECTIONS if (p := bench.work / f"{n}.json").exists()}
    write_page(results, out)
    bench.say(f"wrote {out}")


if __name__ == "__main__":
    main()
