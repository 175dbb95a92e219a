"""Block floating point: by hand, and torch's simulation against integer arithmetic to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bfp import integer_dsconv, to_block_float
from blockfloat import run_block_float
from torch.nn import functional as F

from dsconvert.dsconv.tensor import expand_blocks
from dsconvert.graph.integer import real_params
from dsconvert.graph.run import run_float


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def test_by_hand():
    """Largest 6.0 = 0.75 * 2^3: with 4 bits a step is 2^(3 - 3) = 1, and 7 is the largest mantissa."""
    found = to_block_float(column(6.0, -1.4, 0.5, 0.3, 0.3, 0.0), 4, block_size=4)
    assert found.mantissa.flatten().tolist() == [6, -1, 0, 0, 5, 0]  # 0.5 rounds to even; 0.3 / 2^-4 = 4.8
    assert found.exponent.flatten().tolist() == [0, -4]
    assert found.real().flatten().tolist() == [6.0, -1.0, 0.0, 0.0, 5 / 16, 0.0]
    # 7.9 would round to 8, which has no place
    assert to_block_float(column(7.9), 4).mantissa.item() == 7
    assert to_block_float(torch.zeros(1, 3, 1, 1), 8).real().abs().max() == 0
    for bits in (2, 9):
        with pytest.raises(ValueError, match="mantissa"):
            to_block_float(column(1.0), bits)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_error_is_at_most_half_a_step_but_for_the_clipped(bits):
    x = torch.randn(2, 40, 5, 5, generator=torch.Generator().manual_seed(bits))
    found = to_block_float(x, bits)
    step = torch.ldexp(torch.ones_like(found.exponent).float(), found.exponent).repeat_interleave(32, 1)[:, :40]
    most = (1 << (bits - 1)) - 1
    inside = x.abs() <= most * step
    assert bool(((found.real() - x).abs() <= step / 2)[inside].all())
    assert bool(((found.real() - x).abs() <= step)[~inside].all())
    assert int(found.mantissa.abs().max()) == most
    again = to_block_float(found.real(), bits)
    assert torch.equal(again.real(), found.real())


@pytest.mark.parametrize(("kernel", "stride", "padding", "chi"), [(1, 1, 0, 32), (3, 1, 1, 40), (3, 2, 1, 70)])
def test_the_simulation_is_the_integer_arithmetic(kernel, stride, padding, chi):
    """Integers, and alpha of few bits: float64 holds every sum exactly, in whatever order."""
    g = torch.Generator().manual_seed(chi)
    x = to_block_float(torch.randn(2, chi, 7, 6, generator=g), 8)
    vqk = torch.randint(-8, 8, (5, chi, kernel, kernel), generator=g)
    alpha = torch.randint(1, 1024, (5, -(-chi // 32), kernel, kernel), generator=g).double() / 1024
    weight = vqk.double() * expand_blocks(alpha, chi, 32)
    simulated = F.conv2d(x.real().double(), weight, stride=stride, padding=padding)
    found = integer_dsconv(x, vqk.numpy().astype(np.int8), alpha.numpy(), stride, padding)
    assert np.array_equal(found, simulated.numpy())


def test_a_network_comes_closer_to_its_float_activations_with_every_bit(converted, picture):
    wanted = run_float(converted.graph, real_params(converted.convs), picture)
    errors = []
    for bits in (3, 4, 6, 8):
        found = run_block_float(converted.graph, converted.convs, picture, bits)
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3 * errors[0]  # five bits: a thousand times in squares, were it not for clipping
