"""Threads by the size of the work, and as before afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import HANGS

from dsconvert.base.threads import FEW, in_order, shared, threads_for


@pytest.fixture
def three():
    """Torch with three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "inside"), [(1, 1), (FEW - 1, 1), (FEW, 3)])
def test_threads_by_the_size_of_the_weight(three, count, inside):
    with threads_for(count):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), threads_for(1):
        count / 0
    assert torch.get_num_threads() == 3


def test_side_by_side_and_in_order(three):
    """The first waits until the third runs; what is made on one thread has the caller's setting for gradients."""
    met = threading.Barrier(3)
    given: list[int] = []

    def items():
        for item in range(12):
            given.append(item)
            yield item

    def make(item):
        if item < 3:
            met.wait(timeout=HANGS)
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        made = in_order(make, items())
        assert next(made) == (0, 1, False)
        assert len(given) <= 5  # no more are asked for than run or wait
        assert list(made) == [(item, 1, False) for item in range(1, 12)]
    assert torch.get_num_threads() == 3


def test_what_goes_wrong_side_by_side_is_raised(three):
    made = in_order(lambda item: 1 // item, (1, 0, 1))
    assert next(made) == 1
    with pytest.raises(ZeroDivisionError):
        next(made)
    assert torch.get_num_threads() == 3


def test_one_thread_needs_no_others(three):
    torch.set_num_threads(1)
    here = threading.get_ident()
    assert list(in_order(lambda item: threading.get_ident(), range(3))) == [here] * 3


@pytest.mark.parametrize("count", [0, 1, 5, 24, 100])
def test_every_number_is_in_one_run(three, count):
    runs: list[tuple[int, int]] = []
    shared(count, lambda first, last: runs.append((first, last)))
    assert [n for first, last in sorted(runs) for n in range(first, last)] == list(range(count))


def test_runs_are_taken_by_several_threads_also_where_torch_has_one(three):
    met, names = threading.Barrier(3), []

    def run(first, last):
        names.append(threading.get_ident())
        if first < 3:
            met.wait(timeout=HANGS)  # as the runs are of one: three threads are here at once, or this breaks

    with threads_for(1):
        shared(20, run)
    assert len(names) == 20
    assert threading.get_ident() in names
    assert list(in_order(lambda _: _threads_of(20), range(4))) == [1] * 4  # side by side already


def _threads_of(count: int) -> int:
    names: list[int] = []
    shared(count, lambda first, last: names.append(threading.get_ident()))
    return len(set(names))


def test_nobody_waits_for_threads_that_never_come(three):
    """While all helpers are held up elsewhere, this thread does the whole work."""
    busy, let_go = threading.Barrier(4), threading.Event()

    def hold(first, last):
        busy.wait(timeout=HANGS)
        let_go.wait(timeout=HANGS)

    other = threading.Thread(target=shared, args=(3, hold))
    other.start()
    try:
        busy.wait(timeout=HANGS)
        done: list[int] = []
        shared(30, lambda first, last: done.append(threading.get_ident()))
        assert set(done) == {threading.get_ident()}
    finally:
        let_go.set()
        other.join()


def test_what_goes_wrong_in_a_run_is_raised(three):
    with pytest.raises(ZeroDivisionError):
        shared(9, lambda first, last: 1 // (first - 4))


def test_the_command_lets_waiting_threads_sleep():
    """libgomp prints what it was told when it is loaded; a user's own setting stays."""
    for given, wanted in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE"):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        done = subprocess.run(
            [sys.executable, "-m", "dsconvert", "--version"], capture_output=True, text=True, check=True,
            env={**env, "OMP_DISPLAY_ENV": "true", **given},
        )  # fmt: skip
        assert f"OMP_WAIT_POLICY = '{wanted}'" in done.stderr
