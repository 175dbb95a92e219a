"""Write the free integers of several layers together in ONNX (see `export.weights.joint`).

Two VQK are one word of 8, 10 or 12 bits (at 4, 5 or 6 bits each). A word's low byte is stored in `.vqk`, its bits above
a byte in `.vqk.high`, several words to a byte. The word and its m give an index into a table of all words times all m,
whose rows are int8 already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dsconvert.dsconv.codes.rows import BYTE, as_bytes

if TYPE_CHECKING:
    from dsconvert.dsconv.format import Joint, JointLayer

INT8, INT32 = TensorProto.INT8, TensorProto.INT32
MEMBERS = 2  # VQK in a word
HIGH = {4: 0, 5: 2, 6: 4}  # bits of a VQK -> bits of a word above its low byte


def add_rows(joint: Joint, group: Sequence[JointLayer], layers: Sequence[JointLayer], label: str) -> str:
    """Write m * VQK of a group's rows, INT8, two rows at a time.

    layers: all layers of the group's kind; they share a table.
    """
    levels = 1 + max(int(x.weight.m.max()) for x in layers)
    places = _places(joint, group, levels, label)
    return joint.b.node("Gather", [_table(joint, group[0], levels), places], f"{label}.int8")


def _places(joint: Joint, group: Sequence[JointLayer], levels: int, label: str) -> str:
    """Return the name of the table indices of the group's words, INT32, for two rows at a time."""
    b, bits = joint.b, group[0].weight.bits
    pairs = joint.kds(group, label)
    m = b.node("Gather", [_shifts(joint), pairs], f"{label}.m")
    words = [_words(x) for x in group]
    low = [b.tensor(f"{x.name}.vqk", w[0]) for x, w in zip(group, words, strict=True)]
    value = b.node("Cast", [joint.joined(low, label)], f"{label}.low", to=INT32)
    if not HIGH[bits]:
        return b.node("Add", [value, m], f"{label}.places")
    above = [b.tensor(f"{x.name}.vqk.high", w[1]) for x, w in zip(group, words, strict=True)]
    number = b.node("Cast", [joint.joined(above, f"{label}.high")], f"{label}.bytes", to=INT32)
    number = b.node("Add", [number, m], f"{label}.bytes.m")
    taken = b.node("Gather", [_above(joint, group[0], levels), number], f"{label}.above")
    return b.node("Add", [value, taken], f"{label}.places")


def _shifts(joint: Joint) -> str:
    """Return the name of INT32 (256, 2, 1): 256 times the two m that each byte holds."""
    if not joint.b.has("joint.shifts"):
        joint.b.node("Mul", [joint.pairs(), joint.b.constant(np.array(BYTE, np.int32))], "joint.shifts")
    return "joint.shifts"


def _above(joint: Joint, layer: JointLayer, levels: int) -> str:
    """Return the name of INT32 (256 * levels, words): what a byte of high bits, and m, add to its words."""
    b, label, high = joint.b, joint.label_of(layer), HIGH[layer.weight.bits]
    count = 8 // high
    if b.has(f"{label}.shift"):
        return f"{label}.shift"
    m = (np.arange(levels, dtype=np.int32) << high).reshape(-1, 1, 1)
    value = b.node("Add", [joint.pieces(count), b.constant(m)], f"{label}.digits")
    value = b.node("Mul", [value, joint.b.constant(np.array(BYTE, np.int32))], f"{label}.shifts")
    return b.node("Reshape", [value, b.shape(-1, count)], f"{label}.shift")


def _table(joint: Joint, layer: JointLayer, levels: int) -> str:
    """Return the name of INT8 (words * levels, 2): m times the VQK of every word, for m = 0, 1, ..., levels - 1."""
    b, label = joint.b, joint.label_of(layer)
    if b.has(f"{label}.table"):
        return f"{label}.table"
    m = np.arange(levels, dtype=np.int32).reshape(-1, 1, 1, 1)
    value = b.node("Mul", [_all_words(joint, layer), b.constant(m)], f"{label}.products")
    value = b.node("Cast", [value], f"{label}.products8", to=INT8)
    return b.node("Reshape", [value, b.shape(-1, MEMBERS)], f"{label}.table")


def _all_words(joint: Joint, layer: JointLayer) -> str:
    """Return the name of INT32 (high parts, 256, 2): the two VQK of every word."""
    high = HIGH[layer.weight.bits]
    above = np.arange(1 << high)[:, None, None] >> np.arange(MEMBERS) * (high // MEMBERS)
    offset = ((above & (1 << high // MEMBERS) - 1) << 4) - (1 << layer.weight.bits - 1)
    return joint.b.node(
        "Add", [joint.pieces(MEMBERS), joint.b.constant(offset.astype(np.int32))], f"{joint.label_of(layer)}.words"
    )


def _words(layer: JointLayer) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the low bytes and the high bits of a layer's words.

    The low bytes are (pairs of rows, 2, words). The high bits are bytes (pairs of rows, 2, n); where there are any, the
    low bytes are (pairs of rows, 2, n, words of such a byte).
    """
    rows, bits = layer.rows(), layer.weight.bits
    high = HIGH[bits]
    unsigned = rows.reshape(len(rows), -1, MEMBERS).astype(np.int32) + (1 << bits - 1)
    words = as_bytes(unsigned & 15, 4) + BYTE * as_bytes(unsigned >> 4, high // MEMBERS).astype(np.int32)
    words = words.reshape(len(rows) // 2, 2, -1, *([8 // high] if high else []))
    return (words % BYTE).astype(np.uint8), as_bytes(words // BYTE, high)
