"""Checks of arguments that the command line's parser makes for the commands."""

from __future__ import annotations

from types import NoneType

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.convert.options import QuantizeOptions
from dsconvert.photos.dataset import SPLITS

ACTIVATIONS = ("int8", "float")


def check_values(options: QuantizeOptions) -> None:
    """Raise InputError for values that the command line's parser would refuse."""
    if options.activations not in ACTIVATIONS:
        raise InputError(f"activations {options.activations!r} is not one of {', '.join(ACTIVATIONS)}.")
    if options.kds not in ("int", "float"):
        raise InputError(f"kds {options.kds!r} is not one of int, float.")
    Size.of(options.imgsz)  # raises for invalid values
    numbers = {"bits": options.bits, "target_size": options.target_bytes, "block_size": options.block_size,
               "samples": options.samples, "seed": options.seed,
               "finetune_steps": options.finetune_steps}  # fmt: skip
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"{name} {value!r} is not a whole number.")
    if not isinstance(options.finetune_time, (int, float, NoneType)):
        raise InputError(f"finetune_time {options.finetune_time!r} is not a number.")
    check_split(options.split)
    if options.block_size is not None and options.block_size < 1:
        raise InputError("block_size must be at least 1.")


def check_split(split: str | None) -> None:
    """Raise InputError for an unknown split."""
    if split is not None and split not in SPLITS:
        raise InputError(f"split {split!r} is not one of {', '.join(SPLITS)}.")
