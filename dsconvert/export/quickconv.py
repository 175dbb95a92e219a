"""QLinearConv, channels last, in the shapes that ONNX Runtime's CPU kernels are fast at.

The fast kernel (MLAS: MlasConvSymPackWSize) takes input channels in multiples of 4 and output channels in multiples of
4, and computes 16 of them at once; anything else is unrolled, multiplied and rounded in three passes over memory. Two
kinds of convolution in these networks are anything else, and both can be had in the right shape with equal numbers:

- the first, of an image's 3 channels: four pixels in a row are one pixel of 12 channels, which costs no copy when
  channels are last. Its kernel then makes all outputs that begin within four pixels, side by side as channels. Where it
  fits, two rows are one too.
- the last, of so many channels a class: zero weights fill them up to a multiple of 16, and a Slice drops what they
  make.

Both are made of the stored weights by nodes that are folded at load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from dsconvert.export.builder import OnnxBuilder

RUN = 4  # pixels in one
FULL = 16  # output channels computed at once
FEW = 32  # up to so many, filling them up gains no time
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Conv:
    """A QLinearConv node, channels first, and its weight's shape (cho, chi, kh, kw)."""

    node: NodeProto
    weight: tuple[int, ...]

    def attribute(self, name: str, default: list[int]) -> list[int]:
        """A list of integers."""
        return next((list(a.ints) for a in self.node.attribute if a.name == name), default)

    @property
    def plain(self) -> bool:
        """Neither grouped nor dilated, and padded by numbers."""
        known = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        return (
            len(self.weight) == 4
            and known.get("group", 1) == 1
            and set(known.get("dilations", [1])) == {1}
            and known.get("auto_pad", b"NOTSET") == b"NOTSET"
        )


def add_conv(b: OnnxBuilder, conv: Conv, x: str, output: str) -> None:
    """The convolution of x (n, h, w, chi), as `output` (n, h', w', cho)."""
    cho = conv.weight[0]
    if cho <= FEW or cho % 4 == 0 or not conv.plain:
        _emit(b, conv, [x, *conv.node.input[1:]], output)
        return
    more = -cho % FULL
    inputs = [x, *conv.node.input[1:]]
    inputs[3] = b.node("Pad", [inputs[3], b.shape(*[0] * 4, more, *[0] * 3)], f"{output}.weight")
    for place in (4, 8):  # scales and biases
        if place < len(inputs) and inputs[place]:
            inputs[place] = b.node("Pad", [inputs[place], b.shape(0, more)], f"{output}.{place}")
    _emit(b, conv, inputs, f"{output}.wide")
    b.node("Slice", [f"{output}.wide", b.shape(0), b.shape(cho), b.shape(3)], output)


def add_first_conv(b: OnnxBuilder, conv: Conv, image: str, size: tuple[int, int], output: str) -> bool:
    """The convolution of an image (n, 3, h, w), channels first, as `output` (n, h', w', cho); False if it is not of
    the kind that this can do."""
    cho, chi, high, kernel = conv.weight
    (top, left, bottom, right), (down, step) = conv.attribute("pads", [0] * 4), conv.attribute("strides", [1, 1])
    outputs = (size[1] + left + right - kernel) // step + 1
    made = RUN // step  # side by side, by one kernel
    if not conv.plain or chi % 4 == 0 or RUN % step or size[1] % RUN or outputs * step != size[1]:
        return False
    pixels = -(-((made - 1) * step + kernel) // RUN)  # of RUN each, that the kernel covers
    inputs = list(conv.node.input)
    width = RUN * (outputs // made - 1 + pixels)
    if width < size[1] + left:
        return False
    rows = down if not any(n % down for n in (size[0], high, top, bottom)) else 1
    inputs[0] = _in_runs(b, image, output, inputs[2], (chi, *size), rows, (left, width - left - size[1]))
    inputs[3] = _side_by_side(b, conv, made, step, pixels, rows, f"{output}.weight")
    for place in (4, 8):
        if place < len(inputs) and inputs[place]:
            inputs[place] = b.node("Concat", [inputs[place]] * made, f"{output}.{place}", axis=0)
    _emit(b, conv, inputs, f"{output}.wide", pads=[top // rows, 0, bottom // rows, 0], strides=[down // rows, 1])
    b.node("Reshape", [f"{output}.wide", b.shape(0, (size[0] + top + bottom - high) // down + 1, outputs, cho)], output)
    return True


def _in_runs(
    b: OnnxBuilder, image: str, name: str, zero: str, shape: tuple[int, int, int], rows: int, pads: tuple[int, int]
) -> str:
    """The image (n, *shape), padded at both sides, as (n, h / rows, w' / RUN, RUN * rows * chi): pixels, rows and
    channels in that order."""
    chi, high, wide = shape
    if rows > 1:  # whole rows are moved, which is cheap, and make as many times more channels
        apart = b.node("Reshape", [image, b.shape(0, chi, high // rows, rows, wide)], f"{name}.rows")
        turned = b.node("Transpose", [apart], f"{name}.apart", perm=[0, 3, 1, 2, 4])
        image = b.node("Reshape", [turned, b.shape(0, rows * chi, high // rows, wide)], f"{name}.planes")
    padded = b.node("Pad", [image, b.shape(0, 0, 0, pads[0], 0, 0, 0, pads[1]), zero], f"{name}.padded")
    last = b.node("Transpose", [padded], f"{name}.image", perm=[0, 2, 3, 1])
    return b.node(
        "Reshape", [last, b.shape(0, high // rows, (wide + sum(pads)) // RUN, RUN * rows * chi)], f"{name}.runs"
    )


def _side_by_side(b: OnnxBuilder, conv: Conv, made: int, step: int, pixels: int, rows: int, name: str) -> str:
    """Weights (cho, chi, kh, kw) -> (made * cho, RUN * rows * chi, kh / rows, pixels), one copy moved on by `step` a
    time."""
    cho, chi, high, kernel = conv.weight
    rest = RUN * pixels - kernel
    copies = [
        b.node("Pad", [conv.node.input[3], b.shape(0, 0, 0, i * step, 0, 0, 0, rest - i * step)], f"{name}.{i}")
        for i in range(made)
    ]
    joined = b.node("Concat", copies, f"{name}.copies", axis=0)
    shape = b.shape(made * cho, chi, high // rows, rows, pixels, RUN)
    apart = b.node("Reshape", [joined, shape], f"{name}.runs")
    last = b.node("Transpose", [apart], f"{name}.last", perm=[0, 5, 3, 1, 2, 4])
    return b.node("Reshape", [last, b.shape(made * cho, RUN * rows * chi, high // rows, pixels)], name)


def _emit(b: OnnxBuilder, conv: Conv, inputs: list[str], output: str, **changed: list[int]) -> None:
    made = helper.make_node("QLinearConv", inputs, [output], name=conv.node.name, domain=MICROSOFT)
    made.attribute.extend(a for a in conv.node.attribute if a.name not in changed)
    new = {name: value for name, value in changed.items() if any(v != (name == "strides") for v in value)}
    made.attribute.extend(helper.make_attribute(name, value) for name, value in new.items())
    made.attribute.append(helper.make_attribute("channels_last", 1))
    b.nodes.append(made)


def is_scalar(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of that shape holds one number."""
    return int(np.prod(shape)) == 1
