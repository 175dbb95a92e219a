"""Measure ONNX files side by side in several engines: latency, load time and peak memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike
from dsconvert.onnxfile.engines import check_onnx, engine_version, open_model
from dsconvert.onnxfile.external import check_external_data
from dsconvert.onnxfile.trial import try_out
from dsconvert.scoring.footprint import Footprint, measure_footprint
from dsconvert.scoring.latency import Latency, Ratio, interleaved_times, ratio, summary

LOADS = 3  # fresh processes in which each model is loaded
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Benchmarked:
    """One file in one engine.

    ratio: its latency divided by the first entry's.
    footprint: medians of load time and memory.
    """

    path: Path
    engine: str
    engine_version: str
    size_bytes: int
    latency: Latency
    ratio: Ratio
    footprint: Footprint


def bench(
    paths: Sequence[Path],
    engines: Sequence[str],
    threads: int,
    runs: int = 50,
    imgsz: SizeLike | None = None,
    progress: Progress | None = None,
) -> list[Benchmarked]:
    """Measure every file in every engine, on the first `threads` CPUs that this process may use.

    Raises InputError when there are fewer CPUs than threads, an engine is not installed, or an engine cannot run a
    file.
    """
    report, asked = progress or (lambda stage, done, total: None), Size.perhaps(imgsz)
    versions = {engine: engine_version(engine) for engine in engines}
    entries = [(path, engine) for engine in engines for path in paths]
    with only_cpus(threads):
        for path in paths:
            check_onnx(path)
        sizes = {path: check_external_data(path) for path in paths}
        for path, engine in entries:
            try_out(path, engine, threads, asked, sizes[path])
        calls = [open_model(path, engine, threads, asked, sizes.get(path)) for path, engine in entries]
        feet = _footprints(entries, threads, asked, sizes, report)
        times = interleaved_times(calls, runs, progress=lambda done, total: report("bench", done, total))
    return [
        Benchmarked(path, engine, versions[engine], path.stat().st_size, summary(t), ratio(t, times[0]), foot)
        for (path, engine), t, foot in zip(entries, times, feet, strict=True)
    ]


@contextmanager
def only_cpus(count: int) -> Iterator[None]:
    """Keep this thread, and all threads and processes that it starts, on the first `count` CPUs that it may use."""
    if not hasattr(os, "sched_setaffinity"):  # Windows and macOS choose CPUs themselves
        yield
        return
    before = os.sched_getaffinity(0)
    if count > len(before):
        raise InputError.naming("{threads} {} is more than the {} CPUs this process may use.", count, len(before))
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _median_of(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return int(median(known)) if known else None


def _footprints(
    entries: Sequence[tuple[Path, str]], threads: int, imgsz: Size | None, sizes: Mapping[Path, int], report: Progress
) -> list[Footprint]:
    """Return the median of LOADS measurements for each entry, taken in turn."""
    found: list[list[Footprint]] = [[] for _ in entries]
    for turn in range(LOADS):
        for index, (path, engine) in enumerate(entries):
            found[index].append(measure_footprint(path, engine, threads, imgsz, sizes[path]))
            report("load", turn * len(entries) + index + 1, LOADS * len(entries))
    return [
        Footprint(
            median(f.load_ms for f in all_of),
            _median_of([f.peak_bytes for f in all_of]),
            _median_of([f.base_bytes for f in all_of]),
        )
        for all_of in found
    ]
