"""Bits in, the same integers out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsconvert.dsconv.packing import pack_bits, unpack_bits


def test_known_bytes():
    # 4 bits, low nibble first: 1 -> 0x1, -1 -> 0xF, -8 -> 0x8
    assert pack_bits(np.array([1, -1, -8], np.int8), 4).tolist() == [0xF1, 0x08]
    # 3 bits: 3 = 011, -4 = 100, -1 = 111 -> 1 11 100 011 = 0xE3, then 1
    assert pack_bits(np.array([3, -4, -1], np.int8), 3).tolist() == [0b11100011, 0b1]


@given(st.integers(2, 8), st.lists(st.integers(-128, 127), max_size=70))
def test_round_trip(bits, values):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    array = np.clip(np.array(values, np.int64), low, high).astype(np.int8)
    packed = pack_bits(array, bits)
    assert packed.size == (len(values) * bits + 7) // 8
    assert unpack_bits(packed, bits, (len(values),)).tolist() == array.tolist()


def test_unsigned_values_keep_their_top_bit():
    assert unpack_bits(pack_bits(np.array([15, 1], np.int8), 4), 4, (2,), signed=False).tolist() == [15, 1]


def test_wrong_length_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        unpack_bits(np.zeros(2, np.uint8), 4, (5,))
