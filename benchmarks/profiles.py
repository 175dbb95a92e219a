"""Where the time of an ONNX file goes in ONNX Runtime, by kind of node, and what the CPU's int8 kernels reach."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.graph.run import run_float
from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.operators import with_operators
from dsconvert.scoring.latency import interleaved_times

WARMUP = 5
# (channels, side, kernel) of convolutions that yolov5 has many of, and the side of square matrices
CONVS = ((64, 80, 3), (128, 40, 3), (256, 20, 3), (128, 80, 1), (256, 40, 1))
MATRICES = (512, 1024)
CHAIN = 4  # convolutions in a row, so that bringing the image into the kernels' order hardly counts


def op_times(path: Path, threads: int, runs: int) -> dict[str, float]:
    """Milliseconds a frame by kind of node, the medians over runs, most first. Takes one float image."""
    with tempfile.TemporaryDirectory() as folder:
        options = with_operators(ort.SessionOptions())
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        running = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        entry = running.get_inputs()[0]
        image = np.random.default_rng(0).random(entry.shape, np.float32)
        for _ in range(WARMUP + runs):
            running.run(None, {entry.name: image})
        events = json.loads(Path(running.end_profiling()).read_text())
    return by_kind(events, WARMUP)


def by_kind(events: Sequence[Mapping[str, Any]], warmup: int) -> dict[str, float]:
    """ONNX Runtime's profiling events -> milliseconds a run by kind of node, without the first `warmup` runs."""
    starts = sorted(e["ts"] for e in events if e.get("name") == "model_run")
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(starts))
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"):
            run = int(np.searchsorted(starts, e["ts"], side="right")) - 1
            sums[e["args"]["op_name"]][run] += e["dur"] / 1e3
    medians = {kind: float(np.median(times[warmup:])) for kind, times in sums.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def network_macs(graph: Graph, params: Mapping[str, ConvParams], side: int) -> int:
    """Multiplications of all convolutions for one image."""
    outputs: dict[str, int] = {}
    run_float(graph, params, torch.zeros(1, 3, side, side), lambda name, v: outputs.__setitem__(name, v.numel()))
    return sum(outputs[name] * p.weight[0].numel() for name, p in params.items())


def int8_peak(threads: int, runs: int) -> dict[str, float]:
    """Best GMAC/s of single kernels: convolutions and matrix products of sizes that suit them, by description."""
    models = {f"QLinearConv {c} channels, {k}x{k}, {s}x{s}": conv_chain(c, s, k) for c, s, k in CONVS}
    models |= {f"MatMulInteger {n}": matrix_product(n) for n in MATRICES}
    macs = [CHAIN * c * c * k * k * s * s for c, s, k in CONVS] + [n**3 for n in MATRICES]
    calls = []
    for made in models.values():
        running = session(made.SerializeToString(), threads)
        entry = running.inner.get_inputs()[0]
        feed = {entry.name: np.random.default_rng(0).integers(0, 256, entry.shape).astype(np.uint8)}
        calls.append(lambda running=running, feed=feed: running.inner.run(None, feed))
    times = interleaved_times(calls, runs, WARMUP)
    found = {name: count / t.min() / 1e6 for name, count, t in zip(models, macs, times, strict=True)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def conv_chain(channels: int, side: int, kernel: int) -> onnx.ModelProto:
    """CHAIN equal QLinearConv, uint8 (1, channels, side, side) in and out, no weight large enough to saturate."""
    weight = np.random.default_rng(0).integers(-63, 64, (channels, channels, kernel, kernel)).astype(np.int8)
    tensors = [
        numpy_helper.from_array(np.array(0.01, np.float32), "s"),
        numpy_helper.from_array(np.array(128, np.uint8), "z"),
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.array(0, np.int8), "zw"),
    ]
    names = ["x", *(f"v{i}" for i in range(CHAIN - 1)), "y"]
    nodes = [
        helper.make_node("QLinearConv", [a, "s", "z", "w", "s", "zw", "s", "z"], [b], pads=[kernel // 2] * 4)
        for a, b in pairwise(names)
    ]
    return _model(nodes, tensors, (1, channels, side, side), TensorProto.UINT8)


def matrix_product(side: int) -> onnx.ModelProto:
    """MatMulInteger of uint8 (side, side) with a constant int8 matrix."""
    matrix = np.random.default_rng(0).integers(-63, 64, (side, side)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    return _model([node], [numpy_helper.from_array(matrix, "w")], (side, side), TensorProto.INT32)


def _model(
    nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto], shape: tuple[int, ...], out: int
) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info("x", TensorProto.UINT8, shape),
        helper.make_tensor_value_info("y", out, shape),
    ]
    graph = helper.make_graph(nodes, "peak", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
