"""Interleaved timing on a clock that the timed calls themselves advance: exact answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dsconvert.scoring import latency
from dsconvert.scoring.latency import Latency, interleaved_latency


class Clock:
    """A clock that stands still unless a call spends time; remembers who was called."""

    def __init__(self):
        self.now, self.called = 100.0, []

    def perf_counter(self):
        return self.now

    def spender(self, name, *milliseconds):
        """A call that takes these times, one after the other, then again from the first."""
        turn = iter(range(10**6))

        def call():
            self.called.append(name)
            self.now += milliseconds[next(turn) % len(milliseconds)] / 1e3

        return call


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


def close(wanted: Latency):
    # differences of a clock near 100 seconds, in milliseconds: 1e-14 * 100 * 1e3 each
    return tuple(pytest.approx(v, abs=1e-9) for v in (wanted.median_ms, wanted.min_ms, wanted.spread_ms))


def test_median_minimum_and_spread(clock):
    (found,) = interleaved_latency([clock.spender("a", 4, 1, 3, 2, 10)], runs=5, warmup=0)
    # sorted 1, 2, 3, 4, 10: quartiles 2 and 4
    assert (found.median_ms, found.min_ms, found.spread_ms) == close(Latency(3, 1, 2, 5))
    assert found.runs == 5


def test_each_call_gets_its_own_times(clock):
    fast, slow = interleaved_latency([clock.spender("f", 2), clock.spender("s", 7)], runs=4, warmup=1)
    assert (fast.median_ms, fast.min_ms, fast.spread_ms) == close(Latency(2, 2, 0, 4))
    assert (slow.median_ms, slow.min_ms, slow.spread_ms) == close(Latency(7, 7, 0, 4))


def test_calls_take_turns_and_the_first_place_rotates(clock):
    interleaved_latency([clock.spender(n, 1) for n in "abc"], runs=4, warmup=0)
    assert "".join(clock.called) == "abc" + "bca" + "cab" + "abc"


def test_warm_up_is_called_but_not_timed(clock):
    (found,) = interleaved_latency([clock.spender("a", 50, 50, 1, 1, 1)], runs=3, warmup=2)
    assert len(clock.called) == 5
    assert found.median_ms == pytest.approx(1, abs=1e-9)  # as in `close`
    assert found.spread_ms == pytest.approx(0, abs=1e-9)


def test_slow_calls_stop_after_the_round_that_ran_out_of_time(clock):
    # a round takes 3 seconds: the fourth passes 10 seconds; every call has then been timed as often
    found = interleaved_latency([clock.spender("a", 1000), clock.spender("b", 2000)], 30, 0, most_seconds=10)
    assert [f.runs for f in found] == [4, 4]
    assert clock.called.count("a") == clock.called.count("b") == 4


def test_at_least_one_round_and_no_time_for_warming_up(clock):
    # the limit counts from after the warm-up
    (found,) = interleaved_latency([clock.spender("a", 60_000)], runs=3, warmup=2, most_seconds=100)
    assert found.runs == 2
    (found,) = interleaved_latency([clock.spender("a", 60_000)], runs=3, warmup=0, most_seconds=0)
    assert found.runs == 1


def test_a_model_is_usually_timed_thirty_times(clock, quickly_timed, monkeypatch):
    monkeypatch.setattr(interleaved_latency, "__defaults__", quickly_timed)
    (found,) = interleaved_latency([clock.spender("a", 1)])
    assert (found.runs, len(clock.called)) == (30, 33)
