"""How many threads torch's operators get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW = 1 << 19  # numbers of a weight: all of yolov5n's have fewer


@contextmanager
def threads_for(count: int) -> Iterator[None]:
    """One thread for operations on so many numbers at most, where they are few: several only slow those down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if count < FEW else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
