"""Convolutions in the shapes that ONNX Runtime's int8 CPU kernels are fast at, channels last.

The fast kernel (MLAS: MlasConvSymPackWSize) takes input channels in multiples of 4 and output channels in multiples of
4, and computes 16 of them at once; anything else is unrolled, multiplied and rounded in three passes over memory. Two
kinds of convolution in these networks are anything else, and both can be had in the right shape with equal numbers:

- the last, of so many channels a class: zero weights fill them up to a multiple of 16, and what they make is dropped.
- the first, of an image's 3 channels: zeros fill them up to 4; or, where it takes every second pixel, two rows of four
  pixels become one pixel, a quad, of 24 channels, and two outputs side by side one of twice as many. A kernel 6x6 is
  then one of 3x2 quads, with a third more products, the additional ones with zeros. The kernel reads each pixel's
  channels as one run of bytes, and the image's bytes are turned around by fours: a quarter of the work, where two
  threads that write single bytes are in each other's cache lines.

All weights are made of the stored ones by nodes that are folded at load.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsconvert.base.builder import OnnxBuilder

WIDE = 4  # pixels of a quad along a row
STEP = 2  # pixels from one output to the next

RUN = 4  # input channels taken together
FULL = 16  # output channels computed at once
FEW = 32  # up to so many, filling them up gains no time


def more_channels(cho: int) -> int:
    """How many output channels the fast kernel should have more than so many."""
    return 0 if cho <= FEW or cho % 4 == 0 else -cho % FULL


@dataclass(frozen=True)
class Quads:
    """How many pixels stand left and right of an image's rows so that they are whole quads, and how many quads (units)
    a row has then; the kernel (rows, columns) in quads, the rows of zeros above and below it in pixels, the new
    convolution's padding above and below in quads, and its number of output rows and columns before they were
    paired."""

    left: int
    right: int
    units: int
    kernel: tuple[int, int]
    above: int
    below: int
    pads: tuple[int, int]
    outputs: tuple[int, int]


def quads_of(kernel: tuple[int, int], pads: list[int], size: tuple[int, int]) -> Quads | None:
    """For a kernel (kh, kw) at every second pixel of an image (h, w) padded by (top, left, bottom, right); None where
    rows or outputs do not come in pairs."""
    (kh, kw), (top, left, bottom, right), (high, wide) = kernel, pads, size
    outputs = (high + top + bottom - kh) // STEP + 1, (wide + left + right - kw) // STEP + 1
    before = -(-top // STEP)
    above = STEP * before - top
    rows = -(-(above + kh) // STEP)
    after = outputs[0] - 1 + rows - high // STEP - before
    columns = -(-(kw + STEP) // WIDE)
    units = outputs[1] // 2 - 1 + columns
    more = WIDE * units - left - wide
    if high % STEP or outputs[1] % 2 or after < 0 or more < 0:
        return None
    return Quads(left, more, units, (rows, columns), above, STEP * rows - above - kh, (before, after), outputs)


def image_by_quads(b: OnnxBuilder, image: str, shape: tuple[int, int], q: Quads, zero: str, name: str) -> str:
    """Bytes (n, chi, h, w) -> (n, h / 2, units, 8 chi), a quad's rows, channels and columns in that order; `shape` is
    (chi, h), `zero` the byte that means 0."""
    chi, high = shape
    filled = b.node("Pad", [image, b.shape(0, 0, 0, q.left, 0, 0, 0, q.right), zero], f"{name}.filled")
    rows = b.node("Reshape", [filled, b.shape(0, chi, high // STEP, STEP, WIDE * q.units)], f"{name}.rows")
    apart = b.node("Transpose", [rows], f"{name}.apart", perm=[0, 3, 1, 2, 4])
    planes = b.node("Reshape", [apart, b.shape(0, STEP * chi, high // STEP, q.units, WIDE)], f"{name}.planes")
    last = b.node("Transpose", [planes], f"{name}.turned", perm=[0, 2, 3, 1, 4])
    return b.node("Reshape", [last, b.shape(0, high // STEP, q.units, STEP * WIDE * chi)], f"{name}.quads")


def kernel_by_quads(b: OnnxBuilder, weight: str, shape: tuple[int, ...], q: Quads, name: str) -> str:
    """int8 (cho, chi, kh, kw) -> (2 cho, 8 chi, rows, columns): the left outputs' channels, then the right ones'."""
    cho, chi, _, kw = shape
    rows, columns = q.kernel
    sides = []
    for side in (0, 1):
        left = STEP * side
        pads = b.shape(0, 0, q.above, left, 0, 0, q.below, WIDE * columns - left - kw)
        sides.append(b.node("Pad", [weight, pads], f"{name}.side{side}"))
    both = b.node("Concat", sides, f"{name}.both", axis=0)
    apart = b.node("Reshape", [both, b.shape(2 * cho, chi, rows, STEP, columns, WIDE)], f"{name}.split")
    last = b.node("Transpose", [apart], f"{name}.order", perm=[0, 3, 1, 5, 2, 4])
    return b.node("Reshape", [last, b.shape(2 * cho, STEP * WIDE * chi, rows, columns)], f"{name}.by.quads")


def twice(b: OnnxBuilder, values: str, name: str) -> str:
    """Numbers (cho,) for the channels of both outputs."""
    return b.node("Concat", [values, values], f"{name}.twice", axis=0)


def outputs_apart(b: OnnxBuilder, paired: str, cho: int, q: Quads, output: str) -> str:
    """(n, h', w' / 2, 2 cho) -> (n, h', w', cho), which moves nothing."""
    return b.node("Reshape", [paired, b.shape(0, *q.outputs, cho)], output)
