"""Factors of channels: the same function, fewer rounding errors, and only where factors can pass."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import gridded, integer_step
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import execute, float_step, run_float
from dsconvert.measure.evened import _parts, evened

SPREAD = 100.0  # how much farther some channels reach than others
CHANNELS = 12


def conv(name: str, x: str, groups: int = 1) -> Node:
    return Node("conv", name, (x,), {"stride": 1, "padding": 0, "dilation": 1, "groups": groups})


def act(name: str, x: str, kind: str) -> Node:
    return Node("act", name, (x,), {"kind": kind})


def params_of(nodes: tuple[Node, ...], shapes: dict[str, tuple[int, int]]) -> dict[str, ConvParams]:
    """Weights (cho, chi / groups, 1, 1); the third quarter of the channels that `wide` makes reaches SPREAD times as
    far, and what reads these channels is as much smaller."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for node in nodes:
        if node.op == "conv":
            out, into = shapes[node.name]
            weight = torch.randn(out, into, 1, 1, generator=generator) / into**0.5
            made[node.name] = ConvParams(weight, 0.1 * torch.randn(out, generator=generator))
    far = torch.ones(CHANNELS)
    far[6:9] = SPREAD
    made["wide"] = ConvParams(made["wide"].weight * far[:, None, None, None], made["wide"].bias * far)
    first = made["reader"]
    depthwise = first.weight.shape[1] == 1
    by = far[:, None] if depthwise else torch.cat((torch.ones(first.weight.shape[1] - CHANNELS), far))
    made["reader"] = ConvParams(first.weight / by[..., None, None], first.bias)
    return made


def squares(raw: list[torch.Tensor], reference: list[torch.Tensor]) -> list[torch.Tensor]:
    return raw


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 3, 8, 8, generator=generator) for _ in range(4)]


def rounded(graph: Graph, params: dict[str, ConvParams]) -> float:
    """Squared error of the outputs, with every value on the grid of its range, but for what a convolution gives an
    activation, which the fit's own search takes care of."""
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}

    def visit(name: str, value: torch.Tensor) -> None:
        lows[name] = min(lows.get(name, 0.0), float(value.min()))
        highs[name] = max(highs.get(name, 0.0), float(value.max()))

    wanted = [run_float(graph, params, x, visit) for x in images()]
    grids = {name: QParams.of_range(lows[name], highs[name]) for name in lows}
    read = {x for node in graph.nodes if node.op == "conv" for x in node.inputs}
    kept = {node.name for node in graph.nodes if node.op in ("conv", "times")} - read | set(graph.outputs)

    def step(node, inputs):
        value = float_step(node, inputs, params)
        return value if node.name in kept else grids[node.name].dequantize(grids[node.name].quantize(value))

    found = [execute(graph, x, step) for x in images()]
    return sum(float((a[0] - b[0]).square().sum()) for a, b in zip(found, wanted, strict=True))


SHAPES = {"wide": (CHANNELS, 3), "reader": (5, CHANNELS), "other": (4, 3), "end": (6, 5)}


def network(kind: str, *between: Node, reads: str = "a", reader: str = "dense") -> tuple[Graph, dict]:
    """A convolution with wide channels, its activation, something between, and a convolution that reads it."""
    shapes = dict(SHAPES)
    groups = 1
    if reader == "depthwise":
        shapes["reader"], groups = (CHANNELS, 1), CHANNELS
    first = conv("wide", INPUT)
    acts = {"none": (), "ReLU": (Node("relu", "a", ("wide",), {"top": 0}),)}.get(kind, (act("a", "wide", kind),))
    if kind == "none":
        reads = "wide" if reads == "a" else reads
    nodes = (first, *acts, *between, conv("reader", reads, groups))
    shapes["reader"] = (shapes["reader"][0], shapes["reader"][1])
    return Graph(nodes, ("reader",)), params_of(nodes, shapes)


@pytest.mark.parametrize("reader", ["dense", "depthwise"])
@pytest.mark.parametrize("kind", ["none", "ReLU", "LeakyReLU", "SiLU", "Hardswish"])
def test_rounding_harms_less_and_the_function_stays(kind, reader):
    graph, params = network(kind, reader=reader)
    made, evener = evened(graph, params, squares, images(), 0)
    for x in images():  # float32 sums of 12 numbers of which some are 100 times as large
        torch.testing.assert_close(run_float(made, evener, x), run_float(graph, params, x), rtol=1e-4, atol=1e-4)
    # three quarters of the channels have steps that are 100 times too wide: 10,000 times the error, but for the rest
    assert rounded(made, evener) < 0.1 * rounded(graph, params)
    assert any(node.op == "times" for node in made.nodes) == (kind in ("SiLU", "Hardswish"))


