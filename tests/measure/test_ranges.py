"""Activation grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dsconvert.base import loops
from dsconvert.graph.activations import activation_table, as_engines
from dsconvert.graph.grids import QMAX, QParams
from dsconvert.graph.integer import grid_of
from dsconvert.graph.ir import INPUT, Graph, Node
from dsconvert.measure.clipping import LEVELS
from dsconvert.measure.grids import HIGHS, Seen, best_range, choose_grids, grids_of, least, share_grids, together
from dsconvert.measure.importance import measure_importance
from dsconvert.measure.outputs import Detections
from dsconvert.yolo.lower import lower, split_detect


def apart(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Clipping effects when every value stands alone."""
    cut = (values[None] - LEVELS[:, None]).clamp_min(0)
    return (weights * cut.square()).sum(1)


def range_of(values: torch.Tensor, weights: torch.Tensor, judge=lambda x: x) -> QParams:
    return best_range(values, weights, judge, apart(judge(values), weights))


def test_grid_of_a_range_holds_zero_exactly():
    grid = QParams.of_range(-0.5, 2.0)
    assert grid.scale == pytest.approx(2.5 / 255)
    assert grid.zero_point == 51
    assert grid.dequantize(torch.tensor(51.0)) == 0
    assert QParams.of_range(1.0, 2.0).zero_point == 0  # widened down to zero
    assert QParams.of_range(-2.0, -1.0).zero_point == 255


def test_quantize_rounds_half_to_even_and_clamps():
    grid = QParams(1.0, 10)
    values = torch.tensor([-100.0, -0.5, 0.5, 1.5, 2.4, 1000.0])
    assert grid.quantize(values).tolist() == [0, 10, 10, 12, 12, 255]


def test_several_grids_at_once_are_each_its_own():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ends = [(-0.7, 1.3), (-3.0, 2.0), (0.0, 0.1)]
    grids = [QParams.of_range(*both) for both in ends]
    scales, zeros, tables = grids_of(ends)
    for table, grid in zip(tables, grids, strict=True):
        assert torch.equal(table, grid.dequantize(torch.arange(256.0)))
    # by the compiled loop, with a weight for each value, those above each grid's end left out
    weights, highs = values.square(), torch.tensor([hi for _, hi in ends])
    found = torch.empty(3, dtype=torch.float64)
    given = (values, values.sin(), weights, scales, zeros, highs, tables.sin(), found)
    loops.grid_errors(*(x.numpy() for x in given))
    for error, grid, high in zip(found.tolist(), grids, highs, strict=True):
        off = (grid.dequantize(grid.quantize(values)).sin() - values.sin()).square() * weights
        assert error == pytest.approx(float(off[values <= high].double().sum()), rel=1e-6)  # products in float32
    assert least(ends, lambda given: [2.0, 1.0, 1.0][: len(given)]) == ends[1]


def test_uniform_values_keep_their_whole_range():
    values = torch.linspace(0, 10, 10001)
    assert range_of(values, torch.ones_like(values)).scale == pytest.approx(10 / 255)


def test_best_range_is_the_best_of_its_candidates():
    generator = torch.Generator().manual_seed(0)
    # 200 000 normal values and one at 6: a finer grid for the many outweighs clipping the one
    values = torch.cat((torch.randn(200_000, generator=generator).abs(), torch.tensor([6.0])))
    chosen = range_of(values, torch.ones_like(values))

    def error(high: float) -> float:
        grid = QParams.of_range(0.0, high)
        return float((grid.dequantize(grid.quantize(values)) - values).square().sum())

    best = min((float(values.max()) * g for g in HIGHS), key=error)
    # effects are interpolated between levels a twelfth apart: the neighbouring candidate may win
    assert error(chosen.scale * 255) <= 1.01 * error(best)
    assert best < float(values.max())


def test_range_before_silu_ignores_what_silu_flattens():
    values = torch.cat((torch.linspace(-60, -20, 1000), torch.linspace(-2, 4, 1000)))
    assert (
        range_of(values, torch.ones_like(values), F.silu).zero_point
        * range_of(values, torch.ones_like(values), F.silu).scale
        < 30
    )  # low end well above -60
    # beyond -8 SiLU is within 0.003 of zero, a fifth of a step
    assert range_of(values, torch.ones_like(values), F.silu).scale < (8 + 4) / 255


