"""VQK along a trellis: what a string of bits stands for, the nearest of all strings, and fits, against brute force."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from followed import followed
from formats import along, fit_weight, gptq, largest_pair, randn
from reference.torch_loops import expected

from dsconvert.dsconv.codes import TRELLIS, usual_format
from dsconvert.dsconv.codes import trellis_table as trellis
from dsconvert.dsconv.codes.trellis_search import Register, nearest_values, noise, round_strings, suited
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.moments import Moments
from dsconvert.graph.integer import QConv

BITS = [1, 2, 3, 4]


def codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def every_string(bits: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All strings (count, length), and their VQK."""
    code = np.array(list(product(range(1 << bits), repeat=length)), np.uint8)
    vqk = trellis.table(bits)[trellis.windows(torch.from_numpy(code), bits).numpy()]
    return code, vqk.astype(np.float64)


@pytest.mark.parametrize("bits", BITS)
def test_vqk_are_the_last_eight_bits_looked_up(bits):
    """The definition, digit by digit: block by block, tap by tap, channel by channel."""
    code = codes((3, 16, 2, 1), bits)
    found, book = along(bits, 8).values(code), trellis.table(bits)
    for o in range(3):
        digits = ""
        for block, tap, channel in product(range(2), range(2), range(8)):
            place = (o, 8 * block + channel, tap, 0)
            digits += format(int(code[place]), f"0{bits}b")
            assert int(found[place]) == book[int(digits[-8:], 2)]


def test_strings_come_back():
    x = torch.arange(2 * 32 * 3 * 3).reshape(2, 32, 3, 3)
    assert torch.equal(trellis.from_strings(trellis.strings(x, 16), x.shape, 16), x)
    assert trellis.strings(x, 16)[0, :17].tolist() == [9 * c for c in range(16)] + [1]  # then the next tap
    assert trellis.strings(x, 64).shape == (2, 288)


def test_more_bits_than_there_are_are_refused():
    with pytest.raises(ValueError, match="codes leave 2 bits"):
        along(2, 8).values(torch.full((1, 8, 1, 1), 4, dtype=torch.uint8))


@pytest.mark.parametrize(("bits", "length"), [(1, 10), (2, 6), (3, 4), (4, 3)])
def test_the_nearest_string_is_that_of_brute_force(bits, length):
    wanted, m = 3 * randn(6, length), randn(6, length, seed=1).abs() + 0.5
    code, vqk = nearest_values(wanted, m, Register.of(bits))
    _, every = every_string(bits, length)
    errors = np.square(m.numpy()[:, None] * (wanted.numpy()[:, None] - every)).sum(-1)
    own = np.square(m.numpy() * (wanted - vqk).numpy()).sum(-1)
    assert own == pytest.approx(errors.min(1), rel=1e-5)  # sums in float32
    read = trellis.table(bits)[trellis.windows(code, bits).numpy()]
    assert np.array_equal(read, vqk.numpy())


@pytest.mark.parametrize(("bits", "length"), [(1, 8), (2, 5), (4, 3)])
def test_a_group_is_rounded_to_little_more_than_the_least_error_under_h(bits, length):
    """With U^T U = H^-1 the errors' squares are the quadratic form of H. Of strings that meet in a state, that of least
    error so far is kept, which need not be that of least error in the end: so not always the best of all, but here
    (six output channels, three m) mostly."""
    a = np.random.default_rng(5).normal(size=(length, 4 * length))
    h = a @ a.T / length + 0.1 * np.eye(length)
    upper = torch.linalg.cholesky(torch.from_numpy(np.linalg.inv(h)), upper=True).float()
    w, tried = 6 * randn(6, length, seed=6), torch.tensor([[1.0, 2.0, 3.0]]).expand(6, 3)
    start = torch.zeros(6, dtype=torch.int64)
    m, windows = followed(w, upper, tried, tried[:, 0], length, start, bits)
    _, every = every_string(bits, length)
    found = Register.of(bits).values.flatten()[windows].numpy() * m.numpy()[:, None]
    hits = 0
    for o in range(6):
        d = w[o].numpy() - np.concatenate([k * every for k in (1, 2, 3)])
        least = float(((d @ h) * d).sum(1).min())
        own = w[o].numpy() - found[o]
        error = float(own @ h @ own)
        hits += error <= least * (1 + 1e-4)  # float32
        assert error < 1.5 * least + 1e-4
    assert hits >= 4


@pytest.mark.parametrize("bits", BITS)
def test_without_anything_to_make_up_for_gptq_is_the_nearest_string_of_one_m(bits):
    """H = 1: each group ends where the next begins, and looking ahead finds what one search over all columns does."""
    w = randn(5, 64)
    cds = torch.full((5,), 0.2, dtype=torch.float64)
    code, m = round_strings(w.double().numpy(), cds.numpy(), np.eye(64), 16, bits)
    spread = m.T.repeat_interleave(16, 1).float()
    vqk = trellis.table(bits)[trellis.windows(code, bits).numpy()]
    made = ((w - 0.2 * spread * torch.from_numpy(vqk.astype(np.float32))) ** 2).sum()
    _, best = nearest_values(w / (0.2 * spread), spread, Register.of(bits))
    least = ((w - 0.2 * spread * best) ** 2).sum()
    assert float(least) <= float(made) * (1 + 1e-5)  # float32
    assert float(made) < 1.05 * float(least)


