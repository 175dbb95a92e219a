"""Measure the latency of several models in turn, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsconvert.onnxfile.bounds import patiently

Times = NDArray[np.float64]  # milliseconds, one a round


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, minimum, and the interquartile range as spread."""

    median_ms: float
    min_ms: float
    spread_ms: float
    runs: int


@dataclass(frozen=True)
class Ratio:
    """One call's median time as a share of another's, and its 95 % interval."""

    value: float
    low: float
    high: float


def interleaved_latency(
    calls: Sequence[Callable[[], object]], runs: int = 30, warmup: int = 3, most_seconds: float = 60.0
) -> list[Latency]:
    """Return summaries of `interleaved_times`."""
    return [summary(t) for t in interleaved_times(calls, runs, warmup, most_seconds)]


def interleaved_times(
    calls: Sequence[Callable[[], object]],
    runs: int = 30,
    warmup: int = 3,
    most_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Times]:
    """Time each call `runs` times, all in turn, in a rotating order.

    There are fewer rounds if `most_seconds` run out. Element i of every result is from round i.
    """
    return patiently(lambda: _interleaved(calls, runs, warmup, most_seconds, progress))


def _interleaved(
    calls: Sequence[Callable[[], object]], runs: int, warmup: int, most_seconds: float,
    progress: Callable[[int, int], None] | None,
) -> list[Times]:  # fmt: skip
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
        if progress:
            progress(turn + 1, runs)
        if time.perf_counter() - began > most_seconds:
            break
    return [np.array(t) for t in times]


def ratio(times: Times, base: Times, resamples: int = 2000, seed: int = 0) -> Ratio:
    """Return median(times) / median(base) with a 95 % bootstrap interval; lengths must be equal.

    The bootstrap draws whole rounds, as a slow moment of the machine affects both times of a round.
    """
    rounds = np.random.default_rng(seed).integers(0, len(times), (resamples, len(times)))
    drawn = np.median(times[rounds], 1) / np.median(base[rounds], 1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Ratio(float(np.median(times) / np.median(base)), float(low), float(high))


def summary(t: Times) -> Latency:
    """Return median, minimum and interquartile range."""
    low, middle, high = np.percentile(t, (25, 50, 75))
    return Latency(float(middle), float(t.min()), float(high - low), len(t))
