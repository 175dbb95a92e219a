"""Latency of several models side by side: called in turn, so that a drift of the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, minimum, and the interquartile range as spread."""

    median_ms: float
    min_ms: float
    spread_ms: float
    runs: int


def interleaved_latency(
    calls: Sequence[Callable[[], object]], runs: int = 30, warmup: int = 3, most_seconds: float = 60.0
) -> list[Latency]:
    """Time each call `runs` times, all in turn, the order rotating; fewer rounds when `most_seconds` run out."""
    for call in calls:
        for _ in range(warmup):
            call()
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for turn in range(runs):
        for offset in range(len(calls)):
            index = (turn + offset) % len(calls)
            start = time.perf_counter()
            calls[index]()
            times[index].append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - began > most_seconds:
            break
    return [_summary(np.array(t)) for t in times]


def _summary(t: np.ndarray) -> Latency:
    low, middle, high = np.percentile(t, (25, 50, 75))
    return Latency(float(middle), float(t.min()), float(high - low), len(t))
