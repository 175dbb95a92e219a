"""What layout fast gains: its file beside float32 and the stock layouts in one process, and the operator by itself.

    python benchmarks/fast.py --checkpoint yolov5n.pt --model model.safetensors

Needs dsconvert-ops (make ops). Files take turns; ratios are of medians with 95 % intervals over rounds, and of the
least times, which a busy machine disturbs less. Then: the operator alone on the maps that the network's SiLU has, by
every kernel of this processor on one thread; the same with a table for each channel; where the time of a frame goes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from machine import cpu_name
from onnx import TensorProto, helper, numpy_helper
from profiles import op_times
from silu import Maps, silu_maps

from dsconvert.convert.exporting import onnx_bytes
from dsconvert.export.weights.layouts import layout_named
from dsconvert.onnxfile.engines import open_model, session
from dsconvert.onnxfile.operators import DOMAIN, LOOKUP, library
from dsconvert.scoring.bench import only_cpus
from dsconvert.scoring.latency import Times, interleaved_times, ratio, summary

LAYOUTS = ("packed", "fused", "fast")
KERNELS = ("plain", "AVX2", "AVX-512 VBMI", "NEON")
Call = Callable[[], object]


def files(checkpoint: Path, model: Path, imgsz: int, folder: Path) -> dict[str, Path]:
    """The float network and every layout, written."""
    made = {}
    for name in ("float32", *LAYOUTS):
        source, layout = (checkpoint, "packed") if name == "float32" else (model, name)
        made[name] = folder / f"{name}.onnx"
        made[name].write_bytes(onnx_bytes(source, layout_named(layout), imgsz))
    return made


def equal(made: dict[str, Path], imgsz: int) -> bool:
    """Whether the layouts give the same boxes, bit for bit."""
    image = np.random.default_rng(0).random((1, 3, imgsz, imgsz), np.float32)
    outputs = [session(made[name], 2).run(None, {"images": image})[0] for name in LAYOUTS]
    return all(np.array_equal(outputs[0], other) for other in outputs[1:])


def against(times: dict[str, Times], name: str, base: str) -> str:
    """A ratio in words: of medians with its interval, and of the least."""
    r = ratio(times[name], times[base])
    return f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f}), least {times[name].min() / times[base].min():.3f}"


def kernel_calls(size: int) -> dict[str, Call]:
    """Every kernel of this processor over so many bytes, on one thread."""
    lookup = ctypes.CDLL(str(library())).dsconvert_ops_lookup
    lookup.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_size_t]
    rng = np.random.default_rng(0)
    table, x, y = (rng.integers(0, 256, n).astype(np.uint8) for n in (256, size, size))

    def call(name: str) -> Call:
        return lambda: (x, lookup(name.encode(), table.ctypes.data, x.ctypes.data, y.ctypes.data, size))

    return {n: call(n) for n in KERNELS if lookup(n.encode(), table.ctypes.data, x.ctypes.data, y.ctypes.data, 1)}


def node_call(maps: Maps, by_channel: bool, threads: int) -> Call:
    """All maps through nodes in ONNX Runtime, one table for all or one for each channel."""
    rng, nodes, ends, stored = np.random.default_rng(0), [], [], []
    for i, ((channels, high, wide), count) in enumerate(maps.items()):
        shape, x = (1, high, wide, channels), f"x{i}"
        tables = rng.integers(0, 256, (channels, 256) if by_channel else 256).astype(np.uint8)
        stored.append(numpy_helper.from_array(tables, f"t{i}"))
        for k in range(count):
            nodes.append(helper.make_node(LOOKUP, [f"t{i}", x], [f"y{i}.{k}"], domain=DOMAIN))
            x = f"y{i}.{k}"
        ends.append([helper.make_tensor_value_info(n, TensorProto.UINT8, shape) for n in (f"x{i}", x)])
    graph = helper.make_graph(nodes, "lookups", [a for a, _ in ends], [b for _, b in ends], stored)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    running = session(model.SerializeToString(), threads).inner
    feed = {e.name: rng.integers(0, 256, e.shape).astype(np.uint8) for e in running.get_inputs()}
    return lambda: running.run(None, feed)


def timed(calls: dict[str, Call], rounds: int) -> dict[str, Times]:
    """Milliseconds of each, all in turn."""
    return dict(zip(calls, interleaved_times(list(calls.values()), rounds, 5, 600), strict=True))


def shown(title: str, times: dict[str, Times]) -> None:
    """A table of least and median."""
    print(f"\n| {title} | ms, least | median |\n|---|---|---|")
    for name, taken in times.items():
        s = summary(taken)
        print(f"| {name} | {s.min_ms:.2f} | {s.median_ms:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint, converted")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    if library() is None:
        raise SystemExit("dsconvert-ops is not installed: make ops")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, only_cpus(given.threads):
        made = files(given.checkpoint, given.model, given.imgsz, Path(name))
        print(f"{given.threads} threads of {cpu_name()}, onnxruntime {ort.__version__}, load average {load:.1f}")
        print(f"boxes of {', '.join(LAYOUTS)} equal, bit for bit: {equal(made, given.imgsz)}")
        calls = {n: open_model(path, "onnxruntime", given.threads, given.imgsz) for n, path in made.items()}
        times = timed(calls, given.rounds)
        shown("file", times)
        for n in LAYOUTS:
            print(f"{n} against float32: {against(times, n, 'float32')}")
        print(f"fast against packed: {against(times, 'fast', 'packed')}")
        maps: Maps = silu_maps(given.checkpoint, given.imgsz)
        size = sum(int(np.prod(shape)) * count for shape, count in maps.items())
        shown(f"kernel, one thread, {size / 1e6:.1f} MB", timed(kernel_calls(size), given.rounds // 2))
        nodes = {
            "one table": node_call(maps, False, given.threads),
            "one for each channel": node_call(maps, True, given.threads),
        }
        shown(f"{maps.total()} nodes, {given.threads} threads", timed(nodes, given.rounds // 2))
        profiles = {n: op_times(made[n], given.threads, given.rounds // 2) for n in ("packed", "fast")}
    kinds = Counter({kind: max(p.get(kind, 0.0) for p in profiles.values()) for p in profiles.values() for kind in p})
    print("\n| node | packed | fast |\n|---|---|---|")
    for kind, most in kinds.most_common():
        if most >= 0.05:
            print(f"| {kind} | {profiles['packed'].get(kind, 0):.2f} | {profiles['fast'].get(kind, 0):.2f} |")


if __name__ == "__main__":
    main()
