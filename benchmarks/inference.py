"""Size, latency, load and where the time goes, of the files that `speed.py` makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from peers import mnn_predictor, openvino_model
from profiles import int8_peak, network_macs, op_times
from setting import MNN_BITS, Bench

from dsconvert.onnxfile.engines import open_model
from dsconvert.scoring.footprint import measure_footprint
from dsconvert.scoring.latency import Times, interleaved_times, ratio, summary
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.lower import lower

Call = Callable[[], object]
ONNX_RUNTIME = ("float32", "packed", "fused", "int8", "ort-convs", "ort-all", "ultralytics")
OPENVINO = ("nncf", "openvino", "blocked", "packed", "float32")
BESIDE_MNN = ("float32", "packed")
MOST_SECONDS = 3600  # of one section's rounds


def measure_sizes(b: Bench) -> dict[str, Any]:
    """Bytes of every file; of NNCF's the weights alone."""
    files = {name: b.file(name) for name in (*ONNX_RUNTIME, "blocked", "openvino", *MNN_BITS)}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes["nncf weights"] = b.file("nncf").with_suffix(".bin").stat().st_size
    sizes["checkpoint"] = b.checkpoint.stat().st_size
    return {"bytes": sizes}


def _interleaved(b: Bench, calls: Mapping[str, Call]) -> dict[str, Times]:
    shown = max(1, b.runs // 5)

    def progress(done: int, total: int) -> None:
        if done % shown == 0:
            b.say(f"round {done} of {total}")

    times = interleaved_times(list(calls.values()), b.runs, 5, MOST_SECONDS, progress)
    return dict(zip(calls, times, strict=True))


def _in_onnxruntime(b: Bench, names: Sequence[str]) -> dict[str, Call]:
    return {name: open_model(b.file(name), "onnxruntime", b.threads, b.imgsz) for name in names}


def _compared(times: Mapping[str, Times], base: str) -> dict[str, Any]:
    return {
        "base": base,
        "models": {n: asdict(summary(t)) for n, t in times.items()},
        "ratios": {n: asdict(ratio(t, times[base])) for n, t in times.items()},
    }


def measure_latency(b: Bench) -> dict[str, Any]:
    """All ONNX files in ONNX Runtime, against float32; ours also against the fastest of the peers."""
    times = _interleaved(b, _in_onnxruntime(b, ONNX_RUNTIME))
    faster = min(("ort-convs", "ort-all", "ultralytics"), key=lambda n: float(np.median(times[n])))
    against = {f"{n} / faster peer": asdict(ratio(times[n], times[faster])) for n in ("packed", "fused")}
    return {**_compared(times, "float32"), "faster peer": faster, **against}


def measure_openvino(b: Bench) -> dict[str, Any]:
    """Ours and NNCF's in OpenVINO, against NNCF's: what is float in them in f32, as where accuracy is measured, and,
    where the engine chooses another type by itself, in that too."""
    image = np.random.default_rng(0).random((1, 3, b.imgsz, b.imgsz), np.float32)
    calls: dict[str, Call] = {}
    for precision in ("f32", None):
        for name in OPENVINO:
            compiled, used = openvino_model(b.file(name), precision, b.threads)
            request = compiled.create_infer_request()
            calls.setdefault(f"{name} in {used}", lambda request=request: request.infer([image]))  # type: ignore[misc]
    return _compared(_interleaved(b, calls), "nncf in f32")


def measure_mnn(b: Bench) -> dict[str, Any]:
    """MNN's files in MNN, and ours and float32 beside them in ONNX Runtime, against float32 there."""
    image = np.random.default_rng(0).random((1, 3, b.imgsz, b.imgsz), np.float32)
    calls = _in_onnxruntime(b, BESIDE_MNN)
    for name in MNN_BITS:
        predict = mnn_predictor(b.file(name), b.threads)
        calls[name] = lambda predict=predict: predict(image)  # type: ignore[misc]
    return _compared(_interleaved(b, calls), "float32")


def measure_load(b: Bench) -> dict[str, Any]:
    """Milliseconds to load, and peak memory, of fresh processes in turn; against float32."""
    names = tuple(dict.fromkeys(("float32", *b.load_files)))
    feet: dict[str, list[Any]] = {n: [] for n in names}
    for turn in range(b.loads):
        for name in names:
            feet[name].append(measure_footprint(b.file(name), "onnxruntime", b.threads, b.imgsz))
        b.say(f"load: round {turn + 1} of {b.loads}")
    times = {n: np.array([f.load_ms for f in all_of]) for n, all_of in feet.items()}
    peaks = {n: int(np.median([f.peak_bytes for f in all_of])) for n, all_of in feet.items()}
    return {**_compared(times, "float32"), "peak bytes": peaks, "processes": b.loads}


def measure_profile(b: Bench) -> dict[str, Any]:
    """Milliseconds a frame by kind of node, of the float32, a peer's and the packed file."""
    return {n: op_times(b.file(n), b.threads, max(5, b.runs // 2)) for n in ("float32", "ort-all", "packed")}


def measure_roofline(b: Bench) -> dict[str, Any]:
    """Multiplications of the network, the best any int8 kernel reaches, and the packed file's time beside it."""
    checkpoint = load_checkpoint(b.checkpoint)
    macs = network_macs(*lower(checkpoint.network.fused()), b.imgsz)
    peak = int8_peak(b.threads, max(5, b.runs // 2))
    times = _interleaved(b, _in_onnxruntime(b, ("packed",)))["packed"]
    kernels = op_times(b.file("packed"), b.threads, max(5, b.runs // 2)).get("QLinearConv", 0.0)
    return {"macs": macs, "peak GMAC/s": peak, "packed ms": summary(times).median_ms, "QLinearConv ms": kernels}