@pytest.mark.parametrize("kind", ["ReLU", "SiLU"])
@pytest.mark.parametrize(
    "between",
    [
        [Node("maxpool", "b", ("a",), {"kernel": 3, "stride": 1, "padding": 1})],
        [Node("select", "b", ("a",), {"channels": [5, 4, 3, 2, 1, 0, 7, 8, 6, 9, 11, 10]})],
        [Node("mean", "m", ("a",), {}), conv("gate", "m"), act("g", "gate", "Sigmoid"),
         Node("product", "b", ("a", "g"), {})],
        [Node("resize", "b", ("a",), {"scale": 2})],
    ],
    ids=lambda between: between[0].op,
)  # fmt: skip
def test_factors_pass_to_the_convolutions(between, kind, monkeypatch):
    monkeypatch.setitem(SHAPES, "gate", (CHANNELS, CHANNELS))
    graph, params = network(kind, *between, reads="b")
    made, evener = evened(graph, params, squares, images(), 0)
    for x in images():
        torch.testing.assert_close(run_float(made, evener, x), run_float(graph, params, x), rtol=1e-4, atol=1e-4)
    assert rounded(made, evener) < 0.2 * rounded(graph, params)


def test_a_concatenation_has_one_grid_for_all_its_parts():
    """The narrow map is relabelled as a whole, to reach as far as the wide one beside it."""
    nodes = (
        conv("wide", INPUT), act("a", "wide", "SiLU"), conv("other", INPUT), act("o", "other", "SiLU"),
        Node("concat", "b", ("o", "a"), {}), conv("reader", "b"),
    )  # fmt: skip
    graph = Graph(nodes, ("reader",))
    params = params_of(nodes, {**SHAPES, "reader": (5, 4 + CHANNELS)} | {"wide": (CHANNELS, 3)})
    made, evener = evened(graph, params, squares, images(), 0)
    for x in images():
        torch.testing.assert_close(run_float(made, evener, x), run_float(graph, params, x), rtol=1e-4, atol=1e-3)
    assert rounded(made, evener) < 0.1 * rounded(graph, params)
    tops = {}

    def visit(name, value):
        tops[name] = max(tops.get(name, 0.0), float(value.abs().max()))

    for x in images():
        run_float(made, evener, x, visit)
    reached = [tops[n.name] for n in made.nodes if n.op == "times"]
    assert len(reached) > 2
    assert all(abs(a - b) < 1e-3 * a for a, b in pairwise(reached))


@pytest.mark.parametrize(
    "between",
    [
        [Node("add", "b", ("a", "wide2"), {})],
        [Node("product", "b", ("a", "a"), {})],
        [act("b", "a", "Sigmoid")],
        [Node("relu", "b", ("a",), {"top": 6})],
    ],
    ids=["add", "square", "sigmoid", "relu6"],
)
def test_where_a_factor_cannot_pass_nothing_changes(between):
    nodes = (conv("wide", INPUT), act("a", "wide", "SiLU"), conv("wide2", INPUT), *between, conv("reader", "b"))
    graph = Graph(nodes, ("reader",))
    params = params_of(nodes, {**SHAPES, "wide2": (CHANNELS, 3)})
    made, evener = evened(graph, params, squares, images(), 0)
    assert made == graph
    assert all(torch.equal(evener[name].weight, params[name].weight) for name in params)


def test_outputs_keep_their_unit():
    nodes = (conv("wide", INPUT), Node("relu", "a", ("wide",), {"top": 0}), conv("reader", "a"))
    graph, params = Graph(nodes, ("a", "reader")), params_of(nodes, SHAPES)
    assert evened(graph, params, squares, images(), 0)[0] == graph


def test_relabelling_is_free_in_integers():
    """`times` between grids that are tied gives the integers that it reads."""
    node = Node("times", "t", ("a",), {"by": 31.9})
    from dsconvert.graph.gates import before_times

    target = QParams.of_range(-3.0, 700.0)
    grids = {"a": before_times(node, target), "t": target}
    q = torch.arange(256.0).view(1, 1, 16, 16)
    assert torch.equal(integer_step(node, [q], {}, grids), q)
    # another grid is a rounding like any other
    grids["a"] = QParams.of_range(-0.1, 30.0)
    wanted = target.quantize(grids["a"].dequantize(q) * 31.9)
    assert torch.equal(integer_step(node, [q], {}, grids), wanted)
    assert gridded(Graph((conv("a", INPUT), node), ("t",))) == {INPUT, "a", "t"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_those_of_least_error(count):
    """Against every assignment of six channels to parts."""
    generator = torch.Generator().manual_seed(2)
    tops, effects = torch.rand(6, generator=generator).exp() ** 4, torch.rand(6, generator=generator)
    error, parts = _parts(tops, effects, count)

    def cost(groups: list[list[int]]) -> float:
        return sum(float((tops[g].max() / 255) ** 2 / 12 * effects[g].sum()) for g in groups if g)

    every = [
        cost([[c for c in range(6) if where[c] == part] for part in range(count)])
        for where in product(range(count), repeat=6)
    ]  # fmt: skip
    assert error == pytest.approx(min(every), rel=1e-5)  # float32 sums
    assert cost([list(part) for part in parts]) == pytest.approx(min(every), rel=1e-5)
    assert sorted(c for part in parts for c in part) == list(range(6))
