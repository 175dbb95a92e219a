"""The ways to do SiLU that benchmarks/silu.py times: each is SiLU, but for those that say they are not."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from conftest import DEMO, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import silu


@pytest.mark.parametrize("way", silu.WAYS, ids=lambda way: way.name)
def test_a_way_is_silu_within_a_step_or_says_that_it_is_not(way):
    if silu.differ(way) > 1:
        assert not way.silu


def test_todays_way_is_the_integer_reference_s():
    assert silu.differ(silu.WAYS[0]) == 0
    assert silu.WAYS[0].name == silu.TODAY


def test_a_graph_has_every_map_once():
    maps = Counter({(4, 3, 2): 3, (5, 1, 1): 1})
    graph = silu.graph_of(silu.WAYS[0], maps).graph
    assert [n.op_type for n in graph.node] == ["QLinearSigmoid", "QLinearMul"] * 4
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input]
    assert shapes == [[1, 3, 2, 4], [1, 1, 1, 5]]
    assert isinstance(silu.tried(silu.WAYS[0], maps, 1).call(), list)


def test_maps_are_those_behind_the_convolutions_of_a_network():
    maps = silu.silu_maps(DEMO / "demo.pt", 64)
    assert maps.total() > 20
    assert all(high <= 32 and wide <= 32 for _, high, wide in maps)
