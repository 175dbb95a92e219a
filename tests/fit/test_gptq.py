"""Asymmetric GPTQ: its moments, and that it never does worse than least squares on the layer's own objective."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from formats import fit_weight, free, gptq, largest_pair
from torch.nn import functional as F

from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit import draws
from dsconvert.fit.gptq import inverse_factor
from dsconvert.fit.layer import GPTQ
from dsconvert.fit.moments import DAMPING, Moments, damping_for, measure_moments
from dsconvert.fit.seen import Seen, seen_evenly
from dsconvert.graph.ir import Node

CONV = Node("conv", "c", ("x",), {"stride": 1, "padding": 1, "dilation": 1, "groups": 1})


def inputs(seed: int, channels: int = 8, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Float inputs with strongly correlated channels, and the same as a quantized network would see them."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, 3, generator=g)
    x = F.silu(torch.einsum("ck,nkhw->nchw", mix, torch.randn(4, 3, 12, 12, generator=g)))
    q = 0.9 * x + noise * torch.randn(x.shape, generator=g)
    return x, q


def seen(x: torch.Tensor, q: torch.Tensor, weights: torch.Tensor | None = None, first: int = 0) -> list[Seen]:
    """Images as the layer sees them, its float outputs twice its float inputs; positions count the same by default."""
    weights = torch.ones(len(x), x.shape[2] * x.shape[3]) if weights is None else weights
    made = []
    for index, (one, given, counts) in enumerate(zip(x, q, weights, strict=True), first):
        picks, drawn = draws.positions(counts.double(), draws.of_image(0, index))
        made.append(Seen(given, 2 * one.flatten(1)[:, picks], picks, drawn.float()))
    return made


def moments_of(weight: torch.Tensor, x: torch.Tensor, q: torch.Tensor) -> Moments:
    """Moments of a convolution by CONV of x, seen as q."""
    return measure_moments(CONV, weight.shape, seen_evenly(q, F.conv2d(x, weight, padding=1), 0))


def objective(
    weight: torch.Tensor, fitted: DSTensor, x: torch.Tensor, q: torch.Tensor, ridge: float = 0.0
) -> torch.Tensor:
    """E ||W x - W' q||^2 + ridge ||W - W'||^2 per output channel with the best CDSw and CDSb for the integers, by
    regression in float64."""
    y = F.conv2d(x.double(), weight.double(), padding=1).transpose(0, 1).flatten(1)
    a = F.conv2d(q.double(), fitted.merged().double(), padding=1).transpose(0, 1).flatten(1)
    y, a = y - y.mean(1, keepdim=True), a - a.mean(1, keepdim=True)
    pull = (ridge * y.shape[1]) ** 0.5
    y, a = (torch.cat((v, pull * w.double().flatten(1)), 1) for v, w in ((y, weight), (a, fitted.merged())))
    cds = (a * y).sum(1) / a.square().sum(1).clamp_min(1e-30)
    return (y - cds[:, None] * a).square().sum(1) / (y.shape[1] - weight[0].numel())


def test_moments_are_the_covariances_of_the_unfolded_inputs_and_the_outputs():
    x, q = inputs(0, 3)
    got = measure_moments(CONV, torch.Size((3, 3, 3, 3)), [*seen(x[:2], q[:2]), *seen(x[2:], q[2:], first=2)])
    columns = [v.transpose(0, 1).flatten(1).double().numpy() for v in (2 * x, F.unfold(q, 3, padding=1))]
    cy, cq = (c - c.mean(1, keepdims=True) for c in columns)
    # sums of float32 products over 576 positions
    np.testing.assert_allclose(got.hessian.numpy(), cq @ cq.T / cq.shape[1], atol=1e-5)
    np.testing.assert_allclose(got.cross.numpy(), cy @ cq.T / cq.shape[1], atol=1e-5)


def test_moments_of_inputs_that_vary_little_around_much():
    x, q = inputs(4, 3)
    node = Node("conv", "c", ("x",), {**CONV.attrs, "padding": 0})
    x, q = x + 1000, (q + 500).half().float()
    got = measure_moments(node, torch.Size((3, 3, 1, 1)), [*seen(x[:2], q[:2]), *seen(x[2:], q[2:], first=2)])
    y, c = ((v - v.mean(1, keepdim=True)).numpy() for v in (t.transpose(0, 1).flatten(1).double() for t in (2 * x, q)))
    # without care float32 would err by 500^2 * 6e-8 = 0.015 and more
    np.testing.assert_allclose(got.hessian.numpy(), c @ c.T / c.shape[1], atol=1e-5)
    np.testing.assert_allclose(got.cross.numpy(), y @ c.T / c.shape[1], atol=1e-4)


def test_moments_weight_positions_by_importance():
    """A weight of 2 counts as the position twice over, a weight of 0 as none."""
    x, q = inputs(3, 4)
    twice = torch.zeros(4, 144)
    twice[0], twice[1, 5] = 1.0, 2.0
    node = Node("conv", "c", ("x",), {**CONV.attrs, "padding": 0})
    got = measure_moments(node, torch.Size((4, 4, 1, 1)), seen(x, q, twice))
    columns = [torch.cat((v[0].flatten(1), v[1].flatten(1)[:, [5, 5]]), 1).double().numpy() for v in (2 * x, q)]
    cy, cq = (c - c.mean(1, keepdims=True) for c in columns)
    np.testing.assert_allclose(got.hessian.numpy(), cq @ cq.T / 146, atol=1e-5)
    np.testing.assert_allclose(got.cross.numpy(), cy @ cq.T / 146, atol=1e-5)


def test_many_positions_are_drawn_by_weight():
    x = torch.zeros(1, 1, 64, 64)
    x[..., 32:] = 1.0
    weights = torch.where(x.flatten(1) > 0, 3.0, 1.0)  # three quarters of the weight lies on ones
    node = Node("conv", "c", ("x",), {**CONV.attrs, "padding": 0})
    got = measure_moments(node, torch.Size((1, 1, 1, 1)), seen(x, x, weights))
    # variance of a coin of chance 3/4 is 3/16; 1024 draws give it to 0.4/32 at one sigma of the chance, 5 sigma here
    assert got.hessian.item() == pytest.approx(3 / 16, abs=5 * 0.0135 * 0.5)


def test_an_image_is_drawn_from_alike_in_any_batch():
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 2, 40, 40, generator=g), torch.rand(3, 1600, generator=g)
    node = Node("conv", "c", ("x",), {**CONV.attrs, "padding": 0})

    def hessian(*parts: tuple[slice, int]) -> torch.Tensor:
        images = [s for part, first in parts for s in seen(x[part], x[part], weights[part], first)]
        return measure_moments(node, torch.Size((2, 2, 1, 1)), images).hessian

    both = hessian((slice(1, 3), 1))
    # float32 sums in another order
    torch.testing.assert_close(both, hessian((slice(1, 2), 1), (slice(2, 3), 2)), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(both, hessian((slice(1, 3), 0)), rtol=1e-4)


@pytest.mark.parametrize(
    ("images", "damping"), [(1, 2.0), (16, 2.0), (32, 2.0), (64, 1.0), (128, 0.5), (512, 0.125), (1024, 0.1)]
)
def test_few_images_move_the_weights_less(images, damping):
    assert damping_for(images) == damping


def test_moments_know_how_many_images_they_are_of():
    x, q = inputs(0)
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    assert moments_of(weight, x, q).damping == damping_for(len(q))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("block", [3, 8])
def test_never_worse_than_least_squares_and_clearly_better_at_few_bits(bits, block):
    x, q = inputs(bits)
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(bits))
    moments = replace(moments_of(weight, x, q), damping=DAMPING)  # as of many images
    ridge = DAMPING * float(moments.hessian.diagonal().mean())
    ours, plain = (
        objective(weight, f, x, q, ridge) for f in (gptq(weight, moments, bits, block), fit_weight(weight, bits, block))
    )
    # channel by channel; the moments were summed from float32 products
    assert (ours <= plain * (1 + 1e-4)).all()
    if bits <= 4:
        assert ours.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_fitted_pair_can_saturate_sixteen_bits(bits):
    x, q = inputs(11, noise=0.4)
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(11)) ** 3
    moments = moments_of(weight, x, q)
    assert 255 * largest_pair(gptq(weight, moments, bits, 8).merged()) <= 32767


def test_asymmetric_targets_beat_symmetric_ones():
    x, q = inputs(7, noise=0.4)
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(7))
    m = moments_of(weight, x, q)
    asymmetric = objective(weight, gptq(weight, m, 4, 8), x, q)
    symmetric = Moments(m.hessian, weight.double().flatten(1) @ m.hessian)
    unaware = objective(weight, gptq(weight, symmetric, 4, 8), x, q)
    assert asymmetric.sum() < unaware.sum()


def test_independent_inputs_leave_nothing_to_compensate():
    """With H = 1 and C = W every column is on its own: rounding at a given CDSw is already optimal."""
    weight = torch.randn(4, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    eye = torch.eye(8, dtype=torch.float64)
    ours = gptq(weight, Moments(eye, weight.double().flatten(1)), 4, 8)
    plain = fit_weight(weight, 4, 8)
    error = (ours.weight() - weight).square().sum((1, 2, 3))
    # J is then ||W - W'||^2 itself; float32 storage of CDSw
    assert (error <= (plain.weight() - weight).square().sum((1, 2, 3)) * (1 + 1e-5)).all()


def test_brute_force_on_two_weights():
    """Two strongly correlated inputs, 2 bits, one block, against the best of all integers and scales."""
    hessian = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(40, 2, 1, 1, generator=generator)
    flat = weight.double().flatten(1)
    fitted = gptq(weight, Moments(hessian, flat @ hessian), 2, 2)
    error = fitted.weight().double().flatten(1) - flat
    got = ((error @ hessian) * error).sum(1)
    candidates = torch.tensor([[a, b] for a in range(-2, 2) for b in range(-2, 2) if a or b], dtype=torch.float64)
    cross, power = flat @ hessian @ candidates.T, ((candidates @ hessian) * candidates).sum(1)
    gain = torch.where(cross > 0, cross.square() / power, 0)  # the scale CDSw is positive
    best = ((flat @ hessian) * flat).sum(1) - gain.max(1).values
    # a greedy rounding from two starting scales need not find the optimum of every channel
    total = ((flat @ hessian) * flat).sum()
    assert (got.sum() - best.sum()) / total < 0.02


def correlated(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A strongly correlated H (columns, columns), and the upper Cholesky factor of its inverse."""
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hessian = mix @ mix.T / columns + 0.1 * torch.eye(columns, dtype=torch.float64)
    return hessian, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def test_errors_squared_are_what_rounding_adds_to_j():
    """sum errors^2 over all groups = (w - W') H (w - W')^T, whatever m were chosen, one by one at every CDSw."""
    hessian, upper = correlated(12)
    w = torch.randn(5, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    cds = torch.tensor([0.08, 0.07, 0.06, 0.05, 0.04], dtype=torch.float64)

    def adds(w: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, _, errors = FREE.group(w.numpy(), cds.numpy(), upper.numpy(), free(3, 4))
        return torch.from_numpy(errors), torch.from_numpy(errors).square().sum(-1)

    def j(lengths: list[int]) -> torch.Tensor:
        vqk, m = FREE.round(w.numpy(), cds.numpy(), upper.numpy(), lengths, free(3, 4))
        error = w - cds[:, None] * m.mT.repeat_interleave(torch.tensor(lengths), -1) * vqk
        return ((error @ hessian) * error).sum(-1)

    torch.testing.assert_close(adds(w, upper)[1], j([12]))
    first, added = adds(w[:, :5], upper[:5, :5])
    _, then = adds(w[:, 5:] - first @ upper[:5, 5:], upper[5:, 5:])
    torch.testing.assert_close(added + then, j([5, 7]))


def test_the_multiplier_is_the_best_of_all():
    """Every m by brute force: columns rounded one by one, those still to come moved to where J is then least."""
    hessian, upper = correlated(6)
    w = torch.randn(9, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    costs = []
    for m in range(1, 16):
        made = torch.zeros_like(w)
        for j in range(6):
            error = w[:, :j] - made[:, :j]
            moved = w[:, j:] + error @ hessian[:j, j:] @ torch.linalg.inv(hessian[j:, j:])
            made[:, j] = 0.06 * m * (moved[:, 0] / (0.06 * m)).round().clamp(-4, 3)
        costs.append((((w - made) @ hessian) * (w - made)).sum(1))
    got, _, _ = FREE.group(w.numpy(), np.full(9, 0.06), upper.numpy(), free(3, 4))
    assert got.tolist() == (torch.stack(costs).argmin(0) + 1.0).tolist()
    assert len(set(got)) > 3


def test_every_group_is_fitted_as_a_layer_of_its_own():
    generator = torch.Generator().manual_seed(0)
    node = Node("conv", "c", ("x",), {**CONV.attrs, "groups": 2})
    weight, x, noise = (torch.randn(*s, generator=generator) for s in ((4, 2, 3, 3), (2, 4, 9, 9), (2, 4, 9, 9)))
    noisy = x + 0.3 * noise
    y = F.conv2d(x, weight, padding=1, groups=2)
    made = GPTQ().layer(node, weight, free(3, 2), lambda: seen_evenly(noisy, y, 0))
    for group, channels in enumerate((slice(0, 2), slice(2, 4))):
        seen = [*seen_evenly(noisy[:, channels], y[:, channels], 0)]
        alone = GPTQ().layer(CONV, weight[channels], free(3, 2), lambda seen=seen: seen)
        assert torch.equal(made.weight.rows(torch.arange(4)[channels]).weight(), alone.weight.weight()), group
        assert torch.equal(made.bias[channels], alone.bias)
    depthwise = replace(node, attrs={**node.attrs, "groups": 4})
    lone = GPTQ().layer(depthwise, weight[:, :1], free(8, 1), lambda: seen_evenly(noisy, y, 0))
    assert torch.equal(lone.weight.vqk, fit_weight(weight[:, :1], 8, 1).vqk)  # nothing makes up for anything


def test_the_factor_of_the_inverse_is_upper_triangular_and_right():
    mix = torch.randn(40, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = mix @ mix.T / 60 + 0.1 * torch.eye(40, dtype=torch.float64)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    assert float(factor.diagonal().min()) > 0
    # float64, a condition of some hundreds
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(-hessian)
