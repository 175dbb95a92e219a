"""Bring convolutions into the shapes that ONNX Runtime's int8 CPU kernel is fast at, without changing their result.

The fast kernel (MLAS: MlasConvSymPackWSize) works on channels last. It takes multiples of 4 input channels and of 4
output channels, and computes 16 output channels at once. Any other convolution is unrolled, multiplied and rounded in
three passes over memory. Two kinds of convolution in these networks do not fit by themselves:

- The last convolutions have a number of channels that depends on the classes. Zero weights fill them up to a multiple
  of 16, and the additional outputs are dropped.
- The first convolution reads the 3 channels of an image. Zeros fill them up to 4. If it has stride 2, there is a faster
  way: 2 x 4 pixels become one pixel of 24 channels (a quad), and two neighbouring outputs become one of twice the
  channels. A 6x6 kernel is then one of 3x2 quads. It has a third more products, and the additional weights are zero.
  The kernel reads the channels of a quad as one run of bytes. Reordering the image moves four bytes at a time, in a
  quarter of the time: two threads that write single bytes would often write to one cache line.

The new weights are made from the stored ones by nodes that engines fold at load.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsconvert.base.builder import OnnxBuilder

WIDE = 4  # pixels of a quad along a row
STEP = 2  # stride of the convolution: pixels between two outputs

RUN = 4  # input channels that the kernel takes together
FULL = 16  # output channels that it computes at once
FEW = 32  # with no more output channels than this, filling them up gains no time


def more_channels(cho: int) -> int:
    """Return how many output channels of zeros to add so that the fast kernel takes the convolution."""
    return 0 if cho <= FEW or cho % 4 == 0 else -cho % FULL


@dataclass(frozen=True)
class Quads:
    """The geometry of a convolution over quads.

    left, right: pixels of padding beside each image row, so that rows are whole quads.
    units: quads in a padded row.
    kernel: (rows, columns) of the kernel, in quads.
    above, below: rows of zeros above and below the kernel, in pixels.
    pads: padding above and below the image, in rows of quads.
    outputs: (rows, columns) of the original convolution's output.
    """

    left: int
    right: int
    units: int
    kernel: tuple[int, int]
    above: int
    below: int
    pads: tuple[int, int]
    outputs: tuple[int, int]


def quads_of(kernel: tuple[int, int], pads: list[int], size: tuple[int, int]) -> Quads | None:
    """Return the geometry for a stride-2 convolution, or None where rows or outputs do not come in pairs.

    kernel: (kh, kw).
    pads: (top, left, bottom, right), in pixels.
    size: (height, width) of the image.
    """
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
    """Reorder bytes (n, chi, h, w) to (n, h / 2, units, 8 chi).

    A quad's channels are its rows, channels and columns, in this order.

    shape: (chi, h).
    zero: name of the byte that stands for 0.
    """
    chi, high = shape
    filled = b.node("Pad", [image, b.shape(0, 0, 0, q.left, 0, 0, 0, q.right), zero], f"{name}.filled")
    rows = b.node("Reshape", [filled, b.shape(0, chi, high // STEP, STEP, WIDE * q.units)], f"{name}.rows")
    apart = b.node("Transpose", [rows], f"{name}.apart", perm=[0, 3, 1, 2, 4])
    planes = b.node("Reshape", [apart, b.shape(0, STEP * chi, high // STEP, q.units, WIDE)], f"{name}.planes")
    last = b.node("Transpose", [planes], f"{name}.turned", perm=[0, 2, 3, 1, 4])
    return b.node("Reshape", [last, b.shape(0, high // STEP, q.units, STEP * WIDE * chi)], f"{name}.quads")


def kernel_by_quads(b: OnnxBuilder, weight: str, shape: tuple[int, ...], q: Quads, name: str) -> str:
    """Reorder int8 weights (cho, chi, kh, kw) to (2 cho, 8 chi, rows, columns), left outputs before right outputs."""
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
    """Repeat numbers (cho,) for the channels of both outputs."""
    return b.node("Concat", [values, values], f"{name}.twice", axis=0)


def outputs_apart(b: OnnxBuilder, paired: str, cho: int, q: Quads, output: str) -> str:
    """Separate paired outputs: (n, h', w' / 2, 2 cho) -> (n, h', w', cho). The bytes stay where they are."""
    return b.node("Reshape", [paired, b.shape(0, *q.outputs, cho)], output)
