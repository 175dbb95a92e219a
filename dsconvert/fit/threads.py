"""How many threads torch's operators get."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

FEW = 1 << 19  # numbers of a weight: all of yolov5n's have fewer
Item = TypeVar("Item")
Made = TypeVar("Made")


@contextmanager
def threads_for(count: int) -> Iterator[None]:
    """One thread for operations on so many numbers at most, where they are few: several only slow those down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if count < FEW else before)
    try:
        yield
    finally:
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
