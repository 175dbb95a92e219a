"""Output channels that make up for each other's errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from formats import free, gptq
from named_fits import Nearest

from dsconvert.dsconv.codes import REAL
from dsconvert.fit import draws
from dsconvert.fit.channels import PARTS, SHRINK, damped, is_moment, made_up_for, parts, second_moment
from dsconvert.fit.layer import GPTQ
from dsconvert.fit.moments import Moments, damping_for
from dsconvert.fit.seen import Places, Seen, seen_evenly
from dsconvert.graph.grids import QParams
from dsconvert.graph.ir import Node
from dsconvert.graph.ops import conv

POINT = Node("conv", "c", ("x",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})


def moment(size: int, seed: int) -> torch.Tensor:
    """Strongly correlated."""
    mix = torch.randn(size, max(2, size // 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mix @ mix.T + 0.05 * torch.eye(size, dtype=torch.float64)


def moment_of(gradient: torch.Tensor) -> torch.Tensor:
    weights = gradient.square().sum(0).sqrt().double()
    return second_moment(gradient, Places(*draws.positions(weights, torch.Generator().manual_seed(0))))


def test_a_position_counts_as_its_gradient_is_long():
    gradient = torch.tensor([[3.0, 0.0, 0.0], [4.0, 2.0, 0.0]])  # lengths 5, 2 and nothing
    wanted = torch.tensor([[9 / 5, 12 / 5], [12 / 5, 16 / 5 + 2]], dtype=torch.float64)
    torch.testing.assert_close(moment_of(gradient), wanted)


def test_of_many_positions_some_stand_for_all():
    gradient = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(1))
    gradient[1] = gradient[0] + 0.1 * gradient[1]
    gradient[2] *= 5
    length = gradient.square().sum(0).sqrt()
    wanted = ((gradient / length) @ gradient.T).double()
    # draws of unit vectors times the sum of lengths: an entry's deviation is at most that sum / sqrt(draws)
    torch.testing.assert_close(moment_of(gradient), wanted, rtol=0, atol=4 * float(length.sum()) / draws.POSITIONS**0.5)
    assert float(moment_of(gradient).trace()) == pytest.approx(float(length.sum()), rel=1e-4)  # of unit vectors: exact


def test_what_is_no_second_moment_is_told():
    good = moment_of(torch.randn(5, 40, generator=torch.Generator().manual_seed(0))).float()
    assert is_moment(good)
    assert is_moment(torch.zeros(3, 3))
    skewed, correlated = good.clone(), good.clone()
    skewed[0, 1] += 0.01 * good.abs().max()
    correlated[0, 1] = correlated[1, 0] = 2 * good.diagonal().max()
    assert not any(map(is_moment, (skewed, correlated, -good, good * torch.nan, good * torch.inf)))


def test_damping_shrinks_what_is_between_channels():
    got = damped(torch.tensor([[1.0, 0.5], [0.5, 3.0]]))
    wanted = torch.tensor([[0.5, 0.25 * (1 - SHRINK)], [0.25 * (1 - SHRINK), 1.5]], dtype=torch.float64)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    torch.linalg.cholesky(damped(torch.zeros(3, 3)))  # raises when it is singular


@pytest.mark.parametrize("count", [1, 5, PARTS, PARTS + 1, 100])
def test_parts_hold_every_channel_once_the_important_first(count):
    diagonal = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    runs = parts(torch.diag(diagonal))
    order = torch.cat(runs)
    assert len(runs) <= PARTS
    assert torch.equal(order.sort().values, torch.arange(count))
    assert (diagonal[order].diff() <= 0).all()


def test_making_up_is_the_least_of_the_objective():
    """tr(G E H E^T) by gradient: with the errors made up for nothing is left to gain, for any H."""
    g, h = moment(6, 0), moment(4, 1)
    done, rest = torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5])
    errors = torch.zeros(6, 4, dtype=torch.float64)
    errors[done] = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors[rest] = made_up_for(g, done, errors, rest)
    errors.requires_grad_(True)
    (gradient,) = torch.autograd.grad(torch.trace(g @ errors @ h @ errors.T), errors)
    assert gradient[rest].abs().max() < 1e-12 < gradient[done].abs().max()
    assert not made_up_for(g, done[:0], errors, rest).any()


@pytest.mark.parametrize(("bits", "cho"), [(3, 12), (4, 40)])
def test_channels_that_pull_together_are_fitted_together(bits, cho):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(cho, 16, 1, 1, generator=generator)
    h, g = moment(16, 3), moment(cho, 4)
    flat = weight.double().flatten(1)
    moments = Moments(h, flat @ h)
    hessian = moments.damped(flat).hessian

    def objective(channels):
        error = gptq(weight, moments, bits, 8, channels).weight().double().flatten(1) - weight.flatten(1)
        return float(torch.trace(damped(g) @ error @ hessian @ error.T))

    assert objective(g) < 0.8 * objective(None)
    # channels that have nothing to do with each other are fitted on their own, whatever they weigh
    apart = torch.diag(torch.rand(cho, generator=generator, dtype=torch.float64) + 0.1)
    alone = gptq(weight, moments, bits, 8)
    together = gptq(weight, moments, bits, 8, apart)
    assert torch.equal(alone.merged(), together.merged())
    torch.testing.assert_close(alone.cds_w, together.cds_w)


def test_a_fitted_layer_keeps_its_scale_and_has_the_right_mean():
    """y = 0.8 x + 1, fitted by moments, and for a weight alone by regression."""
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(1, 1, 1, 1)
    seen = list(seen_evenly(x, 0.8 * x + 1, 0))
    kept, refitted = (fit.layer(POINT, weight, free(4, 1), lambda: seen) for fit in (GPTQ(), Nearest()))
    # damped towards the weight's 1, as much as two images say
    more = damping_for(2)
    assert float(kept.weight.weight()) == pytest.approx((0.8 + more) / (1 + more), rel=1e-4)
    assert float(refitted.weight.weight()) == pytest.approx(0.8, rel=1e-4)
    for made in (kept, refitted):  # the mean is right in either case
        assert float(made.weight.weight() * x.mean() + made.bias) == pytest.approx(float(0.8 * x.mean() + 1), rel=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (3, 2, 1), (3, 1, 2)])
def test_a_bias_makes_the_means_equal_that_a_convolution_has(kernel, stride, dilation):
    generator = torch.Generator().manual_seed(kernel)
    padding = dilation * (kernel // 2)
    node = Node("conv", "c", ("x",), {"stride": stride, "padding": padding, "dilation": dilation, "groups": 1})
    weight, images, grid = torch.randn(5, 8, kernel, kernel, generator=generator), [], QParams(0.02, 50)
    for _ in range(2):
        q = torch.randint(0, 256, (2, 8, 9, 8), generator=generator).to(torch.uint8)
        y = conv(node, grid.dequantize(q.float()), weight, None) + torch.randn(5, generator=generator)[:, None, None]
        every = torch.arange(y[0, 0].numel())
        weights = torch.rand(2, len(every), generator=generator)
        images += [Seen(q[i], y[i].flatten(1), every, weights[i], grid) for i in range(2)]
    made = GPTQ().layer(node, weight, free(4, 8), lambda: images)
    total = torch.zeros(5, dtype=torch.float64)
    for s in images:
        met = conv(node, grid.dequantize(s.input[None].float()), made.weight.weight(), made.bias)[0].flatten(1)
        total += ((s.float_output - met).double() * s.weights).sum(1)
    total /= sum(s.weights.double().sum() for s in images)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-5)  # of float32 values about 10


def test_only_narrow_layers_without_groups_and_with_integer_shifts_are_fitted_together():
    nodes = [Node("conv", name, ("images",), {**POINT.attrs, "groups": groups})
             for name, groups in (("a", 1), ("b", 2), ("c", 1), ("d", 1), ("e", 1))]  # fmt: skip
    fit = GPTQ(dict.fromkeys("abcd", torch.eye(2)))  # nothing depends on e
    formats = [free(4, 32), free(4, 32), free(8, 2), replace(free(4, 32), code=REAL), free(3, 16)]
    found = [fit.together(node, format) for node, format in zip(nodes, formats, strict=True)]
    assert [moment is not None for moment in found] == [True, False, False, False, False]
