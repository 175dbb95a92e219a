"""A YOLOv5 network built from its model yaml (`backbone` and `head` rows), and the facts of its Detect layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsconvert.errors import InputError, shown
from dsconvert.graph.shapes import MAX_POOL
from dsconvert.yolo.modules import ACTIVATIONS, C3, SPP, SPPF, Bottleneck, Concat, Conv, Detect, Focus

MAX_LAYERS = 200  # the largest published YOLOv5 (P7) has fewer than 60 rows
MAX_BLOCKS = 1000  # and, at depth 1.33, about 120 repeated blocks
MAX_ARGUMENT = 1 << 16  # of any number in a row's args
MAX_STRIDE, MAX_ANCHOR = 1024, 1e5  # pixels
# The published DSConv blocks have the layout of these, and their rows the same arguments.
VARIANTS = {"DSConv2D": "Conv", "Bottleneck_DSConv2D": "Bottleneck", "DSConv2D_C3": "C3"}


@dataclass(frozen=True)
class Head:
    """What decoding needs: class names, strides in pixels, anchors (nl, na, 2) in pixels."""

    names: tuple[str, ...]
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def na(self) -> int:
        """Anchors per grid cell."""
        return len(self.anchors[0])

    @property
    def stride(self) -> int:
        """Largest stride: image sides must be multiples of it."""
        return max(self.strides)


class Network(nn.Module):
    """The layers of a model yaml in order; `forward` returns Detect's raw maps.

    Each layer carries `index` and `sources` (absolute indices of the layers it reads; -1 is the image).
    """

    def __init__(self, config: Mapping[str, Any], nc: int, na: int, act: str = "SiLU") -> None:
        super().__init__()
        self.config = dict(config)
        self.model, self.sources, self.kinds = _build(config, nc, na, act)
        self._kept = {s for sources in self.sources for s in sources}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image batch (n, 3, h, w), float 0..1 RGB -> raw maps (n, na * (nc + 5), h / stride, w / stride)."""
        kept: dict[int, Any] = {-1: x}
        out: Any = x
        for index, (layer, sources) in enumerate(zip(self.model, self.sources, strict=True)):
            args = [kept[s] for s in sources]
            out = layer(args if isinstance(layer, (Concat, Detect)) else args[0])
            if index in self._kept:
                kept[index] = out
        return out

    @property
    def detect(self) -> Detect:
        """The last layer."""
        last = self.model[-1]
        assert isinstance(last, Detect)
        return last

    @property
    def backbone_length(self) -> int:
        """Number of rows in the yaml's backbone: layers before this index are `backbone`, the rest `head`."""
        return len(self.config["backbone"])

    def fuse(self) -> Network:
        """Fold every BatchNorm into its convolution, in place; returns self in evaluation mode."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fuse()
        return self.eval()

    def overflowing(self) -> str | None:
        """Name of a convolution that `fuse` would give infinite numbers, None when there is none."""
        for name, module in self.named_modules():
            if isinstance(module, Conv) and not bool(torch.isfinite(module.fused_bounds()).all()):
                return name
        return None


def _literal(arg: Any, nc: int) -> Any:
    """YOLOv5 evaluates strings found in the args; only these few are ever meant."""
    words = {"nc": nc, "None": None, "True": True, "False": False, "nearest": "nearest", "anchors": None}
    if isinstance(arg, str) and arg in words:
        return words[arg]
    numbers = arg if isinstance(arg, (list, tuple)) else [] if arg is None else [arg]
    if len(numbers) > 16 or not all(isinstance(n, (int, float)) for n in numbers):
        raise InputError(f"The model yaml holds the argument {shown(arg)}, which dsconvert does not know.")
    if not all(0 <= n <= MAX_ARGUMENT for n in numbers):  # channels, kernels, strides, paddings, groups, factors
        raise InputError(f"The model yaml gives {shown(arg)}, which is not a number from 0 to {MAX_ARGUMENT}.")
    return arg


def _as_list(args: list[Any]) -> list[Any]:
    """Numbers of the one argument, itself a number or several."""
    return [n for arg in args for n in (arg if isinstance(arg, (list, tuple)) else [arg])]


def _positive(value: Any, what: str, most: int = MAX_ARGUMENT) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= most:
        raise InputError(f"The model yaml gives {shown(value)} as {what}, which is not a number from 1 to {most}.")
    return int(value)


def _build(
    config: Mapping[str, Any], nc: int, na: int, act: str
) -> tuple[nn.ModuleList, list[tuple[int, ...]], list[str]]:
    if act not in ACTIVATIONS:
        raise InputError(f"The activation {act} is not supported; known are {', '.join(ACTIVATIONS)}.")
    try:
        rows: Sequence[Any] = [*config["backbone"], *config["head"]]
        depth, width = float(config["depth_multiple"]), float(config["width_multiple"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"The model yaml has no usable {error}.") from None
    if not 0 < len(rows) <= MAX_LAYERS or not 0 < depth <= 16 or not 0 < width <= 16:
        raise InputError("The model yaml has an impossible number of layers, depth or width.")
    blocks = 0
    layers: list[nn.Module] = []
    channels: list[int] = []
    all_sources: list[tuple[int, ...]] = []
    kinds: list[str] = []
    first = _positive(config.get("ch", 3), "input channels")
    if first != 3:
        raise InputError(f"The model reads images of {first} channels; dsconvert converts models for colour images.")
    for index, row in enumerate(rows):
        try:
            source, repeat, kind, args = row
            sources = tuple(index + int(s) if int(s) < 0 else int(s) for s in
                            (source if isinstance(source, (list, tuple)) else [source]))  # fmt: skip
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"Layer {index} of the model yaml is not [from, number, module, args].") from None
        if not 0 < len(sources) <= MAX_LAYERS or any(not -1 <= s < index or (s == -1 and index > 0) for s in sources):
            raise InputError(f"Layer {index} of the model yaml reads a layer that is not before it.")
        inputs = [channels[s] if s >= 0 else first for s in sources]
        number = _positive(repeat, "a repeat count", 100)
        number = max(round(number * depth), 1) if number > 1 else number
        blocks += number
        if blocks > MAX_BLOCKS:
            raise InputError(f"The model yaml has more than {MAX_BLOCKS} blocks.")
        if not isinstance(kind, str) or not isinstance(args, (list, tuple)) or len(args) > 8:
            raise InputError(f"Layer {index} of the model yaml is not [from, number, module, args].")
        kind = VARIANTS.get(kind, kind)
        literals = [] if kind == "Detect" else [_literal(a, nc) for a in args]
        layer, out = _layer(kind, inputs, literals, number, width, nc, na, act)
        layers.append(layer)
        channels.append(out)
        all_sources.append(sources)
        kinds.append(str(kind).rsplit(".", 1)[-1])
    if not isinstance(layers[-1], Detect):
        raise InputError(f"The last layer is {kinds[-1]}, not Detect: this is not a detection model.")
    return nn.ModuleList(layers), all_sources, kinds


def _layer(
    kind: str, inputs: list[int], args: list[Any], n: int, width: float, nc: int, na: int, act: str
) -> tuple[nn.Module, int]:
    """One yaml row -> (module, output channels)."""
    c1 = inputs[0]
    try:
        if kind in ("Conv", "C3", "SPP", "SPPF", "Focus", "Bottleneck"):
            c2 = math.ceil(_positive(args[0], "channels") * width / 8) * 8
            rest = args[1:]
            if kind == "C3":
                shortcut = bool(rest[0]) if rest else True
                groups = _positive(rest[1], "groups") if len(rest) > 1 else 1
                return C3(c1, c2, n, shortcut, groups, act=act), c2
            if kind in ("SPP", "SPPF") and any(k > MAX_POOL for k in _as_list(rest[:1])):
                raise InputError(f"The model yaml's {kind} pools over squares larger than {MAX_POOL}.")
            make: Any = {"Conv": Conv, "SPP": SPP, "SPPF": SPPF, "Focus": Focus, "Bottleneck": Bottleneck}[kind]
            blocks = [make(c1 if i == 0 else c2, c2, *rest, act=act) for i in range(n)]
            return (blocks[0] if n == 1 else nn.Sequential(*blocks)), c2
        if kind == "nn.Upsample":
            if args[0] is not None or args[2] != "nearest" or args[1] not in range(1, 17):
                raise InputError("Only nearest-neighbour upsampling by a whole number up to 16 is supported.")
            return nn.Upsample(None, int(args[1]), "nearest"), c1
        if kind == "Concat":
            return Concat(), sum(inputs)
        if kind == "Detect":
            return Detect(nc, inputs, na), 0
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The model yaml's arguments for a {kind} layer cannot be used: {args}.") from None
    raise InputError(
        f"The layer {kind} is not supported; dsconvert knows Conv, Focus, C3, SPP, SPPF, Bottleneck, "
        "nn.Upsample, Concat and Detect."
    )


def whole_strides(strides: Sequence[float], levels: int) -> tuple[int, ...]:
    """Strides in pixels as the integers they are. Raises InputError when they are not usable."""
    if len(strides) != levels or not all(1 <= s <= MAX_STRIDE for s in strides):
        raise InputError(f"The checkpoint's strides {list(strides)} do not fit its Detect layer.")
    return tuple(round(float(s)) for s in strides)


def head_from_detect(detect: Detect, strides: Sequence[float], names: Sequence[str]) -> Head:
    """Head with anchors in pixels; the buffer holds them in units of each level's stride."""
    whole = whole_strides(strides, detect.anchors.shape[0])
    pixels = detect.anchors.double() * torch.tensor(whole, dtype=torch.float64)[:, None, None]
    if not bool(((pixels > 0) & (pixels <= MAX_ANCHOR)).all()):
        raise InputError(f"The checkpoint's anchors are not sizes from 0 to {MAX_ANCHOR:.0f} pixels.")
    anchors = tuple(tuple((float(w), float(h)) for w, h in level) for level in pixels)
    return Head(tuple(names), whole, anchors)
