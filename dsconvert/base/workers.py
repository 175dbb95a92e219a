"""Share the images among several processes started by torchrun.

In a single process, every function returns its argument. Sums are exchanged in main memory (gloo), wherever the network
runs. Every process gets the same sums, and so fits the same layers.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from dsconvert.base.errors import InputError, is_out_of_memory, printable, shown

T = TypeVar("T")
PATIENCE = 300.0  # seconds to wait for another process; working ones meet within seconds


def start() -> None:
    """Connect to the other processes, if torchrun started this one with others.

    Raises InputError when torchrun's settings are missing, or the other processes do not come.
    """
    world = _setting("WORLD_SIZE", 1)
    if world <= 1 or dist.is_initialized():
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise InputError(
            f"WORLD_SIZE is {world}, but {' and '.join(missing)} not set: start the processes with torchrun, or unset "
            "WORLD_SIZE to work alone."
        )
    for name, most in (("RANK", world - 1), ("MASTER_PORT", 65535), ("LOCAL_WORLD_SIZE", world)):
        if not 0 <= _setting(name, 1) <= most:
            raise InputError(f"{name} is {_setting(name, 1)}, which does not go with WORLD_SIZE {world}; use torchrun.")
    with _together():
        dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    # gloo's threads hold tensors a moment longer than needed, and must release them while Python still runs. Otherwise
    # the process that ends first is sometimes aborted, with all its work done.
    atexit.register(dist.destroy_process_group)


def _setting(name: str, otherwise: int) -> int:
    """Return a number that torchrun sets."""
    text = os.environ.get(name, str(otherwise))
    if not text.strip().isdecimal() or len(text) > 9:
        raise InputError(f"{name} is {shown(text)}, not a number; torchrun sets it.")
    return int(text)


@contextmanager
def _together() -> Iterator[None]:
    """Run a block that needs the other processes. Raises InputError when one has ended, or is silent for too long."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch raises both, and subclasses of them
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(
            f"Another process has ended, or was silent for {PATIENCE:.0f} s, so the work cannot go on; look for its "
            "message, and start all processes again."
        ) from None


def count() -> int:
    """Return how many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def here() -> int:
    """Return how many of them run on this machine."""
    return _setting("LOCAL_WORLD_SIZE", 1) if count() > 1 else 1


def number() -> int:
    """Return the number of this process, from 0; process 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def check_device(wanted: object) -> None:
    """Raise InputError for text that names no device, and for a device that this machine does not have."""
    name = named_device(wanted)
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        raise InputError.naming("{device} {} is not available on this machine; use {device} cpu.", wanted)
    place, there = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if place >= there:
        known = "one GPU, {device} 0" if there == 1 else f"{there} GPUs, {{device}} 0 to {there - 1}"
        raise InputError.naming(f"{{device}} {{}} does not exist; this machine has {known}.", wanted)


def named_device(wanted: object) -> str:
    """Return cpu, cuda or cuda:N for YOLOv5's spellings: cpu, 0, cuda:0, cuda; nothing (YOLOv5's default) is cpu.

    Raises InputError for other text.
    """
    text = str("" if wanted is None else wanted).strip().lower().rstrip(", ")
    if text in ("", "none", "cpu", "cuda"):
        return "cuda" if text == "cuda" else "cpu"
    numbers = text.removeprefix("cuda:")
    if re.fullmatch("[0-9]{1,3}", numbers):
        return f"cuda:{int(numbers)}"
    if re.fullmatch(r"[0-9]{1,3}( ?, ?(cuda:)?[0-9]{0,3})+", numbers):
        processes = len([n for n in numbers.split(",") if n.strip()])
        raise InputError.naming(
            "{device} {} names several GPUs; one process uses one, so start a process for each: torchrun "
            "--nproc-per-node {} -m dsconvert ... --device cuda.", wanted, processes
        )  # fmt: skip
    raise InputError.naming(
        "{device} {} is not a device; give cpu, 0 (the first GPU) or cuda:0.", printable(wanted, 60)
    )


def device(wanted: object) -> str:
    """Return the device as torch names it; `cuda` is this process's own GPU.

    Raises InputError if it cannot be used.
    """
    name = named_device(wanted)
    if name == "cpu":
        return name
    if name == "cuda" and count() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # a driver that is too old, a GPU that another process holds
        why = printable(str(error).partition("\n")[0], 200).rstrip(".")
        raise InputError.naming("{device} {} cannot be used ({}); use {device} cpu.", wanted, why) from None
    return name


def share(items: int, unit: int = 1) -> slice:
    """Return this process's run of so many items; all processes' runs together, in order, are all items.

    Runs are made of whole units, except the last one, if there are enough items.
    """
    unit = unit if items >= unit * count() else 1
    units = -(-items // unit)
    return slice(number() * units // count() * unit, (number() + 1) * units // count() * unit)


def summed(values: Tensor) -> Tensor:
    """Return the sum of all processes' tensors (one shape, on CPU)."""
    if count() > 1:
        values = values.clone()
        with _together():
            dist.all_reduce(values)
    return values


def gathered(item: T) -> list[T]:
    """Return all processes' items in order.

    An item may be anything that pickles, as the processes trust each other.
    """
    if count() == 1:
        return [item]
    items: list[Any] = [None] * count()
    with _together():
        dist.all_gather_object(items, item)
    return items


def joined(values: Tensor) -> Tensor:
    """Return all processes' tensors, joined along the first dimension."""
    return torch.cat(gathered(values)) if count() > 1 else values
