"""Work divided between threads: the results of a plain loop, in its order."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dsconvert.parallel import in_order


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_torch_has_its_threads_back(threads):
    def late(number: int) -> int:
        time.sleep(0.001 * (7 - number % 7))
        return number * number

    assert list(in_order(late, range(20))) == [n * n for n in range(20)]
    assert torch.get_num_threads() == threads


def test_as_many_at_once_as_there_are_threads_each_with_one_of_torchs(threads):
    running, most, seen = [0], [0], set()
    lock = threading.Lock()
    taken = []

    def items():
        for index in range(12):
            taken.append(index)
            yield index

    def work(index: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        seen.add(torch.get_num_threads())
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return index

    for done in in_order(work, items()):
        assert len(taken) - done <= threads + 1  # no more is taken up than is worked on, and the one handed over
    assert most[0] == threads
    assert seen == {1}


def test_an_error_ends_it_and_is_passed_on(threads):
    started = []

    def work(index: int) -> int:
        started.append(index)
        if index == 3:
            raise ValueError("three")
        return index

    with pytest.raises(ValueError, match="three"):
        list(in_order(work, range(1000)))
    assert len(started) < 20
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("wanted", [False, True])
def test_gradients_are_followed_where_the_caller_follows_them(threads, wanted):
    with torch.set_grad_enabled(wanted):
        assert set(in_order(lambda _: torch.is_grad_enabled(), range(4))) == {wanted}


def test_the_same_numbers_on_any_number_of_threads():
    """Products of matrices in one thread each, added up in order: equal to the last bit."""
    generator = torch.Generator().manual_seed(0)
    items = [torch.randn(64, 64, generator=generator) for _ in range(16)]
    before, totals = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        totals.append(torch.stack(list(in_order(lambda a: a @ a.T, items))).sum(0))
    torch.set_num_threads(before)
    assert torch.equal(*totals)
