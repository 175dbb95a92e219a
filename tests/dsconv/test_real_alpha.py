"""Real alpha: against brute force, against a general least-squares solver, and against the integer KDS."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from formats import fit_weight, fit_weight_real, gptq, randn

from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.codes.free_search import to_blocks
from dsconvert.dsconv.codes.real import REAL, project_alpha
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.modules import fitted_conv
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.layer import GPTQ
from dsconvert.fit.moments import Moments
from dsconvert.fit.seen import seen_evenly
from dsconvert.graph.ir import Node
from dsconvert.model.file import load_model, model_bytes


def real_kds(bits: int, block_size: int) -> WeightFormat:
    return WeightFormat(bits, block_size, REAL)


def layer(seed: int, cho: int, chi: int, k: int, columns: int = 400) -> tuple[torch.Tensor, Moments, torch.Tensor]:
    """A weight, the moments of correlated inputs x and q, and q and W x themselves stacked."""
    weight, size = randn(cho, chi, k, k, seed=seed), chi * k * k
    x = (randn(size, size, seed=seed + 1) @ randn(size, columns, seed=seed + 2)).double()
    q = 0.9 * x + randn(size, columns, seed=seed + 3)
    y = weight.double().flatten(1) @ x
    return weight, Moments(q @ q.T / columns, y @ q.T / columns), torch.cat((q, y))


def test_alpha_of_given_integers_is_the_least_squares_scale():
    w = randn(3, 2, 4, 2).double()
    v = torch.round(w * 3)
    v[0, 0, :, 0] = 0
    found = project_alpha(w, v)
    assert tuple(found.shape) == (3, 2, 1, 2)
    assert found[0, 0, 0, 0] == 0
    for o, b, t in list(itertools.product(range(3), range(2), range(2)))[1:]:
        wanted = torch.linalg.lstsq(v[o, b, :, t, None], w[o, b, :, t, None]).solution.item()
        assert found[o, b, 0, t].item() == pytest.approx(wanted, rel=1e-10)  # float64 rounding


@pytest.mark.parametrize("bits", [2, 3])
def test_fit_is_the_brute_force_optimum(bits):
    """All VQK of blocks of 3, each with its best alpha. The alternation may settle beside the best of a few blocks."""
    weight = randn(40, 3, 1, 1, seed=bits)
    low, high = FREE.limits(bits)
    every = torch.tensor(list(itertools.product(range(low, high + 1), repeat=3)), dtype=torch.float64)
    w = weight.double().reshape(40, 1, 3)
    alpha = (w * every).sum(2) / every.square().sum(1).clamp_min(1)
    best = (w - alpha[:, :, None] * every).square().sum(2).amin(1)
    fitted = fit_weight_real(weight, bits, 32)
    found = (fitted.weight() - weight).double().square().sum((1, 2, 3))
    assert (found >= best - 1e-6).all()  # float32 weights
    assert (found < best + 1e-6).double().mean() > 0.9
    assert found.sum() < 1.02 * best.sum()


def test_real_alpha_fits_better_than_integers():
    weight = randn(6, 48, 3, 3)
    real, integer = (fit(weight, 4, 32) for fit in (fit_weight_real, fit_weight))
    errors = [(t.weight() - weight).square().sum() for t in (real, integer)]
    assert errors[0] < errors[1]
    assert real.weight_bits == 4 + 32 * 2 / 48  # two alphas of 32 bits for 48 weights
    with pytest.raises(ValueError, match="no int8"):
        real.merged()


@pytest.mark.parametrize(("chi", "k"), [(8, 3), (20, 1), (16, 2)])
def test_best_alpha_is_a_general_solvers_and_never_worse_than_m(chi, k):
    weight, moments, data = layer(chi, 4, chi, k)
    fitted = gptq(weight, moments, 3, 8)
    real = DSTensor(*REAL.refit(fitted, moments.hessian, moments.cross, real_kds(3, 8)), real_kds(3, 8))
    q, wanted = data[: chi * k * k], data[chi * k * k :]
    blocks = to_blocks(fitted.vqk.double(), 8)
    nblk = blocks.shape[1]
    for o in range(4):
        # one column of the design for each (block, tap): what its integers make of q
        design = []
        for b, t in itertools.product(range(nblk), range(k * k)):
            only = torch.zeros_like(fitted.vqk[o].double()).reshape(chi, k * k)
            only[8 * b : 8 * b + 8, t] = fitted.vqk[o].double().reshape(chi, k * k)[8 * b : 8 * b + 8, t]
            design.append(only.flatten() @ q)
        solution = torch.linalg.lstsq(torch.stack(design, 1), wanted[o][:, None], driver="gelsd").solution[:, 0]
        made, general = (w @ torch.stack(design) for w in (real.m[o].double().flatten(), solution))
        error = (made - wanted[o]).square().sum()
        # alpha are rounded to float32 and the solve has a small ridge
        assert error == pytest.approx(float((general - wanted[o]).square().sum()), rel=1e-5)
        integer = (fitted.weight()[o].double().flatten() @ q - wanted[o]).square().sum()
        assert error <= integer * (1 + 1e-6)


def test_parts_that_do_not_fit_are_refused():
    t = fit_weight_real(randn(2, 8, 1, 1), 4, 4)
    with pytest.raises(ValueError, match="KDS must have shape"):
        replace(t, m=t.m[:, :1])


def test_torch_module_computes_the_real_weight():
    conv = torch.nn.Conv2d(8, 5, 3, padding=1, bias=False)
    t = fit_weight_real(conv.weight, 4, 4)
    x = randn(1, 8, 6, 6)
    module = fitted_conv(conv, t, torch.zeros(5))
    wanted = torch.nn.functional.conv2d(x, t.weight(), padding=1)
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_a_fit_uses_what_the_layer_sees():
    node = Node("conv", "c", ("x",), {"stride": 1, "padding": 1, "dilation": 1, "groups": 1})
    x = randn(2, 8, 10, 10)
    weight = randn(4, 8, 3, 3)
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    noisy = x + 0.3 * randn(2, 8, 10, 10, seed=9)
    real = GPTQ().layer(node, weight, real_kds(4, 8), lambda: seen_evenly(noisy, y, 0))
    assert real.weight.format == real_kds(4, 8)
    error = torch.nn.functional.conv2d(noisy, real.weight.weight(), real.bias, padding=1) - y
    # VQK of 4 bits on noisy inputs, a tenth of what there is; the means are equal
    assert error.square().mean() < 0.2 * y.square().mean()
    assert error.mean((0, 2, 3)).abs().max() < 1e-4


def test_model_file_keeps_alpha(converted, tmp_path):
    def real(t: DSTensor) -> DSTensor:
        return t if t.is_plain_int8 else fit_weight_real(t.weight(), 4, 16)

    convs = {name: replace(c, weight=real(c.weight)) for name, c in converted.convs.items()}
    model = replace(converted, convs=convs, activations={})
    path = tmp_path / "m.safetensors"
    path.write_bytes(model_bytes(model))
    read = load_model(path)
    for name, conv in convs.items():
        assert np.array_equal(read.convs[name].weight.weight().numpy(), conv.weight.weight().numpy())
        assert read.convs[name].weight.format == conv.weight.format
    assert model_bytes(read) == path.read_bytes()
