"""Shifts fitted from calibration values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import grids_of, lockstep
from formats import fit_weight

from dsconvert.fit.layer import fit_cds
from dsconvert.fit.seen import Seen, seen_evenly
from dsconvert.graph.integer import QConv, run_integer
from dsconvert.graph.ir import ConvParams, Node
from dsconvert.graph.ops import conv
from dsconvert.graph.run import run_float
from dsconvert.yolo.lower import lower

POINT = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def test_cds_is_the_regression_of_float_outputs_on_the_accumulator():
    generator = torch.Generator().manual_seed(0)
    node = Node("conv", "c", ("x",), POINT)
    weight = torch.randn(3, 8, 1, 1, generator=generator)
    fitted = fit_weight(weight, 3, 4)
    real = [torch.randint(-5, 251, (2, 8, 9, 9), generator=generator) * 0.01 for _ in range(2)]
    wanted = [conv(node, x, weight, torch.tensor([1.0, 2.0, 3.0])) for x in real]
    result = fit_cds(node, fitted, [s for x, y in zip(real, wanted, strict=True) for s in seen_evenly(x, y, 0)])
    acc = torch.cat([conv(node, x, fitted.merged().float(), None) for x in real])
    for o in range(3):
        a = np.stack((acc[:, o].flatten().double().numpy(), np.ones(acc[:, o].numel())), 1)
        y = torch.cat(wanted)[:, o].flatten().double().numpy()
        cds, bias = np.linalg.lstsq(a, y, rcond=None)[0]
        # the accumulators are float32; the sums float64
        assert result.weight.cds_w[o].item() == pytest.approx(cds, rel=1e-4)
        assert result.bias[o].item() == pytest.approx(bias, rel=1e-3)


def test_constant_input_keeps_the_scale_and_corrects_the_bias():
    node = Node("conv", "c", ("x",), POINT)
    weight = torch.ones(1, 1, 1, 1)
    fitted = fit_weight(weight, 4, 1)
    tens = torch.full((1, 1, 4, 4), 10.0)
    result = fit_cds(node, fitted, seen_evenly(tens, tens / 2, 0))
    assert torch.equal(result.weight.cds_w, fitted.cds_w)
    # 10 W' + b = 5 with W' = 1 up to float32
    assert result.bias.item() == pytest.approx(-5.0, abs=1e-5)


def test_shifts_follow_the_positions_that_count():
    """Two lines in one cloud of points: the weights say which one is fitted."""
    node = Node("conv", "c", ("x",), POINT)
    fitted = fit_weight(torch.ones(1, 1, 1, 1), 4, 1)
    x = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    y = torch.where(torch.arange(16).reshape(1, 1, 4, 4) % 2 == 0, 0.8 * x + 1, 1.25 * x - 1)
    for kept, slope, offset in ((0, 0.8, 1.0), (1, 1.25, -1.0)):
        weights = (torch.arange(16) % 2 == kept).float()
        result = fit_cds(node, fitted, [Seen(x[0], y[0].flatten(1), torch.arange(16), weights)])
        # float32 points on an exact line
        assert float(result.weight.weight()) == pytest.approx(slope, rel=1e-4)
        assert float(result.bias) == pytest.approx(offset, rel=1e-4)


def given(weights):
    """Weights fitted beforehand: only the shifts remain to be fitted."""
    return lambda node, weight, pairs: weights[node.name]


def network_parts(tiny, picture):
    network, _ = tiny
    graph, params = lower(network.fused())
    batches = [picture, picture.flip(3), picture.flip(2), 1 - picture]
    own = grids_of(graph, params, batches)
    return graph, params, batches, own


def test_fitted_shifts_beat_the_weights_own(tiny, picture):
    graph, params, batches, own = network_parts(tiny, picture)
    weights = {n.name: fit_weight(params[n.name].weight, 4, 32) for n in graph.convs()}
    plain = {name: QConv(w, params[name].bias) for name, w in weights.items()}
    fitted = lockstep(graph, params, given(weights), own, batches)
    unseen = picture.flip(1)

    def error(convs):
        got, wanted = run_integer(graph, convs, own, unseen), run_float(graph, params, unseen)
        return sum(float((a - b).square().mean() / b.square().mean()) for a, b in zip(got, wanted, strict=True))

    assert error(fitted) < error(plain)


def test_float_activations_leave_only_the_weights_error(tiny, picture):
    graph, params, batches, own = network_parts(tiny, picture)
    weights = {n.name: fit_weight(params[n.name].weight, 4, 32) for n in graph.convs()}
    plain = {name: QConv(w, params[name].bias) for name, w in weights.items()}
    fitted = {acts: lockstep(graph, params, given(weights), own if acts else {}, batches) for acts in (True, False)}

    def error(convs):
        mine = {name: ConvParams(c.weight.weight(), c.bias) for name, c in convs.items()}
        pairs = [zip(run_float(graph, mine, x), run_float(graph, params, x), strict=True) for x in batches]
        return sum(float((a - b).square().mean() / b.square().mean()) for pair in pairs for a, b in pair)

    # shifts fitted for float activations are the better ones for float activations, on what they were fitted on
    assert error(fitted[False]) < min(error(fitted[True]), error(plain))


def test_eight_bits_are_close_to_float(tiny, picture):
    graph, params, batches, own = network_parts(tiny, picture)
    weights = {n.name: fit_weight(params[n.name].weight, 8, params[n.name].weight.shape[1]) for n in graph.convs()}
    convs = lockstep(graph, params, given(weights), own, batches)
    for got, wanted in zip(run_integer(graph, convs, own, picture), run_float(graph, params, picture), strict=True):
        noise = (got - wanted).square().mean() / wanted.square().mean()
        assert noise < 0.01  # about 40 dB per quantizer, some thirty of them in a row: better than 20 dB


def test_progress_counts_every_node(tiny, picture):
    graph, params, batches, own = network_parts(tiny, picture)
    weights = {n.name: fit_weight(params[n.name].weight, 4, 32) for n in graph.convs()}
    seen: list[tuple[int, int]] = []
    lockstep(graph, params, given(weights), own, batches[:1], lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(graph.nodes)) for i in range(len(graph.nodes))]