def test_every_value_gets_a_grid_and_the_image_is_exact(tiny, picture):
    network, _ = tiny
    graph, params = lower(network.fused())

    def grids():
        found = measure_importance(graph, params, [picture], lambda raw, _: raw, seed=0)
        return choose_grids(graph, found.samples, found.clipping, seed=0)

    own = grids()
    assert set(grid_of(graph, own)) == {INPUT, *(n.name for n in graph.nodes)}
    image = own[INPUT]
    assert torch.equal(image.quantize(picture), (picture * 255).round())
    assert np.isclose(image.scale, 1 / 255)
    assert own == grids()


def test_what_matters_decides_the_range():
    """Many small values and a few large ones: the range follows the weights."""
    values = torch.cat((torch.linspace(0, 1, 1000), torch.linspace(0, 100, 100)))
    small, large = (torch.cat((torch.full((1000,), a), torch.full((100,), b))) for a, b in ((1.0, 0.0), (0.0, 1.0)))
    assert range_of(values, small).scale < 0.2 * range_of(values, large).scale


def test_values_that_are_cut_together_are_not_cut():
    """A thousand sevens that pull on one result: cut one by one they would not matter, together they do."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((torch.rand(50_000, generator=generator), torch.full((1000,), 7.0)))
    weights = torch.full_like(values, 300.0)
    weights[-1000:] = 0.1
    together = (torch.full((1000,), 7.0).sum() - 1000 * LEVELS.clamp_max(7.0)).square()
    assert range_of(values, weights).scale * 255 < 6.5
    assert best_range(values, weights, lambda x: x, together).scale * 255 > 6.9


def seen_of(high: float, weight: float = 1.0, low: float = 0.0) -> Seen:
    values = torch.linspace(low, high, 1001)
    weights = torch.full_like(values, weight)
    return Seen(values, weights, apart(values, weights))


def joins(*nodes: tuple[str, str, tuple[str, ...]]) -> Graph:
    return Graph(tuple(Node(op, name, inputs, {}) for op, name, inputs in nodes), (nodes[-1][1],))


def shared(graph: Graph, seen: dict[str, Seen]) -> dict[str, QParams]:
    own = {name: best_range(s.values, s.weights, lambda x: x, s.clipping) for name, s in seen.items()}
    own[INPUT] = QParams(1 / 255, 0)
    return share_grids(graph, seen, own)


def test_what_is_only_joined_has_the_grid_of_the_whole():
    graph = joins(("act", "a", (INPUT,)), ("add", "b", ("a", "a")), ("concat", "c", ("a", "b")))
    grids = shared(graph, {"a": seen_of(9.0), "b": seen_of(10.0, low=-2.0), "c": seen_of(10.0, low=-2.0)})
    assert grids["a"] == grids["b"] == grids["c"] == QParams.of_range(-2.0, 10.0)
    assert grids[INPUT] == QParams(1 / 255, 0)


def test_a_coarse_grid_is_not_shared_with_what_needs_a_fine_one():
    """Rounding errors of a grid s: s^2 / 12 a value, by weight. Shared, a's would be 100^2 times as large."""
    graph = joins(("act", "a", (INPUT,)), ("act", "b", (INPUT,)), ("concat", "c", ("a", "b")))
    for weight, equal in ((1.0, False), (1e-8, True)):
        # rounding a once more costs as much as rounding it once: the concatenation counts b alone here
        grids = shared(graph, {"a": seen_of(1.0, weight), "b": seen_of(100.0, 1e-6), "c": seen_of(100.0, 1e-6)})
        assert (grids["a"] == grids["b"]) == equal
        assert grids["c"] == QParams.of_range(0.0, 100.0)
        assert grids["a"] == QParams.of_range(0.0, 100.0 if equal else 1.0)


