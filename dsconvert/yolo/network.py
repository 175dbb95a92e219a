"""Build a YOLOv5 or YOLOv7 network from its model yaml (`backbone` and `head` rows), and describe its Detect layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsconvert.base.errors import InputError
from dsconvert.yolo.attention import TransformerLayer
from dsconvert.yolo.layers import DETECTS, literal, make_layer, positive
from dsconvert.yolo.modules import ACTIVATIONS, Concat, Conv, Detect
from dsconvert.yolo.yolov7 import MP, SP, SPPCSPC, IDetect, RepConv

MAX_LAYERS = 200  # the largest published YOLOv5 (P7) has fewer than 60 rows, yolov7x has 122
MAX_BLOCKS = 1000  # repeated blocks; there are about 120 at depth 1.33
MAX_STRIDE, MAX_ANCHOR = 1024, 1e5  # pixels
FOLDS = (Conv, RepConv, IDetect)  # layers with parts that only training needs
OF_YOLOV7 = (IDetect, RepConv, SPPCSPC, MP, SP)  # layers that YOLOv5 does not have
# the published DSConv blocks have the layout of these, and their rows take the same arguments
VARIANTS = {"DSConv2D": "Conv", "Bottleneck_DSConv2D": "Bottleneck", "DSConv2D_C3": "C3"}


@dataclass(frozen=True)
class Head:
    """What decoding needs.

    names: of the classes.
    strides: in pixels.
    anchors: (nl, na, 2), in pixels.
    nm: mask coefficients of a box; 0 for a detector, otherwise the last raw map holds the prototypes.
    class_untrained: whether there is one class with a meaningless score, as YOLOv7 neither trains nor reads it. A box's
        score is its objectness then.
    """

    names: tuple[str, ...]
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    nm: int = 0
    class_untrained: bool = False

    @property
    def parts(self) -> tuple[int, ...]:
        """How many numbers of a box are x, y, w, h; objectness; classes; and mask coefficients, if there are any."""
        return (4, 1, self.nc, self.nm) if self.nm else (4, 1, self.nc)

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def na(self) -> int:
        """Anchors of a grid cell."""
        return len(self.anchors[0])

    @property
    def stride(self) -> int:
        """The largest stride; image sides must be multiples of it."""
        return max(self.strides)


class Network(nn.Module):
    """The layers of a model yaml in order; `forward` returns Detect's raw maps.

    `sources` has for each layer the indices of the layers that it reads; -1 is the image.
    """

    def __init__(self, config: Mapping[str, Any], nc: int, na: int, act: str = "SiLU") -> None:
        super().__init__()
        self.config = dict(config)
        self.model, self.sources, self.kinds = _build(config, nc, na, act)
        self._kept = {s for sources in self.sources for s in sources}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map an image batch (n, 3, h, w), RGB 0..1, to raw maps (n, na * (nc + 5), h / stride, w / stride).

        A segmentation network returns what `Segment` does.
        """
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
        """Rows of the yaml's backbone: layers before this index are `backbone`, the others `head`."""
        return len(self.config["backbone"])

    @property
    def is_yolov7(self) -> bool:
        """Whether any layer is one that only YOLOv7 has, whatever kind of Detect comes last."""
        return any(isinstance(module, OF_YOLOV7) for module in self.modules())

    def fused(self) -> Network:
        """Return a copy in evaluation mode with BatchNorm, RepConv's branches and IDetect's implicit layers folded
        in.
        """
        made = copy.deepcopy(self)
        for module in list(made.modules()):
            if isinstance(module, FOLDS):
                module.fuse()
        return made.eval()

    def overflowing(self) -> str | None:
        """Return the name of a layer that would get infinite numbers in `fused` (or `lower`, for attention), or
        None.
        """
        for name, module in self.named_modules():
            if isinstance(module, (*FOLDS, TransformerLayer)) and not bool(torch.isfinite(module.fused_bounds()).all()):
                return name
        return None


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
    first = positive(config.get("ch", 3), "input channels")
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
        number = positive(repeat, "a repeat count", 100)
        number = max(round(number * depth), 1) if number > 1 else number
        blocks += number
        if blocks > MAX_BLOCKS:
            raise InputError(f"The model yaml has more than {MAX_BLOCKS} blocks.")
        if not isinstance(kind, str) or not isinstance(args, (list, tuple)) or len(args) > 8:
            raise InputError(f"Layer {index} of the model yaml is not [from, number, module, args].")
        kind = VARIANTS.get(kind, kind)
        if kind in DETECTS:  # classes and anchors come from the file's own layer
            args = args[2:] if kind == "Segment" else []
        literals = [literal(a, nc) for a in args]
        layer, out = make_layer(kind, inputs, literals, number, width, nc, na, act)
        layers.append(layer)
        channels.append(out)
        all_sources.append(sources)
        kinds.append(str(kind).rsplit(".", 1)[-1])
    if not isinstance(layers[-1], Detect):
        raise InputError(f"The last layer is {kinds[-1]}, not Detect: this is not a detection model.")
    return nn.ModuleList(layers), all_sources, kinds


def whole_strides(strides: Sequence[float], levels: int) -> tuple[int, ...]:
    """Return strides in pixels as integers. Raises InputError when they are not usable."""
    if len(strides) != levels or not all(1 <= s <= MAX_STRIDE for s in strides):
        raise InputError(f"The checkpoint's strides {list(strides)} do not fit its Detect layer.")
    return tuple(round(float(s)) for s in strides)


def head_from_detect(detect: Detect, strides: Sequence[float], names: Sequence[str], is_yolov7: bool = False) -> Head:
    """Return the head, with anchors in pixels; the buffer holds them in units of each level's stride.

    An IDetect always counts as YOLOv7's.
    """
    whole = whole_strides(strides, detect.anchors.shape[0])
    pixels = detect.anchors.double() * torch.tensor(whole, dtype=torch.float64)[:, None, None]
    if not bool(((pixels > 0) & (pixels <= MAX_ANCHOR)).all()):
        raise InputError(f"The checkpoint's anchors are not sizes from 0 to {MAX_ANCHOR:.0f} pixels.")
    anchors = tuple(tuple((float(w), float(h)) for w, h in level) for level in pixels)
    untrained = len(names) == 1 and (is_yolov7 or isinstance(detect, IDetect))
    return Head(tuple(names), whole, anchors, detect.nm, untrained)
