"""The search for the smallest model that loses little enough, with losses that are known."""

from __future__ import annotations

import pytest
import torch

from dsconvert.base.errors import InputError
from dsconvert.dsconv.codes import usual_format
from dsconvert.graph.ir import ConvParams
from dsconvert.widths.loss import TRIES, expected, formats_for_damage, smallest_within
from dsconvert.widths.size import BITS, stored_bytes

PARAMS = {f"l{i}": ConvParams(torch.zeros(64, 64, 1, 1), torch.zeros(64)) for i in range(6)}
DAMAGE = {f"l{i}": {usual_format(b, 64, 32): (i + 1) * 4.0 ** (4 - b) for b in BITS} for i in range(6)}


def size(widths) -> int:
    return sum(stored_bytes(torch.Size((64, 64, 1, 1)), w) for w in widths.values())


def test_formats_for_damage_keep_it_and_shrink_as_it_grows():
    sizes = []
    for most in (0.5, 5.0, 50.0, 500.0):
        widths = formats_for_damage(PARAMS, DAMAGE, most)
        assert expected(DAMAGE, widths) <= most
        sizes.append(size(widths))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


@pytest.mark.parametrize("points_per_damage", [0.002, 0.03, 0.4])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.4])
def test_the_loss_is_kept_and_the_search_goes_most_of_the_way(points_per_damage, power):
    calls = []

    def attempt(widths):
        loss = points_per_damage * expected(DAMAGE, widths) ** power
        calls.append(loss)
        return widths, loss

    found = smallest_within(PARAMS, DAMAGE, 0.5, attempt)
    assert found.loss <= 0.5
    assert len(calls) <= TRIES
    assert found.model == found.formats
    # proportion is exact for power 1, and off by what the other powers bend within the last step
    reachable = (0.5 / points_per_damage) ** (1 / power)
    ideal = formats_for_damage(PARAMS, DAMAGE, reachable)
    assert size(found.formats) <= 1.15 * size(ideal)


def test_a_loss_out_of_reach_is_said():
    with pytest.raises(InputError, match=r"target_map_drop 0.1 is out of reach.*3.00 points"):
        smallest_within(PARAMS, DAMAGE, 0.1, lambda widths: (None, 3.0))
