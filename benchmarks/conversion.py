"""What `quantize` takes: beside NNCF, beside busy neighbours, with many images, with large networks; and what a start
of the command takes. Every time is a fresh process's; what is compared takes turns."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from fresh import output_of, peak_of, seconds_of
from growth import parameters, point, random_checkpoint
from neighbours import neighbours
from peers import nncf_seconds
from setting import ROOT, Bench

from dsconvert.scoring.latency import interleaved_times, ratio, summary
from dsconvert.yolo.checkpoint import load_checkpoint

DSCONVERT = [sys.executable, "-m", "dsconvert"]
# what a start is: the command, the package, and the package with all that converting takes
STARTS = {
    "dsconvert --help": ["-m", "dsconvert", "--help"],
    "import dsconvert": ["-c", "import dsconvert"],
    "import dsconvert.convert.quantize": ["-c", "import dsconvert.convert.quantize"],
}
WHERE = "import dsconvert; print(dsconvert.__file__)"


DEMO = ROOT / "calib" / "demo"


def warm(b: Bench) -> None:
    """Convert the demo once: the first run on a machine compiles the loops, and later ones find them in a cache."""
    b.say("the demo once, so that the compiled loops are in their cache")
    point(DEMO / "demo.pt", DEMO / "images" / "calib", 320, 4, b.threads, None)


def measure_quantize(b: Bench) -> dict[str, Any]:
    """Seconds of quantize, and of NNCF's post-training quantization, on the same decoded images, in turn."""
    source = b.file("float32")
    theirs, ours = [], []
    warm(b)
    for turn in range(b.turns):
        theirs.append(nncf_seconds(source, b.data, b.imgsz, b.samples, b.work / "nncf-timed.xml"))
        ours.append(point(b.checkpoint, b.data, b.imgsz, b.samples, b.threads, None))
        b.say(f"turn {turn + 1} of {b.turns}: NNCF took {theirs[-1]:.1f} s, dsconvert {ours[-1]['seconds']:.1f} s")
    seconds = [p["seconds"] for p in ours]
    return {
        "seconds": seconds, "nncf seconds": theirs, "decoding": median(p["decoding"] for p in ours),
        "images": ours[0]["images"], "nncf": version("nncf"), **turned(seconds, theirs),
    }  # fmt: skip


def turned(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The ratio of the medians, and the least and the most that one turn gave."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": median(ours) / median(theirs), "turns": [min(each), max(each)]}


def measure_many(b: Bench) -> dict[str, Any]:
    """Seconds of quantize with few and with many images, in turn; against the fewest."""
    counts = sorted(b.many)
    found: dict[int, list[dict[str, float]]] = {n: [] for n in counts}
    warm(b)
    for turn in range(b.turns):
        for n in counts:
            found[n].append(point(b.checkpoint, b.data, b.imgsz, n, b.threads, None))
            b.say(f"turn {turn + 1} of {b.turns}, {n} images: {found[n][-1]}")
            if found[n][-1]["images"] != n:
                raise SystemExit(f"{b.data} has {found[n][-1]['images']} calibration images; {n} are wanted.")
    seconds = {n: [p["seconds"] for p in points] for n, points in found.items()}
    return {
        "imgsz": b.imgsz,
        "points": [
            {"images": n, "seconds": seconds[n], "peak_bytes": max(int(p["peak_bytes"]) for p in found[n]),
             **turned(seconds[n], seconds[counts[0]])}
            for n in counts
        ],
    }  # fmt: skip


def measure_memory(b: Bench) -> dict[str, Any]:
    """The most memory that the command holds with many images, decoding and all, and its seconds."""
    options = ["--calib", str(b.data), "--imgsz", str(b.imgsz), "--samples", str(b.memory_samples)]
    with tempfile.TemporaryDirectory(dir=b.work) as folder:
        seconds, peak = peak_of([*DSCONVERT, "quantize", str(b.checkpoint), *options, "--out", folder, "--force"])
    return {"imgsz": b.imgsz, "samples": b.memory_samples, "seconds": seconds, "peak_bytes": peak}


