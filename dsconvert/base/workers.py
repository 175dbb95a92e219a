"""Several processes with a part of the images each, started by torchrun: what one of them has to know of the others.

Alone, every function is the identity. All sums are kept in main memory (gloo), wherever the network runs; every
process ends with the same sums and so fits the same layers.
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
PATIENCE = 300.0  # seconds that a process waits for another; those that work are together within seconds


def start() -> None:
    """Meet the other processes, where torchrun has started this one with others. Raises InputError when what torchrun
    sets is not there, or they do not come."""
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
    # gloo's threads hold tensors a moment longer than the sum they made; they must let go while Python still runs,
    # or the process that ends first is aborted now and then, all its work done
    atexit.register(dist.destroy_process_group)


def _setting(name: str, otherwise: int) -> int:
    """A number that torchrun sets."""
    text = os.environ.get(name, str(otherwise))
    if not text.strip().isdecimal() or len(text) > 9:
        raise InputError(f"{name} is {shown(text)}, not a number; torchrun sets it.")
    return int(text)


@contextmanager
def _together() -> Iterator[None]:
    """What needs the other processes. Raises InputError when one of them has ended, or is silent for too long."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch raises both, and kinds of them
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(
            f"Another of the processes has ended, or was silent for {PATIENCE:.0f} s, so nothing more can be done; "
            "look for its message, and start all of them again."
        ) from None


def count() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def here() -> int:
    """How many of them run on this machine."""
    return _setting("LOCAL_WORLD_SIZE", 1) if count() > 1 else 1


def number() -> int:
    """Which of them this is, from 0; 0 writes the files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def check_device(wanted: object) -> None:
    """Raises InputError for what names no device, and for one that this machine has not."""
    name = named_device(wanted)
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        raise InputError.naming("{device} {} is not available on this machine; use {device} cpu.", wanted)
    place, there = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if place >= there:
        known = "one GPU, {device} 0" if there == 1 else f"{there} GPUs, {{device}} 0 to {there - 1}"
        raise InputError.naming(f"{{device}} {{}} is not there; this machine has {known}.", wanted)


def named_device(wanted: object) -> str:
    """cpu, cuda, or cuda:N, from YOLOv5's spellings: cpu, 0, cuda:0, cuda; with nothing said (YOLOv5's default) it is
    cpu. Raises InputError for others."""
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
    """The device in torch's spelling: this process's own GPU for `cuda`. Raises InputError where it is not usable."""
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
    """This process's run of so many items; together, in the processes' order, the runs are all of them. All but the
    last are made of whole units, where there are enough."""
    unit = unit if items >= unit * count() else 1
    units = -(-items // unit)
    return slice(number() * units // count() * unit, (number() + 1) * units // count() * unit)


def summed(values: Tensor) -> Tensor:
    """The sum of everyone's tensors (one shape, on CPU)."""
    if count() > 1:
        values = values.clone()
        with _together():
            dist.all_reduce(values)
    return values


def gathered(item: T) -> list[T]:
    """Everyone's item, in the processes' order. Anything that pickles: the processes trust each other."""
    if count() == 1:
        return [item]
    items: list[Any] = [None] * count()
    with _together():
        dist.all_gather_object(items, item)
    return items


def joined(values: Tensor) -> Tensor:
    """Everyone's tensors, one after the other along the first dimension."""
    return torch.cat(gathered(values)) if count() > 1 else values
