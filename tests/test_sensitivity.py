"""Sensitivity: squared effects against the change they predict."""

from __future__ import annotations

import pytest
import torch

from dsconvert.dsconv.tensor import Width
from dsconvert.fit.importance import measure_importance
from dsconvert.fit.sensitivity import squared_effects, weight_errors
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import run_float
from dsconvert.yolo.lower import lower

POINT = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def test_effect_is_the_gradient_along_the_centred_error():
    """conv(x, D), its channel means taken out, times the gradient, summed: by definition."""
    generator = torch.Generator().manual_seed(0)
    node = Node("conv", "c", (INPUT,), {"stride": 2, "padding": 1, "dilation": 1, "groups": 1})
    x, error = torch.randn(1, 3, 9, 9, generator=generator), torch.randn(4, 3, 3, 3, generator=generator)
    gradient = torch.randn(1, 4, 5, 5, generator=generator)
    moved = torch.nn.functional.conv2d(x, error, stride=2, padding=1)
    wanted = ((moved - moved.mean((2, 3), keepdim=True)) * gradient).sum().square().item()
    assert squared_effects(node, x, gradient, {Width(4, 3): error})[Width(4, 3)] == pytest.approx(
        wanted, rel=1e-4
    )  # float32 sums


def test_expected_damage_of_a_linear_layer_is_its_squared_output_error(picture):
    """One pass of random signs gives it right in the mean: 200 passes, each with a relative deviation of sqrt(2)."""
    generator = torch.Generator().manual_seed(0)
    graph = Graph((Node("conv", "c", (INPUT,), POINT),), ("c",))
    params = {"c": ConvParams(torch.randn(4, 3, 1, 1, generator=generator), torch.zeros(4))}
    errors = weight_errors(params, ["c"], (2, 4, 8), (2, 3))
    found = measure_importance(graph, params, [picture] * 200, lambda raw, _: raw, 0, errors).damage["c"]
    assert set(errors["c"]) == {Width(*w) for w in ((2, 2), (2, 3), (4, 2), (4, 3), (8, 3))}
    for width, error in errors["c"].items():
        moved = run_float(graph, {"c": ConvParams(error, torch.zeros(4))}, picture)[0]
        wanted = (moved - moved.mean((2, 3), keepdim=True)).square().sum().item()
        assert found[width] / 200 == pytest.approx(wanted, rel=4 * (2 / 200) ** 0.5)  # four sigma
    assert found[Width(2, 3)] > found[Width(4, 3)] > found[Width(8, 3)] > 0


def test_damage_foretells_what_replacing_the_weight_does(tiny, picture):
    """Through sigmoids and SiLUs, for small errors: 8 bits. A random sign pass is right to a factor, so sums are."""
    network, _ = tiny
    graph, params = lower(network.fuse())
    names = [n.name for n in graph.convs()]

    def measure(raw, reference):
        return [t.sigmoid() for t in raw]

    errors = weight_errors(params, names, (8,), (16,))
    found = measure_importance(graph, params, [picture] * 30, measure, 0, errors).damage
    before = measure(run_float(graph, params, picture), None)
    values: dict[str, torch.Tensor] = {}
    run_float(graph, params, picture, values.__setitem__)
    total = 0.0
    for node in graph.convs():
        moved = {
            **params,
            node.name: ConvParams(
                params[node.name].weight + next(iter(errors[node.name].values())), params[node.name].bias
            ),
        }
        changed: dict[str, torch.Tensor] = {}
        run_float(graph, moved, picture, changed.__setitem__)
        shift = (values[node.name] - changed[node.name]).mean((0, 2, 3))  # channel means are corrected
        moved[node.name] = ConvParams(moved[node.name].weight, params[node.name].bias + shift)
        after = measure(run_float(graph, moved, picture), None)
        total += sum((a - b).double().square().sum().item() for a, b in zip(after, before, strict=True))
    # 12 layers x 30 passes: a deviation of about sqrt(2 / 30) for the layers that dominate, three sigma
    assert sum(sum(d.values()) for d in found.values()) / 30 == pytest.approx(total, rel=0.8)
