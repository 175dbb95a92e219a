"""The DSConv value: shapes, limits, merging."""

from __future__ import annotations

import pytest
import torch
from formats import free, largest_pair

from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.tensor import DSTensor, block_count, expand_blocks


def make(vqk: list, m: list, cds: list, bits: int = 4, block: int = 2) -> DSTensor:
    return DSTensor(
        torch.tensor(vqk, dtype=torch.int8), torch.tensor(m, dtype=torch.int8), torch.tensor(cds), free(bits, block)
    )


def test_limits_are_twos_complement_and_never_minus_128():
    assert [FREE.limits(b) for b in (2, 3, 4, 8)] == [(-2, 1), (-4, 3), (-8, 7), (-127, 127)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_largest_product_stays_in_int8_and_two_of_them_in_sixteen_bits(bits):
    low, _ = FREE.limits(bits)
    m = FREE.most_m(bits)
    assert -m * low <= 127
    if bits < 8:  # plain int8 weights are kept in check pair by pair
        assert 255 * 2 * -m * low <= 32767
    assert m == 15 or 255 * 2 * -(m + 1) * low > 32767  # and one more would leave it


def test_largest_pair_is_of_neighbouring_channels():
    even = torch.tensor([[3, -4, 100, 5], [7, 7, -1, -8]], dtype=torch.int8)[:, :, None, None]
    assert largest_pair(even) == 105
    assert largest_pair(torch.tensor([[100, -100]], dtype=torch.int8)[:, :, None, None]) == 100
    assert largest_pair(torch.tensor([[3, -4, 1]], dtype=torch.int8)[:, :, None, None]) == 8  # whose neighbour?


def test_ragged_last_block_is_the_short_one():
    assert block_count(48, 32) == 2
    kds = torch.tensor([1, 2]).reshape(1, 2, 1, 1)
    assert expand_blocks(kds, 48, 32).flatten().tolist() == [1] * 32 + [2] * 16


def test_weight_is_the_equation():
    # 3 channels in blocks of 2: m = 3 for the first two, 5 for the last; CDSw = 0.5
    t = make([[[[1]], [[-2]], [[7]]]], [[[[3]], [[5]]]], [0.5])
    assert t.merged().flatten().tolist() == [3, -6, 35]
    assert t.weight().flatten().tolist() == [1.5, -3.0, 17.5]


def test_bits_count_the_shifts_of_dsconv_and_none_for_plain_int8():
    vqk = torch.zeros(2, 32, 1, 1, dtype=torch.int8)
    ones = torch.ones(2, 1, 1, 1, dtype=torch.int8)
    assert DSTensor(vqk, ones, torch.ones(2), free(4, 32)).weight_bits == 4 + 4 / 32
    plain = DSTensor(vqk, ones, torch.ones(2), free(8, 32))
    assert plain.is_plain_int8
    assert plain.weight_bits == 8


@pytest.mark.parametrize(
    ("m", "vqk", "bits"),
    [([[[[0]]]], 1, 4), ([[[[16]]]], 1, 4), ([[[[1]]]], 8, 4), ([[[[15]]]], -9, 5)],
)
def test_values_outside_their_range_are_refused(m, vqk, bits):
    with pytest.raises(ValueError, match=r"m must|leaves"):
        make([[[[vqk]]]], m, [1.0], bits)


def test_parts_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="KDS must have shape"):
        make([[[[1]], [[1]], [[1]]]], [[[[1]]]], [1.0])
    with pytest.raises(ValueError, match="CDSw must have shape"):
        make([[[[1]]]], [[[[1]]]], [1.0, 2.0])
