"""Divide work among threads, for torch's operators and the compiled loops."""

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

FEW = 1 << 19  # numbers of a weight; all of yolov5n's weights have fewer
Item = TypeVar("Item")
Made = TypeVar("Made")
RUNS = 8  # runs of items for each thread
_allowed: ContextVar[int] = ContextVar("_allowed")  # threads for compiled loops while torch is limited to one


@contextmanager
def threads_for(count: int) -> Iterator[None]:
    """Limit torch to one thread in the block if its operations have few numbers, as more threads would slow them down.

    Compiled loops (see `shared`) keep all threads.
    """
    before = torch.get_num_threads()
    allowed = _allowed.set(_allowed.get(before))
    torch.set_num_threads(1 if count < FEW else before)
    try:
        yield
    finally:
        _allowed.reset(allowed)
        torch.set_num_threads(before)


def batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Yield the items in runs of `count`; the last one may be shorter."""
    rest = iter(items)
    while run := list(islice(rest, count)):
        yield run


def in_order(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield make(item) for each item in turn, with as many made at a time as torch has threads, each on one thread.

    An image through a network is many small operators. Two images at a time keep two threads busy, while operators
    divided between two threads wait for each other. A result of one thread is also the same for any number of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(make, items)
        return
    gradients = torch.is_grad_enabled()

    def alone(item: Item) -> Made:
        torch.set_num_threads(1)  # applies to this thread
        with torch.set_grad_enabled(gradients):  # each thread has its own setting
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
        torch.set_num_threads(threads)  # new threads start with this


def shared(count: int, run: Callable[[int, int], None]) -> None:
    """Call run(first, last) for runs of 0..count, each once, in this and other threads; `run` must release the GIL.

    A thread takes a new run when its last is done. So a thread that a busy machine delays holds up the others by at
    most one run, and no thread spins. numba's own threads have fixed shares, and they spin between loops or (its
    workqueue) end the process when two Python threads use them.
    """
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
            if not helper.cancel():  # it has started
                helper.result()


@lru_cache(1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads for `shared`; a forked process has none of its parent's, so it gets its own."""
    return ThreadPoolExecutor(threads, "fit")
