"""What ONNX Runtime's own operators take to do SiLU on bytes, each way as a graph of its own.

    python benchmarks/silu.py --checkpoint yolov5n.pt --imgsz 640

The maps are those that SiLU has in the checkpoint's network: for each shape an input of the graph, and behind it as
many activations in a row as the network has of that shape. All ways take turns in one process. The last column is by
how many steps a way's integers are away from the integer reference's table (`graph.activations.activation_table`), at
most over the 256 inputs. Ways that do another function entirely are here to say what one pass over the maps costs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from machine import cpu_name
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dsconvert.graph.activations import activation_table
from dsconvert.graph.grids import SIGMOID, QParams
from dsconvert.graph.ir import Shape
from dsconvert.graph.shapes import value_shapes
from dsconvert.scoring.bench import only_cpus
from dsconvert.scoring.latency import interleaved_times, ratio, summary
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.lower import lower

SOURCE, TARGET = QParams.of_range(-8.0, 8.0), QParams.of_range(-0.28, 8.0)
TABLE = activation_table("SiLU", SOURCE, TARGET)
MICROSOFT = "com.microsoft"
OPSET = 24  # the first with Swish
TODAY = "QLinearSigmoid, QLinearMul"
Maps = Counter[Shape]  # how many maps of each shape (channels, h, w) there are


class Part:
    """Nodes and constants of one activation after the other."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: Any, kind: type[Any]) -> str:
        """An initializer, made once."""
        self.tensors.setdefault(name, numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def grid(self, name: str, grid: QParams) -> list[str]:
        """Scale and zero point."""
        return [
            self.constant(f"{name}.scale", grid.scale, np.float32),
            self.constant(f"{name}.zero", grid.zero_point, np.uint8),
        ]

    def node(self, kind: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        """The name of what a new node makes."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def real(self, x: str) -> str:
        """Bytes -> real."""
        return self.node("DequantizeLinear", [x, *self.grid("source", SOURCE)])

    def bytes(self, x: str) -> str:
        """Real -> bytes."""
        return self.node("QuantizeLinear", [x, *self.grid("target", TARGET)])


def _today(p: Part, x: str) -> str:
    source, gate, target = p.grid("source", SOURCE), p.grid("gate", SIGMOID), p.grid("target", TARGET)
    s = p.node("QLinearSigmoid", [x, *source, *gate], MICROSOFT)
    return p.node("QLinearMul", [x, *source, s, *gate, *target], MICROSOFT)


def _in_float(p: Part, x: str) -> str:
    real = p.real(x)
    return p.bytes(p.node("Mul", [real, p.node("Sigmoid", [real])]))


def _looked_up(index: int, kind: str) -> Callable[[Part, str], str]:
    """By an operator that takes numbers of a table by their places."""

    def way(p: Part, x: str) -> str:
        table, places = p.constant("table", TABLE, np.uint8), p.node("Cast", [x], to=index)
        if kind == "GatherND":
            places = p.node("Unsqueeze", [places, p.constant("last", [-1], np.int64)])
        return p.node(kind, [table, places])

    return way


def _one_pass(kind: str, **attributes: Any) -> Callable[[Part, str], str]:
    """By an operator with a table of its own inside; another function."""
    return lambda p, x: p.node(kind, [x, *p.grid("source", SOURCE), *p.grid("target", TARGET)], MICROSOFT, **attributes)


def _requantised(p: Part, x: str) -> str:
    return p.node("QLinearConcat", [*p.grid("target", TARGET), x, *p.grid("source", SOURCE)], MICROSOFT, axis=0)


def _softmax(p: Part, x: str) -> str:
    grids = [*p.grid("source", SOURCE), *p.grid("gate", SIGMOID)]
    return p.node("QLinearSoftmax", [x, *grids], MICROSOFT, axis=-1, opset=13)


@dataclass(frozen=True)
class Way:
    """One way to do it."""

    name: str  # for people
    add: Callable[[Part, str], str]  # the name of bytes -> the name of its activation, bytes too
    silu: bool = True  # whether it is SiLU at all


WAYS = (
    Way(TODAY, _today),
    Way("DequantizeLinear, Sigmoid, Mul, QuantizeLinear", _in_float),
    Way("DequantizeLinear, QuickGelu, QuantizeLinear", lambda p, x: p.bytes(
        p.node("QuickGelu", [p.real(x)], MICROSOFT, alpha=1.0))),
    Way("DequantizeLinear, Swish (opset 24), QuantizeLinear", lambda p, x: p.bytes(p.node("Swish", [p.real(x)]))),
    Way("DequantizeLinear, ScaledSiLU, QuantizeLinear", lambda p, x: p.bytes(
        p.node("ScaledSiLU", [p.real(x)], MICROSOFT))),
    Way("Cast to INT32, Gather from a table", _looked_up(TensorProto.INT32, "Gather")),
    Way("Cast to INT64, Gather from a table", _looked_up(TensorProto.INT64, "Gather")),
    Way("Cast to INT64, GatherND from a table", _looked_up(TensorProto.INT64, "GatherND")),
    Way("QLinearSigmoid alone", _one_pass("QLinearSigmoid"), False),
    Way("QLinearLeakyRelu alone", _one_pass("QLinearLeakyRelu", alpha=0.1), False),
    Way("QLinearConcat of one input", _requantised, False),
    Way("QLinearSoftmax alone", _softmax, False),
)  # fmt: skip


def silu_maps(checkpoint: Path, imgsz: int) -> Maps:
    """The maps that SiLU has in a network at a size."""
    graph, params = lower(load_checkpoint(checkpoint).network.fused())
    shapes = value_shapes(graph, {name: p.weight.shape for name, p in params.items()}, (3, imgsz, imgsz))
    return Counter(shapes[n.name] for n in graph.nodes if n.op == "act" and n.attrs["kind"] == "SiLU")


def graph_of(way: Way, maps: Maps) -> onnx.ModelProto:
    """The way on every map: one input a shape, channels last, and the activations in a row."""
    part, inputs, outputs = Part(), [], []
    for i, ((channels, high, wide), count) in enumerate(maps.items()):
        shape, x = (1, high, wide, channels), f"x{i}"
        inputs.append(helper.make_tensor_value_info(x, TensorProto.UINT8, shape))
        for _ in range(count):
            x = way.add(part, x)
        outputs.append(helper.make_tensor_value_info(x, TensorProto.UINT8, shape))
    graph = helper.make_graph(part.nodes, "silu", inputs, outputs, list(part.tensors.values()))
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def opened(model: onnx.ModelProto, threads: int, keep: Path | None = None) -> ort.InferenceSession:
    """A session of the graph; what ONNX Runtime makes of it is kept in a file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if keep:
        options.optimized_model_filepath = str(keep)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def differ(way: Way) -> int:
    """By how many steps its integers are away from the table, at most."""
    every: NDArray[np.uint8] = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    (made,) = opened(graph_of(way, Counter({(1, 16, 16): 1})), 1).run(None, {"x0": every})
    return int(np.abs(made.astype(int).ravel() - TABLE).max())


@dataclass(frozen=True)
class Tried:
    """A way that ONNX Runtime has, ready to be timed."""

    way: Way
    nodes: str  # what it runs, by kind
    call: Callable[[], object]  # once over all maps


def tried(way: Way, maps: Maps, threads: int) -> Tried | str:
    """The way, or why it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.onnx"
        try:
            running = opened(graph_of(way, maps), threads, kept)
        except Exception as error:  # onnxruntime raises many kinds
            return str(error).splitlines()[0]
        kinds = Counter(node.op_type for node in onnx.load(kept).graph.node)
    rng = np.random.default_rng(0)
    feed = {e.name: rng.integers(0, 256, e.shape).astype(np.uint8) for e in running.get_inputs()}
    return Tried(way, ", ".join(f"{n} {kind}" for kind, n in kinds.items()), lambda: running.run(None, feed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("calib/demo/demo.pt"))
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    maps = silu_maps(given.checkpoint, given.imgsz)
    size = sum(int(np.prod(shape)) * count for shape, count in maps.items())
    print(
        f"{maps.total()} maps of {size / 1e6:.1f} MB, {given.threads} threads of {cpu_name()}, onnxruntime "
        f"{ort.__version__}, load average {os.getloadavg()[0]:.1f}"
    )
    with only_cpus(given.threads):
        every = [tried(way, maps, given.threads) for way in WAYS]
        found = [t for t in every if isinstance(t, Tried)]
        times = interleaved_times([t.call for t in found], given.rounds, 3, 1200)
    base = times[[t.way.name for t in found].index(TODAY)]
    print("| way | nodes that run | ms, least | median | of today's | 95 % interval | steps off the table |")
    print("|---|---|---|---|---|---|---|")
    for t, taken in zip(found, times, strict=True):
        s, r = summary(taken), ratio(taken, base)
        off = str(differ(t.way)) if t.way.silu else "another function"
        print(
            f"| {t.way.name} | {t.nodes} | {s.min_ms:.2f} | {s.median_ms:.2f} | {r.value:.2f} | {r.low:.2f} to "
            f"{r.high:.2f} | {off} |"
        )
    for way, why in zip(WAYS, every, strict=True):
        if isinstance(why, str):
            print(f"{way.name}: {why}")


if __name__ == "__main__":
    main()
