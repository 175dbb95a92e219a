"""Evaluate and detect over thousands of images, and see whether memory stays flat.

    python benchmarks/soak.py --images 4000

Evaluates two models on the demo's pictures again and again, and lets one `dsconvert detect` run over as many links to
them, recording the memory of the process on the way. Flat means: the straight line through the second half of what was
recorded rises by less than --most MB over it. Exit code 1 if not, or if equal pictures got other results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dsconvert.commands.cli import cli
from dsconvert.convert.exporting import onnx_bytes
from dsconvert.export.weights.layouts import layout_named
from dsconvert.photos.dataset import image_paths
from dsconvert.scoring.accuracy import detect_all
from dsconvert.scoring.candidates import load_candidates

DEMO = Path(__file__).resolve().parents[1] / "calib" / "demo"


def resident_mb() -> float:
    """Memory that this process holds, MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def rise(values: list[float]) -> float:
    """How much the straight line through the second half of the values rises over it."""
    half = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(half)), half, 1)[0] * (len(half) - 1))


def evaluated(models: list[Path], images: int, side: int) -> tuple[list[float], int]:
    """Memory after every round of evaluating the models on the demo's pictures, and how many results there were."""
    paths = image_paths(DEMO / "images" / "val")
    candidates = load_candidates(models, side)
    held, found = [], set()
    for _ in range(-(-images // len(paths))):
        result = detect_all([c.predict for c in candidates], paths, side, len(candidates[0].names))
        found.add(round(result.metrics()[0].map50_95, 6))
        held.append(resident_mb())
    return held, len(found)


def detected(model: Path, images: int, side: int, folder: Path) -> tuple[list[float], int]:
    """Memory through one run of `dsconvert detect` over so many pictures, four times a second, and how many
    different label files the copies of one picture got."""
    paths = image_paths(DEMO / "images" / "val")
    (folder / "pictures").mkdir()
    for index in range(images):
        path = paths[index % len(paths)]
        (folder / "pictures" / f"{index:06}{path.suffix}").symlink_to(path)
    held: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            held.append(resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    command = ["detect", str(model), str(folder / "pictures"), "--imgsz", str(side), "--save-txt", "--save-json",
               "--quiet", "--out", str(folder / "found")]  # fmt: skip
    try:
        with contextlib.redirect_stdout(sys.stderr):
            cli.main(command, standalone_mode=False)
    finally:
        done.set()
        watcher.join()
    written = [(folder / f"found/labels/{i:06}.txt").read_bytes() for i in range(0, images, len(paths))]
    return held, len(set(written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--most", type=float, default=5.0, help="MB that may be gained")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "demo.onnx"
        model.write_bytes(onnx_bytes(DEMO / "demo.pt", layout_named("packed"), args.imgsz))
        for what, work in (
            ("evaluate", lambda: evaluated([DEMO / "demo.pt", model], args.images, args.imgsz)),
            ("detect", lambda: detected(model, args.images, args.imgsz, folder)),
        ):
            began = time.perf_counter()
            held, results = work()
            gained = rise(held)
            figures[what] = {
                "images": args.images, "seconds": round(time.perf_counter() - began), "samples": len(held),
                "MB at a tenth": round(held[len(held) // 10], 1), "MB at last": round(held[-1], 1),
                "rise MB": round(gained, 2), "results": results, "flat": gained < args.most,
            }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if not all(f["flat"] and f["results"] == 1 for f in figures.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
