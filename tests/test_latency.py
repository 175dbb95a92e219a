"""Interleaved timing."""

from __future__ import annotations

import time

from dsconvert.evaluate.latency import interleaved_latency


def test_calls_are_interleaved_with_rotating_order():
    seen: list[str] = []
    interleaved_latency([lambda: seen.append("a"), lambda: seen.append("b")], runs=3, warmup=1)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"


def test_known_sleep_is_measured():
    slow, fast = interleaved_latency([lambda: time.sleep(0.02), lambda: None], runs=5, warmup=0)
    assert slow.min_ms >= 20  # sleep never ends early
    assert fast.median_ms < slow.min_ms
    assert slow.min_ms <= slow.median_ms
    assert slow.runs == fast.runs == 5


def test_time_limit_ends_after_a_whole_round():
    results = interleaved_latency([lambda: time.sleep(0.01)] * 2, runs=1000, warmup=0, most_seconds=0.05)
    assert results[0].runs == results[1].runs < 1000
