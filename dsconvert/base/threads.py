"""How many threads torch's operators and the compiled loops get."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import torch

FEW = 1 << 19  # numbers of a weight: all of yolov5n's have fewer
Item = TypeVar("Item")
Made = TypeVar("Made")
RUNS = 8  # into so many runs of items each thread's share is cut
_allowed: ContextVar[int] = ContextVar("_allowed")  # threads that compiled loops may take where torch is kept to one


@contextmanager
def threads_for(count: int) -> Iterator[None]:
    """One thread for torch's operations on so many numbers at most, where they are few: several only slow those down.
    Compiled loops (see `shared`) keep all."""
    before = torch.get_num_threads()
    allowed = _allowed.set(_allowed.get(before))
    torch.set_num_threads(1 if count < FEW else before)
    try:
        yield
    finally:
        _allowed.reset(allowed)
        torch.set_num_threads(before)


def batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """The items in runs of `count`, the last one perhaps shorter."""
    rest = iter(items)
    while run := list(islice(rest, count)):
        yield run


def in_order(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """make(item) of each item in turn; as many are made at a time as torch has threads, each on one of them.

    An image through a network is many small operators: two images at a time keep two threads busy, where operators
    divided between them wait for each other. And whatever one thread makes is the same on any number of them."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(make, items)
        return
    gradients = torch.is_grad_enabled()

    def alone(item: Item) -> Made:
        torch.set_num_threads(1)  # this thread's
        with torch.set_grad_enabled(gradients):  # a thread's own setting
            return make(item)

    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(alone, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what new threads start with


def shared(count: int, run: Callable[[int, int], None]) -> None:
    """run(first, last) for runs of 0..count, each once, by this thread and others; `run` must let go of the GIL.

    A thread takes a run when it has done its last, so one that a busy machine keeps waiting holds up the others by one
    run at most, and nobody spins. numba's own threads have a fixed share each and spin between loops, or (its
    workqueue) end the process when two Python threads use them."""
    threads = _allowed.get(torch.get_num_threads())
    size = max(1, -(-count // (threads * RUNS)) if threads > 1 else count)
    firsts = iter(range(0, count, size))  # taking from it holds the GIL

    def work() -> None:
        for first in firsts:
            run(first, min(first + size, count))

    helpers = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(min(threads - 1, -(-count // size) - 1))]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():  # it has begun
                helper.result()


@lru_cache(1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads for `shared`; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, "fit")
