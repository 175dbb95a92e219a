"""DSConv's compiled kernel (benchmarks/kernel.cpp) against float32 and int8 convolutions.

    python benchmarks/kernel_speed.py

Needs g++ and a CPU with AVX2. One thread; process time of each in turn, round by round, the least of many rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from kernel import BLOCK, Kernel, Library, compiled
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from dsconvert.onnxfile.engines import session

# (input channels, output channels, kernel, side), as in YOLOv5 and ResNet
LAYERS = ((64, 64, 3, 40), (128, 128, 3, 40), (256, 256, 3, 20), (128, 128, 1, 40), (512, 512, 1, 20))


def drawn(chi: int, cho: int, k: int, side: int) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """VQK, alpha and an image (side, side, chi)."""
    rng = np.random.default_rng(0)
    vqk = rng.integers(-8, 8, (cho, chi, k, k)).astype(np.int8)
    alpha = (0.01 + 0.1 * rng.random((cho, chi // BLOCK, k, k))).astype(np.float32)
    return vqk, alpha, rng.normal(size=(side, side, chi)).astype(np.float32)


def onnx_conv(weight: NDArray[np.float32], side: int, most: float, int8: bool) -> bytes:
    """One convolution as a file: float, or with QDQ around it, which ONNX Runtime runs as QLinearConv; its outputs
    reach `most`."""
    cho, chi, k, _ = weight.shape
    scale = np.abs(weight).max((1, 2, 3)) / 127
    values: dict[str, Any] = {"w": weight}
    nodes = []
    if int8:
        values = {
            "s": np.float32(4 / 127), "z": np.uint8(128), "cds": scale.astype(np.float32),
            "v": np.round(weight / scale[:, None, None, None]).astype(np.int8), "t": np.float32(most / 127),
        }  # fmt: skip
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["r"]),
            helper.make_node("DequantizeLinear", ["v", "cds"], ["w"], axis=0),
        ]
    nodes.append(helper.make_node("Conv", ["r" if int8 else "x", "w"], ["c" if int8 else "y"], pads=[k // 2] * 4))
    if int8:
        nodes.append(helper.make_node("QuantizeLinear", ["c", "t", "z"], ["p"]))
        nodes.append(helper.make_node("DequantizeLinear", ["p", "t", "z"], ["y"]))
    graph = helper.make_graph(
        nodes, "conv", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, chi, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, cho, side, side])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in values.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def rivals(library: Library, layer: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    k, side = layer[2:]
    vqk, alpha, x = drawn(*layer)
    weight = vqk.astype(np.float32) * np.repeat(alpha, BLOCK, 1)
    image = torch.from_numpy(x).permute(2, 0, 1)[None]  # channels last
    plain, w = image.contiguous(), torch.from_numpy(weight)
    most = float(F.conv2d(plain, w, padding=k // 2).abs().max())
    last = w.contiguous(memory_format=torch.channels_last)
    kernel = Kernel(library, vqk, alpha)
    found: dict[str, Callable[[], object]] = {
        "DSConv": lambda: kernel(x),
        "torch float": lambda: F.conv2d(plain, w, padding=k // 2),
        "torch float, channels last": lambda: F.conv2d(image, last, padding=k // 2),
    }
    for name, int8 in (("ONNX Runtime float", False), ("ONNX Runtime int8", True)):
        running, feed = session(onnx_conv(weight, side, most, int8), 1), {"x": plain.numpy()}
        found[name] = lambda running=running, feed=feed: running.run(None, feed)  # type: ignore[misc]
    return found


def times(found: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least process time of each, ms."""
    least = dict.fromkeys(found, float("inf"))
    for _ in range(rounds):
        for name, once in found.items():
            began = time.process_time_ns()
            once()
            least[name] = min(least[name], (time.process_time_ns() - began) / 1e6)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        header = False
        for layer in LAYERS:
            least = times(rivals(library, layer), given.rounds)
            if not header:
                print(f"| layer | {' | '.join(f'{name}, ms' for name in least)} | DSConv / fastest float |")
                print("|---" * (2 + len(least)) + "|")
                header = True
            floats = min(v for name, v in least.items() if "float" in name)
            cells = " | ".join(f"{v:.2f}" for v in least.values())
            chi, cho, k, side = layer
            print(f"| {chi} to {cho}, {k}x{k}, {side}x{side} | {cells} | {least['DSConv'] / floats:.2f} |", flush=True)


if __name__ == "__main__":
    main()