@pytest.mark.parametrize(("bits", "decibels"), [(1, 5.1), (2, 10.6), (3, 16.3), (4, 21.8)])
def test_normal_weights_lose_little_more_than_theory_allows(bits, decibels):
    """Rate-distortion theory: 6.02 dB a bit. Free integers leave 8.2, 13.9 and 20 dB at 2, 3 and 4 bits, signs 4.4."""
    weight = randn(32, 64, 3, 3)
    fitted = fit_weight(weight, bits, 32, trellis=True)
    error = float((weight - fitted.weight()).square().sum() / weight.square().sum())
    assert decibels < -10 * np.log10(error) < 6.02 * (bits + 4 / 32)  # m says a little, too
    assert fitted.weight_bits == bits + 4 / 32


@pytest.mark.parametrize("bits", BITS)
def test_expected_errors_are_those_of_a_fit(bits):
    levels, errors = noise(bits)
    assert bool((np.diff(levels) > 0).all())
    wanted = 4 * randn(64, 128, seed=9)
    _, vqk = nearest_values(wanted, torch.ones_like(wanted), Register.of(bits))
    # other numbers than those it was measured with, which have longer tails
    assert float(expected(np.array(4.0), bits)) == pytest.approx(float((wanted - vqk).square().mean()), rel=0.25)
    assert float(expected(levels[-1:] + 10, bits)[0]) == pytest.approx(errors[-1] + 100)


def test_the_m_that_suits_grows_with_the_block():
    found = suited(np.array([[0.1, 2.0, 4.0, 9.0, 100.0]]), np.array([0.8]), 2)[0][0]
    assert found[0] == 1
    assert found[-1] == TRELLIS.most_m(2)
    assert bool((np.diff(found) >= 0).all())
    assert found[2] == 2 * found[1]


@pytest.mark.parametrize("bits", BITS)
def test_gptq_along_a_trellis_is_never_worse_than_least_squares_and_mostly_much_better(bits):
    weight = randn(8, 16, 3, 3)
    q = randn(144, 600, seed=1).double()
    q[1:] += 0.7 * q[:-1]  # inputs that go together, or there is nothing to make up for
    hessian, flat = q @ q.T / 600, weight.double().flatten(1)
    moments = Moments(hessian, flat @ hessian)
    damped = moments.damped(flat).hessian

    def j(t: DSTensor) -> torch.Tensor:
        d = (weight - t.weight()).double().flatten(1)
        return ((d @ damped) * d).sum(1)

    ours, plain = (gptq(weight, moments, bits, 16, trellis=True), fit_weight(weight, bits, 16, True))
    assert ours.format == along(bits, 16)
    assert bool((j(ours) <= j(plain) * (1 + 1e-6)).all())  # CDSw is rounded to float32
    assert float(j(ours).sum()) < 0.8 * float(j(plain).sum())


def test_what_is_no_weight_along_a_trellis_is_refused():
    good = fit_weight(randn(2, 8, 1, 1), 2, 8, trellis=True)
    for wrong in ({"stored": good.stored[:1]}, {"stored": good.vqk}, {"format": along(5, 8)}, {"format": along(2, 6)},
                  {"stored": good.stored + 4}, {"m": good.m[:1]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"trellis|KDS|CDSw|codes"):
            replace(good, **wrong)
    with pytest.raises(ValueError, match="12 channels in blocks of 8 have no trellis of 2 bits"):
        DSTensor(codes((1, 12, 1, 1), 2), torch.ones(1, 2, 1, 1, dtype=torch.int8), torch.ones(1), along(2, 8))


def test_layers_of_few_bits_lie_along_a_trellis_where_that_fits():
    assert usual_format(1, 64, 16) == along(1, 16)
    assert usual_format(4, 64, 32) == along(4, 32)
    assert usual_format(3, 24, 32) == along(3, 32)  # one block of 24
    others = ((5, 64, 16), (8, 64, 16), (2, 3, 16), (3, 48, 32), (2, 64, 4))
    assert not any(usual_format(*w).code == TRELLIS for w in others)


@pytest.mark.parametrize("bits", BITS)
def test_no_pair_along_a_trellis_can_saturate(bits):
    assert largest_pair(fit_weight(50 * randn(8, 32, 1, 1), bits, 16, trellis=True).merged()) <= 128
    assert 2 * trellis.largest(bits) * TRELLIS.most_m(bits) <= 128


@pytest.mark.parametrize("bits", BITS)
def test_a_channel_that_is_almost_its_bias_keeps_it(bits):
    """A bias beyond int32 in its own units: the channel becomes the bias, within what float32 holds of it."""
    weight = fit_weight(randn(2, 8, 1, 1), bits, 8, trellis=True)
    tiny = replace(weight, cds_w=torch.tensor([1e-12, 0.1]))
    kept = QConv(tiny, torch.tensor([3.0, 1.0])).with_room(0.01)
    assert torch.equal(kept.weight.vqk[1], weight.vqk[1])
    assert torch.equal(along(bits, 8).values(kept.weight.stored), kept.weight.vqk)
    assert kept.weight.cds_w[1] == tiny.cds_w[1]
    unit = 0.01 * float(kept.weight.cds_w[0])
    assert int(kept.bias_int(0.01)[0]) * unit == pytest.approx(3.0, rel=1e-6)
    # 255 for every input: what small VQK add is nothing beside it
    assert 255 * float(kept.weight.merged()[0].int().abs().sum()) * unit < 3.0 * 1e-4
    assert int(kept.largest_sum(0.01).max()) < 2**31


@pytest.mark.parametrize("bits", BITS)
def test_quiet_strings_have_small_vqk(bits):
    found = trellis.quiet(bits, 40)
    vqk = along(bits, 40).values(found.reshape(1, 40, 1, 1))
    assert int(vqk.abs().max()) <= 2  # of 7 to 21
