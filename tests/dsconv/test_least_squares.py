"""The per-block fit against brute force and against its own promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from formats import fit_weight, free, largest_pair

from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.codes.free_search import from_blocks, nearest_integers, project_cds, relieve_pairs, to_blocks


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nearest_integers_is_the_brute_force_optimum(bits):
    generator = torch.Generator().manual_seed(bits)
    blocks = torch.randn(4, 2, 2, 1, generator=generator, dtype=torch.float64) * 10
    cds = torch.tensor([0.3, 0.7, 1.0, 2.5], dtype=torch.float64)
    m, vqk = nearest_integers(blocks, cds, free(bits, 8))
    found = (blocks - cds[:, None, None, None] * m * vqk).square().sum((2, 3))
    low, high = FREE.limits(bits)
    for o, b in itertools.product(range(4), range(2)):
        w = blocks[o, b, :, 0]
        best = min(
            ((w - cds[o] * k * torch.tensor(q, dtype=torch.float64)).square().sum())
            for k in range(1, FREE.most_m(bits) + 1)
            for q in itertools.product(range(low, high + 1), repeat=2)
        )
        assert found[o, b].item() == pytest.approx(best.item(), rel=1e-12)  # float64 rounding


def test_project_cds_is_the_least_squares_scale():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 2, 4, 1, generator=generator, dtype=torch.float64)
    i = torch.round(w * 5)
    cds = project_cds(w, i, torch.ones(3, dtype=torch.float64))
    for o in range(3):
        expected = torch.linalg.lstsq(i[o].reshape(-1, 1), w[o].reshape(-1, 1)).solution.item()
        assert cds[o].item() == pytest.approx(expected, rel=1e-10)  # float64 rounding


def test_exactly_representable_weights_are_recovered():
    generator = torch.Generator().manual_seed(1)
    vqk = torch.randint(-7, 8, (4, 64, 3, 3), generator=generator)
    vqk[:, ::32] = 7  # every block reaches its end, so that its scale can be told from its values
    m = torch.randint(1, 9, (4, 2, 3, 3), generator=generator)
    m[:, 0, 0, 0] = 8
    weight = 0.01 * m.repeat_interleave(32, 1) * vqk
    fitted = fit_weight(weight.float(), 4, 32)
    # alternation may settle in a nearby optimum for some channel; it must come within 0.1 % of the energy overall
    assert (fitted.weight() - weight).square().sum() < 1e-3 * weight.square().sum()


def test_error_falls_with_bits_and_eight_bits_are_almost_float():
    weight = torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(2))
    errors = [(fit_weight(weight, b, 32).weight() - weight).square().mean().item() for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    # a uniform grid of 255 steps over about +-3.5 sigma: step 0.027, noise step^2 / 12 = 6e-5 of the energy
    assert errors[-1] < 1e-4


def test_smaller_blocks_fit_better():
    weight = torch.randn(8, 64, 1, 1, generator=torch.Generator().manual_seed(3))
    weight *= torch.rand(8, 64, 1, 1, generator=torch.Generator().manual_seed(4)) ** 3
    errors = [(fit_weight(weight, 4, b).weight() - weight).square().sum().item() for b in (4, 16, 64)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("shape", [(3, 48, 3, 3), (2, 5, 1, 1), (4, 1, 5, 5)])
def test_ragged_and_tiny_shapes(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    fitted = fit_weight(weight, 4, 32)
    assert tuple(fitted.vqk.shape) == shape
    noise = (fitted.weight() - weight).square().sum() / weight.square().sum()
    assert noise < 0.02  # 4 bits: a step of about 0.35 sigma gives about 1 % noise


def test_blocks_round_trip_and_pad_with_zeros():
    weight = torch.arange(2 * 5 * 4.0).reshape(2, 5, 2, 2)
    blocks = to_blocks(weight, 3)
    assert tuple(blocks.shape) == (2, 2, 3, 4)
    assert blocks[:, 1, 2].abs().sum() == 0
    assert torch.equal(from_blocks(blocks, 5, 2, 2), weight)


def test_all_zero_channel_stays_zero():
    weight = torch.zeros(2, 8, 1, 1)
    weight[1] = 1.0
    fitted = fit_weight(weight, 4, 4)
    assert fitted.weight()[0].abs().sum() == 0
    assert torch.allclose(fitted.weight()[1], torch.ones(8, 1, 1), rtol=1e-6)  # one float32 rounding


def test_relieved_pairs_are_cut_at_their_larger_half():
    vqk = torch.tensor([100.0, 60, -127, -127, 127, -127, 1, 127])[None, None, :, None]
    assert relieve_pairs(vqk, 8).flatten().tolist() == [68, 60, -1, -127, 127, -127, 1, 127]
    assert relieve_pairs(vqk[:, :, :3], 8).flatten().tolist() == [64, 60, -64]  # no pairs: everyone stays at half
    assert torch.equal(relieve_pairs(vqk, 7), vqk)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("chi", [3, 5, 16, 48])
def test_no_fitted_pair_can_saturate_sixteen_bits(bits, chi):
    """255 * (w1 + w2) <= 32767, for weights of one sign and heavy tails too."""
    weight = torch.randn(6, chi, 3, 3, generator=torch.Generator().manual_seed(chi))
    for w in (weight, weight.abs(), weight**3):
        fitted = fit_weight(w, bits, chi if bits == 8 else 16)
        assert 255 * largest_pair(fitted.merged()) <= 32767
