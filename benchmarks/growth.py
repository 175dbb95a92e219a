"""How quantize's time and memory grow with images and with parameters: every point a fresh process.

    python benchmarks/growth.py CHECKPOINT DATA IMGSZ SAMPLES THREADS    prints one point as JSON

Networks other than the checkpoint's own size get random weights: only time and memory are measured.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from dsconvert.pipeline import QuantizeOptions, quantize
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint, yolov5_bytes
from dsconvert.yolo.network import Network

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


def point(checkpoint: Path, data: Path, imgsz: int, samples: int, threads: int) -> dict[str, float]:
    """Seconds of quantize at 4 bits (images decoded before the clock starts) and peak bytes, in a fresh process."""
    arguments = [str(checkpoint), str(data), str(imgsz), str(samples), str(threads)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkpoint} with {samples} images failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


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
    checkpoint, data, imgsz, samples, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    options = QuantizeOptions(calib=Path(data), bits=4, imgsz=int(imgsz), samples=int(samples))
    seconds, _, images = fit_seconds(load_checkpoint(checkpoint), options)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    print(json.dumps({"seconds": seconds, "peak_bytes": int(found[1]) * 1024, "images": images}))


if __name__ == "__main__":
    main()
