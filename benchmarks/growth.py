"""How quantize's time and memory grow with images and with parameters: every point a fresh process.

    python benchmarks/growth.py CHECKPOINT DATA IMGSZ SAMPLES THREADS BITS    prints one point as JSON

BITS 0: the product as it comes.

Networks other than the checkpoint's own size get random weights: only time and memory are measured.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from fresh import AS_THE_COMMAND, last_json

from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.network import Network

sys.path.append(str(Path(__file__).resolve().parents[1] / "calib" / "demo"))
from pt_writer import yolov5_bytes

# depth and width multiples of the published sizes
SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}


def random_checkpoint(like: Checkpoint, size: str, target: Path, seed: int = 0) -> None:
    """A `.pt` of the checkpoint's architecture at another size, its weights random but of a sensible scale."""
    depth, width = SIZES[size]
    config = {**like.network.config, "depth_multiple": depth, "width_multiple": width}
    network = Network(config, like.head.nc, like.head.na).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("anchors"):
            value.copy_(like.network.state_dict()[name])
        elif value.dim() == 4:
            # keeps the variance of what passes: SiLU halves it or less, and residuals add to it
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    target.write_bytes(yolov5_bytes(network, like.head))


def parameters(path: Path) -> int:
    """Convolution weights and biases of a checkpoint."""
    return sum(p.numel() for p in load_checkpoint(path).network.parameters())


def point(checkpoint: Path, data: Path, imgsz: int, samples: int, threads: int, bits: int | None) -> dict[str, float]:
    """Seconds of quantize (images decoded before the clock starts), seconds of decoding, and peak bytes, in a fresh
    process whose threads wait as the command's do. bits None: the product as it comes."""
    arguments = [str(a) for a in (checkpoint, data, imgsz, samples, threads, bits or 0)]
    return last_json([sys.executable, __file__, *arguments], AS_THE_COMMAND)


def fit_seconds(checkpoint: Checkpoint, options: QuantizeOptions) -> tuple[float, float, int]:
    """Seconds of quantize without decoding images, seconds of decoding, and images used."""
    began = time.perf_counter()
    decoded = began

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal decoded
        if stage == "images":
            decoded = time.perf_counter()

    images = quantize(checkpoint, options, progress=progress).images
    return time.perf_counter() - decoded, decoded - began, images


def main() -> None:
    checkpoint, data, imgsz, samples, threads, bits = sys.argv[1:]
    torch.set_num_threads(int(threads))
    options = QuantizeOptions(calib=Path(data), bits=int(bits) or None, imgsz=int(imgsz), samples=int(samples))
    seconds, decoding, images = fit_seconds(load_checkpoint(checkpoint), options)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    peak = int(found[1]) * 1024
    print(json.dumps({"seconds": seconds, "decoding": decoding, "peak_bytes": peak, "images": images}))


if __name__ == "__main__":
    main()
