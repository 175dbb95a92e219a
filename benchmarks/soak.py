"""Evaluate and detect over thousands of images, and see whether memory stays flat.

    python benchmarks/soak.py --images 4000

Runs the demo model over the demo's pictures again and again and records the resident memory after every round. Flat
means: the straight line through the second half of the rounds rises by less than --most MB over it. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dsconvert.evaluate.accuracy import detect_all
from dsconvert.evaluate.candidates import load_candidates
from dsconvert.pipeline import onnx_bytes
from dsconvert.yolo.images import image_paths

DEMO = Path(__file__).resolve().parents[1] / "calib" / "demo"


def resident_mb() -> float:
    """Memory that this process holds, MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def rise(values: list[float]) -> float:
    """How much the straight line through the second half of the values rises over it."""
    half = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(half)), half, 1)[0] * (len(half) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--most", type=float, default=5.0, help="MB that may be gained")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = image_paths(DEMO / "images" / "val")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "demo.onnx"
        model.write_bytes(onnx_bytes(DEMO / "demo.pt", "packed", args.imgsz))
        candidates = load_candidates([DEMO / "demo.pt", model], args.imgsz)
    held, seen, found, began = [resident_mb()], 0, set(), time.perf_counter()
    while seen < args.images:
        result = detect_all([c.predict for c in candidates], paths, args.imgsz, len(candidates[0].names))
        found.add(round(result.metrics()[0].map50_95, 6))
        seen += len(paths)
        held.append(resident_mb())
    gained = rise(held)
    print(json.dumps({
        "images": seen, "models": len(candidates), "rounds": len(held) - 1,
        "seconds": round(time.perf_counter() - began),
        "MB at first": round(held[1], 1), "MB at last": round(held[-1], 1), "rise MB": round(gained, 2),
        "results": len(found), "flat": gained < args.most,
    }, indent=1))  # fmt: skip
    if gained >= args.most or len(found) > 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
