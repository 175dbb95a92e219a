"""Sensitivity: measured one layer at a time, equal to doing so by hand."""

from __future__ import annotations

import pytest
import torch

from dsconvert.fit.least_squares import fit_weight
from dsconvert.fit.sensitivity import measure_damage
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import run_float
from dsconvert.yolo.lower import lower

POINT = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def measure(raw, reference):
    return [t.sigmoid() for t in raw]


def test_damage_of_the_last_layer_is_its_own_output_error(picture):
    generator = torch.Generator().manual_seed(0)
    graph = Graph((Node("conv", "c", (INPUT,), POINT),), ("c",))
    params = {"c": ConvParams(torch.randn(4, 3, 1, 1, generator=generator), torch.zeros(4))}
    got = measure_damage(graph, params, ["c"], [picture], lambda raw, _: raw, 32, (2, 4, 8))["c"]
    quick = fit_weight(params["c"].weight, 4, 32, starts=(0.8,), rounds=1)
    error = run_float(graph, {"c": ConvParams(quick.weight() - params["c"].weight, torch.zeros(4))}, picture)[0]
    wanted = (error - error.mean((0, 2, 3), keepdim=True)).square().sum().item()  # channel means are corrected
    assert got[4] == pytest.approx(wanted, rel=1e-3)  # float32 sums of 16 thousand squares
    assert got[2] > got[4] > got[8] > 0


def test_rerunning_a_part_is_rerunning_all(tiny, picture):
    """Only what depends on the layer is computed again; the result is that of the whole network."""
    network, _ = tiny
    graph, params = lower(network.fuse())
    names = [n.name for n in graph.convs()]
    got = measure_damage(graph, params, names, [picture], measure, 16, (4,))
    reference = measure(run_float(graph, params, picture), None)
    for name in names:
        weight = fit_weight(params[name].weight, 4, 16, starts=(0.8,), rounds=1).weight()
        plain = run_all(graph, params, picture)[name]
        changed = run_all(graph, {**params, name: ConvParams(weight, params[name].bias)}, picture)[name]
        bias = params[name].bias + (plain - changed).mean((0, 2, 3))
        raw = run_float(graph, {**params, name: ConvParams(weight, bias)}, picture)
        pairs = zip(measure(raw, None), reference, strict=True)
        wanted = sum((a - b).double().square().sum().item() for a, b in pairs)
        assert got[name][4] == pytest.approx(wanted, rel=1e-3)  # the bias is added before or after, in float32


def run_all(graph, params, x):
    values: dict[str, torch.Tensor] = {}
    run_float(graph, params, x, values.__setitem__)
    return values
