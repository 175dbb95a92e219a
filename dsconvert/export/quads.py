"""The first convolution, of every second pixel of an image, as one of pixels that are two rows of four: a quad.

ONNX Runtime's fast kernel reads a pixel's channels as one run of bytes, at best 16 or more of them, and an image has
3. Two rows of four pixels have 24, and two outputs side by side become twice as many output channels. Every number is
the same; a kernel 6x6 at every second pixel becomes one of 3x2 quads at every quad, with a third more products, all
of the additional ones with zeros.

Bytes are turned around by fours, which is a quarter of the work, and the fewest cache lines that another core has
just written.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsconvert.export.builder import OnnxBuilder

WIDE = 4  # pixels of a quad along a row
STEP = 2  # pixels from one output to the next


@dataclass(frozen=True)
class Quads:
    """How many pixels stand left and right of an image's rows so that they are whole quads, the kernel (rows, columns)
    in quads, the rows of zeros above and below it in pixels, the new convolution's padding above and below in quads,
    and its number of output rows and columns before they were paired."""

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
