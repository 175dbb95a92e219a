"""Several processes with a part of the images each, started by torchrun: what one of them has to know of the others.

Alone, every function is the identity. All sums are kept in main memory (gloo), wherever the network runs; every
process ends with the same sums and so fits the same layers.
"""

from __future__ import annotations

import atexit
import os
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from dsconvert.errors import InputError

T = TypeVar("T")


def start() -> None:
    """Meet the other processes, where torchrun has started this one with others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        # gloo's threads hold tensors a moment longer than the sum they made; they must let go while Python still runs,
        # or the process that ends first is aborted now and then, all its work done
        atexit.register(dist.destroy_process_group)


def count() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def number() -> int:
    """Which of them this is, from 0; 0 writes the files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def check_device(wanted: str) -> None:
    """Raises InputError for a device that this machine has not."""
    if wanted != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {wanted} is not available on this machine; use --device cpu.")


def device(wanted: str) -> str:
    """This process's own GPU for `cuda`."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" and count() > 1 else wanted


def share(items: int, unit: int = 1) -> slice:
    """This process's run of so many items; together, in the processes' order, the runs are all of them. All but the
    last are made of whole units, where there are enough."""
    unit = unit if items >= unit * count() else 1
    units = -(-items // unit)
    return slice(number() * units // count() * unit, (number() + 1) * units // count() * unit)


def summed(values: Tensor) -> Tensor:
    """The sum of everyone's tensors (one shape, on CPU)."""
    if count() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gathered(item: T) -> list[T]:
    """Everyone's item, in the processes' order. Anything that pickles: the processes trust each other."""
    if count() == 1:
        return [item]
    items: list[Any] = [None] * count()
    dist.all_gather_object(items, item)
    return items


def joined(values: Tensor) -> Tensor:
    """Everyone's tensors, one after the other along the first dimension."""
    return torch.cat(gathered(values)) if count() > 1 else values
