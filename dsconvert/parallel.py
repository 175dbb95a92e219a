"""The same work on many things, on as many threads as torch was given.

Most of what calibration does is one image, one layer or one range at a time, in steps too small for torch to divide
between threads. Here whole items are divided instead: torch computes with one thread in each, and the results come
in the items' order, so the sums made of them are the same on any number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """work(item) for every item, in order. Items are taken, and results kept, for as many as there are threads: what
    an item needs of memory is needed that often. Raises what `work` raises."""
    count = torch.get_num_threads()
    if count == 1:
        yield from map(work, items)
        return
    gradients = torch.is_grad_enabled()  # which every thread decides for itself

    def alike(item: T) -> R:
        with torch.set_grad_enabled(gradients):
            return work(item)

    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        try:
            for item in items:
                waiting.append(threads.submit(alike, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(count)  # a new thread of torch's takes the number that was set last, anywhere


def together(*work: Callable[[], Any]) -> list[Any]:
    """The results of all of `work`, done at the same time where there are threads."""
    return list(in_order(lambda one: one(), work))
