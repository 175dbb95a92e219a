"""QLinearConv, channels last, in the shapes that ONNX Runtime's CPU kernels are fast at.

The fast kernel (MLAS: MlasConvSymPackWSize) takes input channels in multiples of 4 and output channels in multiples of
4, and computes 16 of them at once; anything else is unrolled, multiplied and rounded in three passes over memory. Two
kinds of convolution in these networks are anything else, and both can be had in the right shape with equal numbers:

- the first, of an image's 3 channels: where it takes every second pixel, two rows of four pixels are one of 24 channels
  (see `quads`); else the channels are filled up to 4.
- the last, of so many channels a class: zero weights fill them up to a multiple of 16, and a Slice drops what they
  make.

Both are made of the stored weights by nodes that are folded at load. Layout packed has both too, in standard
operators: ONNX Runtime, which turns maps to channels last, leaves out the Transpose that turns the image back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from dsconvert.export.builder import OnnxBuilder
from dsconvert.export.quads import image_by_quads, kernel_by_quads, outputs_apart, quads_of, twice

RUN = 4  # input channels taken together
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


def add_conv(b: OnnxBuilder, conv: Conv, x: str, output: str) -> tuple[str, int]:
    """The convolution of x (n, h, w, chi), as `output` (n, h', w', cho). Returns that, or the map of more channels it
    is cut out of, and how many more these are."""
    cho, inputs = conv.weight[0], [x, *conv.node.input[1:]]
    more = more_channels(cho) if conv.plain else 0
    if not more:
        _emit(b, conv, inputs, output)
        return output, 0
    inputs[3] = b.node("Pad", [inputs[3], b.shape(*[0] * 4, more, *[0] * 3)], f"{output}.weight")
    for place in (4, 8):  # scales and biases
        if place < len(inputs) and inputs[place]:
            inputs[place] = b.node("Pad", [inputs[place], b.shape(0, more)], f"{output}.{place}")
    wide = f"{output}.wide"
    _emit(b, conv, inputs, wide)
    b.node("Slice", [wide, b.shape(0), b.shape(cho), b.shape(3)], output)
    return wide, more


def more_channels(cho: int) -> int:
    """How many output channels the fast kernel should have more than so many."""
    return 0 if cho <= FEW or cho % 4 == 0 else -cho % FULL


def add_first_conv(b: OnnxBuilder, conv: Conv, image: str, size: tuple[int, int], output: str) -> bool:
    """The convolution of an image (n, 3, h, w), channels first, as `output` (n, h', w', cho); False if it is not of
    the kind that this can do."""
    cho, chi, *kernel = conv.weight
    if not conv.plain or chi % RUN == 0:
        return False
    inputs = list(conv.node.input)
    pads = conv.attribute("pads", [0] * 4)
    quads = quads_of((kernel[0], kernel[1]), pads, size) if conv.attribute("strides", [1, 1]) == [2, 2] else None
    if quads:
        inputs[0] = image_by_quads(b, image, (chi, size[0]), quads, inputs[2], output)
        inputs[3] = kernel_by_quads(b, inputs[3], conv.weight, quads, output)
        for place in (4, 8):  # scales and biases
            if place < len(inputs) and inputs[place]:
                inputs[place] = twice(b, inputs[place], f"{output}.{place}")
        _emit(b, conv, inputs, f"{output}.pairs", pads=[quads.pads[0], 0, quads.pads[1], 0], strides=[1, 1])
        outputs_apart(b, f"{output}.pairs", cho, quads, output)
        return True
    more = b.shape(0, 0, 0, 0, 0, -chi % RUN, 0, 0)
    filled = b.node("Pad", [image, more], f"{output}.filled")
    inputs[0] = b.node("Transpose", [filled], f"{output}.image", perm=[0, 2, 3, 1])
    inputs[3] = b.node("Pad", [conv.node.input[3], more], f"{output}.weight")
    _emit(b, conv, inputs, output)
    return True


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
