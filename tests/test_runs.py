"""VQK in runs of four: the lattice's vectors, the nearest of them, and fits with them, against brute force."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from dsconvert.dsconv import runs
from dsconvert.dsconv.tensor import DSTensor, Width, largest_pair, max_multiplier, used_width
from dsconvert.fit.gptq import Moments, fit_weight_gptq
from dsconvert.fit.least_squares import fit_weight, to_blocks
from dsconvert.fit.runs import Factor, _nearest_leaders, nearest_blocks, round_runs
from dsconvert.graph.integer import QConv

rng = np.random.default_rng


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "count", "longest"), [(2, 256, 9), (3, 3992, 39)])
def test_the_vectors_are_those_of_odd_sum_in_the_ball(bits, count, longest):
    wanted = {v for v in product(range(-7, 8), repeat=4) if sum(v) % 2 and sum(x * x for x in v) <= longest}
    found = runs.vectors(bits)
    assert len(found) == len(wanted) == count <= 2 ** (4 * bits)
    assert {tuple(int(x) for x in v) for v in found} == wanted


def test_one_bit_is_a_sign():
    assert sorted(map(tuple, runs.vectors(1).tolist())) == sorted(product((-1, 1), repeat=4))
    fitted = fit_weight(torch.tensor([3.0, -5.0, -4.0, 4.0]).reshape(1, 4, 1, 1), 1, 4, runs=True)
    assert fitted.vqk.flatten().tolist() == [1, -1, -1, 1]
    assert float(fitted.weight().abs().max()) == pytest.approx(4.0)  # the mean size
    assert fitted.weight_bits == 2  # a sign, and a quarter of m


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_rows_stand_for_runs(bits):
    vqk = runs.vectors(bits)[rng(0).integers(0, len(runs.vectors(bits)), (3, 5, 2, 2))]  # (3, 5, 2, 2, 4)
    rows = runs.rows(vqk, bits)
    back = runs.from_rows(rows, bits)
    assert back.shape == (3, 20, 2, 2)
    assert np.array_equal(back[:, 4:8], np.moveaxis(vqk[:, 1], -1, 1))  # the second run is channels 4 to 7
    assert np.array_equal(runs.vectors(bits)[rows], vqk)


@pytest.mark.parametrize("wrong", [(0, 0, 0, 0), (1, 1, 0, 0), (3, 1, 0, 1), (7, 0, 0, 0), (-128, 1, 0, 0)])
def test_other_vectors_are_no_runs(wrong):
    """None, an even sum, too long, beyond the cube, and a number whose absolute value int8 does not hold."""
    with pytest.raises(ValueError, match="leave the runs of 2 bits"):
        runs.rows(np.array([wrong], np.int8), 2)
    with pytest.raises(ValueError, match="rows beyond"):
        runs.from_rows(np.full((1, 1, 1, 1), 256, np.int32), 2)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_nearest_run_is_that_of_brute_force(bits):
    x = rng(1).normal(0, 2.5, (500, 4))
    book = runs.vectors(bits).astype(float)
    least = np.square(x[:, None] - book).sum(-1).min(1)
    order = np.argsort(-np.abs(x), -1)
    leaders = runs.leaders(bits)
    falling = np.take_along_axis(np.abs(x), order, -1)
    _, chosen = _nearest_leaders(falling[:, None, None, None], np.ones((1, 1, 1)), leaders, 1)
    found = np.empty_like(x)
    np.put_along_axis(found, order, leaders[chosen[:, 0, 0, 0]], -1)
    found = np.copysign(found, x)
    assert np.allclose(np.square(x - found).sum(-1), least, rtol=1e-12)  # float64, another order of sums
    runs.rows(found.astype(np.int8), bits)  # raises where one is no run


def test_a_block_is_fitted_as_well_as_every_choice_of_m_and_runs():
    """One output channel, one block of 8, given the CDSw found: no m and no two runs are nearer."""
    blocks = randn(1, 1, 8, 1, seed=3).double()
    vqk, m, cds = nearest_blocks(blocks, 0, 2)
    error = float((blocks - cds * m * vqk).square().sum())
    book = torch.from_numpy(runs.vectors(2)).double()
    best = min(
        sum(float((part - cds * k * book).square().sum(1).min()) for part in blocks.flatten().split(4))
        for k in range(1, max_multiplier(2, runs=True) + 1)
    )
    assert error == pytest.approx(best, rel=1e-9)  # float64, another order of sums


@pytest.mark.parametrize(("bits", "least"), [(2, 1.2), (3, 0.8)])
def test_runs_lose_less_than_free_integers_of_as_many_bits(bits, least):
    """Theory says 1.6 and 1.3 dB for Gaussian weights; blocks whose m fits them well leave less to gain."""
    weight = randn(32, 64, 3, 3)

    def noise(fitted: DSTensor) -> float:
        return 10 * float(torch.log10((weight - fitted.weight()).square().sum()))

    free, together = fit_weight(weight, bits, 32), fit_weight(weight, bits, 32, runs=True)
    assert together.weight_bits == free.weight_bits
    assert noise(together) < noise(free) - least


def test_what_stands_in_the_padding_of_a_short_block_does_not_matter():
    blocks = to_blocks(randn(4, 48, 3, 3).double(), 32)
    other = blocks.clone()
    other[:, 1, 16:] = 0.3  # shorter than the longest run, which the starting CDSw is made for
    vqk, m, cds = nearest_blocks(blocks, 16, 2)
    found = nearest_blocks(other, 16, 2)
    assert torch.equal(found[0][:, 0], vqk[:, 0])
    assert torch.equal(found[0][:, 1, :16], vqk[:, 1, :16])
    assert torch.equal(found[1], m)
    assert torch.equal(found[2], cds)
    assert fit_weight(randn(4, 48, 3, 3), 2, 32, runs=True).vqk.shape == (4, 48, 3, 3)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_group_of_one_run_is_rounded_to_the_least_error_under_h(bits):
    """With U^T U = H^-1 the errors' squares are the quadratic form of H, here tried for every m and every run."""
    a = rng(5).normal(size=(4, 9))
    h = a @ a.T + 0.1 * np.eye(4)
    upper = torch.linalg.cholesky(torch.from_numpy(np.linalg.inv(h)), upper=True).numpy()
    w, cds = rng(6).normal(0, 3, (5, 4)), np.full(5, 0.4)
    m, vqk, errors = round_runs(w, cds, Factor.of(upper, bits), bits)
    book = runs.vectors(bits).astype(float)
    for o in range(5):
        best = np.inf
        for k in range(1, max_multiplier(bits, runs=True) + 1):
            d = w[o] - cds[o] * k * book
            best = min(best, float(((d @ h) * d).sum(1).min()))
        d = w[o] - cds[o] * m[o] * vqk[o]
        assert float(d @ h @ d) == pytest.approx(best, rel=1e-6)  # runs are compared in float32
        assert float(np.square(errors[o]).sum()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_gptq_in_runs_is_never_worse_than_least_squares_and_mostly_much_better(bits):
    weight = randn(8, 16, 3, 3)
    q = randn(144, 600, seed=1).double()
    q[1:] += 0.7 * q[:-1]  # inputs that go together, or there is nothing to make up for
    hessian, flat = q @ q.T / 600, weight.double().flatten(1)
    moments = Moments(hessian, flat @ hessian)
    damped = moments.damped(flat).hessian

    def j(t: DSTensor) -> torch.Tensor:
        d = (weight - t.weight()).double().flatten(1)
        return ((d @ damped) * d).sum(1)

    ours, plain = fit_weight_gptq(weight, moments, bits, 16, runs=True), fit_weight(weight, bits, 16, runs=True)
    assert ours.width == Width(bits, 16, True)
    assert bool((j(ours) <= j(plain) * (1 + 1e-6)).all())  # CDSw is rounded to float32
    assert float(j(ours).sum()) < (0.9 if bits == 1 else 0.8) * float(j(plain).sum())  # signs have little choice


def test_what_is_no_weight_in_runs_is_refused():
    good = fit_weight(randn(2, 8, 1, 1), 2, 8, runs=True)
    zeros = torch.zeros_like(good.m)
    for wrong in ({"vqk": torch.zeros_like(good.vqk)}, {"z": zeros}, {"bits": 4}, {"block_size": 6}):
        with pytest.raises(ValueError, match=r"runs|VQK|KDS"):
            replace(good, **wrong)
    with pytest.raises(ValueError, match="no runs of 2 bits"):
        DSTensor(torch.ones(1, 6, 1, 1, dtype=torch.int8), torch.ones(1, 1, 1, 1, dtype=torch.int8), None,
                 torch.ones(1), 2, 8, runs=True)  # fmt: skip


def test_layers_of_few_bits_come_in_runs_where_these_fit():
    assert used_width(1, 64, 16) == (1, 16, True)
    assert used_width(2, 64, 16) == (2, 16, True)
    assert used_width(3, 20, 4) == (3, 4, True)
    assert not any(used_width(*w).runs for w in ((4, 64, 16), (8, 64, 16), (2, 3, 16), (3, 66, 32), (2, 64, 6)))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_pair_in_runs_can_saturate(bits):
    assert largest_pair(fit_weight(50 * randn(8, 32, 1, 1), bits, 16, runs=True).merged()) <= 128
    assert 2 * runs.largest(bits) * max_multiplier(bits, runs=True) <= 128


@pytest.mark.parametrize("bits", [1, 2])
def test_a_channel_that_is_almost_its_bias_keeps_it_in_runs(bits):
    """A bias beyond int32 in its own units: the channel becomes the bias, within what float32 holds of it."""
    weight = fit_weight(randn(2, 8, 1, 1), bits, 8, runs=True)
    tiny = replace(weight, cds_w=torch.tensor([1e-12, 0.1]))
    kept = QConv(tiny, torch.tensor([3.0, 1.0])).with_room(0.01)
    assert torch.equal(kept.weight.vqk[1], weight.vqk[1])
    assert kept.weight.cds_w[1] == tiny.cds_w[1]
    unit = 0.01 * float(kept.weight.cds_w[0])
    assert int(kept.bias_int(0.01)[0]) * unit == pytest.approx(3.0, rel=1e-6)
    # 255 for every input: what the runs' own ones add is nothing beside it
    assert 255 * float(kept.weight.merged()[0].int().abs().sum()) * unit < 3.0 * 1e-5
    assert int(kept.largest_sum(0.01).max()) < 2**31