def measure_busy(b: Bench) -> dict[str, Any]:
    """The demo's quantize beside busy neighbours, so many a core, against the runs without any before and after."""
    cores = len(os.sched_getaffinity(0))
    options = ["--calib", str(DEMO / "images" / "calib"), "--imgsz", "320", "--block-size", "32"]
    options += ["--samples", str(b.busy_samples)]
    warm(b)
    with tempfile.TemporaryDirectory() as folder:
        command = [*DSCONVERT, "quantize", str(DEMO / "demo.pt"), *options, "--out", folder, "--force"]

        def once() -> float:
            return seconds_of(command)

        found = busy_turns(b.turns, b.neighbours, lambda n: neighbours(n * cores, b.most_busy), once, b.say)
    return {"cores": cores, "samples": b.busy_samples, "by neighbours": found}


def busy_turns(
    turns: int,
    counts: Sequence[int],
    beside: Callable[[int], Any],
    once: Callable[[], float],
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """For each number of neighbours a core, seconds beside them and without, the ratios turn by turn and their median.
    `beside` starts and stops so many a core."""
    busy: dict[int, list[float]] = {n: [] for n in counts}
    idle: dict[int, list[float]] = {n: [] for n in counts}
    for turn in range(turns):
        alone = once()
        for n in counts:
            with beside(n):
                busy[n].append(once())
            after = once()
            idle[n].append((alone + after) / 2)
            say(f"turn {turn + 1} of {turns}, {n} a core: {busy[n][-1]:.1f} s, idle {alone:.1f} and {after:.1f} s")
            alone = after
    each = {n: [x / y for x, y in zip(busy[n], idle[n], strict=True)] for n in counts}
    return [
        {"a core": n, "seconds": busy[n], "idle seconds": idle[n], "ratio": median(each[n]),
         "turns": [min(each[n]), max(each[n])]}
        for n in counts
    ]  # fmt: skip


def measure_start(b: Bench) -> dict[str, Any]:
    """Milliseconds of starts of this tree and of the one `before`, in turn."""
    assert b.before is not None
    trees = {"now": ROOT, "before": b.before.resolve()}
    for tree in trees.values():
        found = Path(output_of([sys.executable, "-c", WHERE], {"PYTHONPATH": str(tree)}, tree).strip())
        if not found.is_relative_to(tree):
            raise SystemExit(f"{tree} holds no dsconvert; {found} is what starts there.")
    keys = [(what, when) for what in STARTS for when in trees]
    calls = [
        lambda what=what, when=when: output_of(
            [sys.executable, *STARTS[what]], {"PYTHONPATH": str(trees[when])}, trees[when]
        )
        for what, when in keys
    ]
    times = dict(zip(keys, interleaved_times(calls, b.starts, 2, 3600), strict=True))
    return {
        "starts": {
            what: {**{when: asdict(summary(times[what, when])) for when in trees},
                   "ratio": asdict(ratio(times[what, "now"], times[what, "before"]))}
            for what in STARTS
        },
        "processes": b.starts,
    }  # fmt: skip


def measure_growth(b: Bench) -> dict[str, Any]:
    """Seconds and peak memory of quantize by images."""
    points = []
    warm(b)
    for count in b.growth_images:
        found = point(b.checkpoint, b.data, b.growth_imgsz, count, b.threads, 4)
        points.append({**found, "images": count})
        b.say(f"growth: {points[-1]}")
    return {"imgsz": b.growth_imgsz, "by images": points}


def measure_networks(b: Bench) -> dict[str, Any]:
    """Seconds and peak memory of quantize by size of the network, in turn."""
    like = load_checkpoint(b.checkpoint)
    found: dict[str, list[dict[str, float]]] = {size: [] for size in b.growth_sizes}
    warm(b)
    for turn in range(b.turns):
        for size in b.growth_sizes:
            path = b.work / f"random-{size}.pt"
            if not path.exists():
                random_checkpoint(like, size, path)
            found[size].append(point(path, b.data, b.growth_imgsz, b.growth_samples, b.threads, 4))
            b.say(f"turn {turn + 1} of {b.turns}, {size}: {found[size][-1]}")
    return {
        "imgsz": b.growth_imgsz,
        "by size": [
            {"size": size, "parameters": parameters(b.work / f"random-{size}.pt"), "images": points[0]["images"],
             "seconds": median(p["seconds"] for p in points), "all seconds": [p["seconds"] for p in points],
             "peak_bytes": max(int(p["peak_bytes"]) for p in points)}
            for size, points in found.items()
        ],
    }  # fmt: skip