def test_pools_and_groups_are_joined_through_what_they_come_from():
    graph = joins(
        ("act", "a", (INPUT,)), ("maxpool", "p", ("a",)), ("concat", "c", ("a", "p")), ("upsample", "u", ("c",)),
        ("act", "b", (INPUT,)), ("concat", "d", ("u", "b")), ("concat", "e", ("b", INPUT)),
    )  # fmt: skip
    seen = {name: seen_of(high) for name, high in (("a", 8.0), ("c", 8.5), ("b", 10.0), ("d", 10.0), ("e", 10.0))}
    grids = shared(graph, seen)
    assert set(grids) == {INPUT, "a", "b", "c", "d", "e"}
    assert {grids[name] for name in "abcd"} == {QParams.of_range(0.0, 10.0)}
    assert grids[INPUT] == QParams(1 / 255, 0)  # the image's grid is exact, and stays
    assert grids["e"] == QParams.of_range(0.0, 10.0)


def test_scores_reach_up_whatever_was_seen(tiny, picture):
    """Images of background alone: objectness far below 0 everywhere, and still an object may score 0.99."""
    values = torch.linspace(-12, -3, 1000)
    weights = torch.ones(1000)
    none = torch.zeros_like(LEVELS)
    own = best_range(values, weights, lambda x: x, none)
    assert (255 - own.zero_point) * own.scale < 0.1
    reaching = best_range(values, weights, lambda x: x, none, 5.0)
    # both ends are moved so that 0 is on the grid: by half a step at most
    assert (255 - reaching.zero_point) * reaching.scale == pytest.approx(5, abs=reaching.scale / 2)
    network, head = tiny
    graph, _ = split_detect(*lower(network.fused()), head)
    scores = [f"model.8.m.{level}.{part}" for part in ("obj", "cls") for level in (0, 1)]
    assert Detections(head).reach(graph) == dict.fromkeys(scores, 5.0)


def silu_inputs() -> Seen:
    """Values before a SiLU, as far down as up, with weights and what clipping them costs behind it."""
    generator = torch.Generator().manual_seed(3)
    values = 2.5 * torch.randn(4000, generator=generator) - 0.5
    weights = torch.rand(4000, generator=generator)
    return Seen(values, weights, apart(F.silu(values), weights))


def error_of_both(seen: Seen, before: QParams, after: QParams) -> float:
    """The weighted squared error behind SiLU of both roundings, of the values that the first grid reaches."""
    made = after.dequantize(after.quantize(as_engines("SiLU", before.dequantize(before.quantize(seen.values)))))
    off = (made - F.silu(seen.values)).double().square() * seen.weights
    return float(off[seen.values <= (QMAX - before.zero_point) * before.scale].sum())


def test_grids_around_an_activation_err_less_together():
    """Ends that reach all values, so that nothing is cut: the error of both roundings is all there is."""
    seen = silu_inputs()
    low, high = float(seen.values.min()), float(seen.values.max())
    before, after = QParams.of_range(low, high), QParams.of_range(-0.28, high)
    first, second = together(seen, "SiLU", before, after, free=True)
    assert error_of_both(seen, first, second) < error_of_both(seen, before, after)
    # the one before alone, as the other one is somebody else's too
    first, second = together(seen, "SiLU", before, after, free=False)
    assert second == after
    assert error_of_both(seen, first, after) < error_of_both(seen, before, after)


def test_upper_ends_are_not_lowered_once_more():
    seen = silu_inputs()
    before, after = QParams.of_range(-3.0, 2.0), QParams.of_range(-0.28, 1.5)  # both cut
    for grid, found in zip((before, after), together(seen, "SiLU", before, after, free=True), strict=True):
        reach = [(QMAX - g.zero_point) * g.scale for g in (grid, found)]
        assert reach[1] >= reach[0] - found.scale  # a zero point is a whole number of steps


@pytest.mark.parametrize("kind", ["SiLU", "ReLU", "LeakyReLU", "Hardswish"])
def test_activations_are_judged_as_engines_compute_them(kind):
    source, target = QParams(0.05, 100), QParams(0.04, 20)
    made = target.quantize(as_engines(kind, source.dequantize(torch.arange(256.0))))
    table = torch.from_numpy(activation_table(kind, source, target)).float()
    # float32 products in another order: a tie may fall the other way
    assert float((made - table).abs().max()) <= 1
    assert float((made != table).float().mean()) <= 0.02
