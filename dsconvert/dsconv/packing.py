"""Pack integers of 1 to 8 bits end to end into bytes, for the model file."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def pack_bits(values: NDArray[np.int8] | NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the lowest `bits` bits of every value (two's complement) into bytes, least significant bit first.

    The last byte is filled with zeros.
    """
    flat = values.reshape(-1).view(np.uint8)[:, None]
    return np.packbits(np.unpackbits(flat, axis=1, bitorder="little")[:, :bits].reshape(-1), bitorder="little")


def numbers_of(pieces: NDArray[np.integer], width: int) -> NDArray[np.int32]:
    """Join unsigned integers (..., n) of `width` bits into numbers (...); the first integer has the lowest bits."""
    places = np.arange(pieces.shape[-1], dtype=np.int32) * width
    return (pieces.astype(np.int32) << places).sum(-1, dtype=np.int32)


def unpack_bits(packed: NDArray[np.uint8], bits: int, shape: tuple[int, ...], signed: bool = True) -> NDArray[np.int8]:
    """Undo `pack_bits`. Raises ValueError when the length is wrong.

    signed: whether to extend the top bit as a sign.
    """
    count = math.prod(shape)
    if packed.size != (count * bits + 7) // 8:
        raise ValueError(f"{packed.size} bytes cannot hold {count} values of {bits} bits")
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    out = np.zeros((count, 8), np.uint8)
    out[:, :bits] = planes
    if signed:
        out[:, bits:] = planes[:, -1:]
    return np.packbits(out, axis=1, bitorder="little").view(np.int8).reshape(shape)
