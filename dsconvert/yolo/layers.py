"""Turn one row of a model yaml into a module; all known layers and their allowed arguments are here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from dsconvert.base.errors import InputError, shown
from dsconvert.graph.ops import MAX_POOL
from dsconvert.yolo.attention import C3TR
from dsconvert.yolo.ghost import C3SPP, C3Ghost, DWConv, GhostBottleneck, GhostConv
from dsconvert.yolo.modules import C3, SPP, SPPF, Bottleneck, Concat, Conv, Detect, Focus
from dsconvert.yolo.segment import Segment
from dsconvert.yolo.yolov7 import MP, SP, SPPCSPC, IDetect, RepConv

MAX_ARGUMENT = 1 << 16  # largest number in a row's args

DETECTS = {"Detect": Detect, "IDetect": IDetect, "Segment": Segment}
MAX_MASKS = 1024  # mask coefficients of a box; the published heads have 32
C3S = {"C3": C3, "C3Ghost": C3Ghost, "C3TR": C3TR}  # these take the number of repeats themselves
C3_BLOCKS = (*C3S, "C3SPP")
_SIMPLE: dict[str, Any] = {  # these take the channels first, then their own arguments
    "SPP": SPP, "SPPF": SPPF, "Focus": Focus, "Bottleneck": Bottleneck, "GhostConv": GhostConv,
    "GhostBottleneck": GhostBottleneck, "DWConv": DWConv, "C3SPP": C3SPP, "SPPCSPC": SPPCSPC,
}  # fmt: skip
_CONVS: dict[str, Any] = {"Conv": Conv, "RepConv": RepConv}  # these also take an activation as last argument
_POOLS: dict[str, Any] = {"MP": MP, "SP": SP}
_POOLING = ("SPP", "SPPF", "C3SPP")
KNOWN = (*_CONVS, *_SIMPLE, *C3S, *_POOLS, "nn.Upsample", "Concat", *DETECTS)


@dataclass(frozen=True)
class Act:
    """An activation among a row's arguments, by class name."""

    kind: str

    def __repr__(self) -> str:
        return f"nn.{self.kind}"


_INSIDE = {"SiLU": ("", "inplace=True"), "ReLU": ("", "inplace=True"), "Hardswish": ("", "inplace=True"),
           "LeakyReLU": ("0.1", "0.1, inplace=True"), "Identity": ("",)}  # fmt: skip
_ACTS = {f"nn.{kind}({inside})": Act(kind) for kind, insides in _INSIDE.items() for inside in insides}


def literal(arg: Any, nc: int) -> Any:
    """Return an argument's value. YOLOv5 and YOLOv7 evaluate strings in the args; only these few are ever meant."""
    words = {"nc": nc, "None": None, "True": True, "False": False, "nearest": "nearest", "anchors": None, **_ACTS}
    if isinstance(arg, str) and arg in words:
        return words[arg]
    numbers = arg if isinstance(arg, (list, tuple)) else [] if arg is None else [arg]
    if len(numbers) > 16 or not all(isinstance(n, (int, float)) for n in numbers):
        raise InputError(f"The model yaml holds the argument {shown(arg)}, which dsconvert does not know.")
    if not all(0 <= n <= MAX_ARGUMENT for n in numbers):  # channels, kernels, strides, paddings, groups, factors
        raise InputError(f"The model yaml gives {shown(arg)}, which is not a number from 0 to {MAX_ARGUMENT}.")
    return arg


def positive(value: Any, what: str, most: int = MAX_ARGUMENT) -> int:
    """Return a number of the yaml from 1 to `most`, as an integer. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= most:
        said = str(value) if isinstance(value, Act) else shown(value)
        raise InputError(f"The model yaml gives {said} as {what}, which is not a number from 1 to {most}.")
    return int(value)


def make_layer(
    kind: str, inputs: list[int], args: list[Any], n: int, width: float, nc: int, na: int, act: str
) -> tuple[nn.Module, int]:
    """Return the module and output channels of one yaml row. Raises InputError for an unknown or impossible layer."""
    c1 = inputs[0]
    try:
        if kind == "Segment":
            hidden = math.ceil(positive(args[1], "channels") * width / 8) * 8
            return Segment(nc, inputs, na, positive(args[0], "mask coefficients", MAX_MASKS), hidden, act), 0
        if kind in DETECTS:
            return DETECTS[kind](nc, inputs, na), 0
        if kind == "Concat":
            return Concat(), sum(inputs)
        if kind == "nn.Upsample":
            if args[0] is not None or args[2] != "nearest" or args[1] not in range(1, 17):
                raise InputError("Only nearest-neighbour upsampling by a whole number up to 16 is supported.")
            return nn.Upsample(None, int(args[1]), "nearest"), c1
        sizes = args[1:2] if kind in _POOLING else args[:1] if kind in _POOLS else []
        if any(size > MAX_POOL for size in _as_list(sizes)):
            raise InputError(f"The model yaml's {kind} pools over squares larger than {MAX_POOL}.")
        if kind in _POOLS:
            return _repeated([_POOLS[kind](*args) for _ in range(n)]), c1
        if kind in KNOWN:
            # a number of channels that equals Detect's is not scaled
            given = positive(args[0], "channels")
            c2 = given if given == na * (nc + 5) else math.ceil(given * width / 8) * 8
            return _with_channels(kind, c1, c2, args[1:], n, act), c2
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The model yaml's arguments for a {kind} layer cannot be used: {args}.") from None
    raise InputError(f"The layer {kind} is not supported; dsconvert supports {', '.join(KNOWN[:-1])} and {KNOWN[-1]}.")


def _with_channels(kind: str, c1: int, c2: int, rest: list[Any], n: int, act: str) -> nn.Module:
    if kind in C3S:
        shortcut = bool(rest[0]) if rest else True
        groups = positive(rest[1], "groups") if len(rest) > 1 else 1
        return C3S[kind](c1, c2, n, shortcut, groups, act=act)
    make = _SIMPLE.get(kind)
    if make is None:
        make = _CONVS[kind]
        rest, act = _activation(rest, act)
    if any(isinstance(a, Act) for a in rest):
        raise ValueError("an activation in the place of a number")
    return _repeated([make(c1 if i == 0 else c2, c2, *rest, act=act) for i in range(n)])


def _activation(rest: list[Any], act: str) -> tuple[list[Any], str]:
    """Split [k, s, p, g, act], or YOLOv5 v7.0's [k, s, p, g, dilation, act], into what is before, and the
    activation.
    """
    if len(rest) < 5:
        return rest, act
    if len(rest) == 6 and rest[4] == 1:
        rest = [*rest[:4], rest[5]]
    *before, last = rest
    if len(before) != 4 or not (isinstance(last, (Act, bool)) or last == 1):
        raise ValueError("not an activation")
    return before, last.kind if isinstance(last, Act) else act if last else "Identity"


def _repeated(blocks: list[nn.Module]) -> nn.Module:
    return blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks)


def _as_list(args: list[Any]) -> list[Any]:
    """Return the numbers of one argument, itself a number or several."""
    return [n for arg in args for n in (arg if isinstance(arg, (list, tuple)) else [arg])]
