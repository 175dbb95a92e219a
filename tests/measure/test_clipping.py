"""The cost of cutting a value's upper end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsconvert.base import loops
from dsconvert.measure.clipping import COUNT, FIRST, LEAST_SHARE, LEVELS, SHIFT, clip_effects, effects_at


def test_effects_are_those_of_really_clipping():
    generator = torch.Generator().manual_seed(0)
    v, g = torch.randn(2, 1, 3, 20, 20, generator=generator).unbind()
    effects = clip_effects(v, g)
    v, g = v.double(), g.double()
    for level, effect in zip(LEVELS, effects, strict=True):
        if level >= LEAST_SHARE * v.max():
            wanted = ((v.clamp_max(level) - v) * g).sum() ** 2
            # float64 sums of 1200 terms, the larger ones cancelling
            assert effect.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-9)
    assert effects[v.max() < LEVELS].eq(0).all()


def test_floats_are_above_the_levels_that_doubles_are_above():
    """At each level, which is a float32, and the float32 on either side of it; and far beyond all."""
    level = LEVELS.float()
    ends = torch.tensor([1e-30, 1e30])
    v = torch.cat((level, level.nextafter(torch.tensor(0.0)), level.nextafter(torch.tensor(1e9)), ends))
    assert torch.equal(level.double(), LEVELS)
    values, gradient = v.numpy(), np.arange(1, 1 + len(v), dtype=np.float32)
    slope, total = np.zeros((2, COUNT + 1))
    loops.sum_by_level(values, values.view(np.int32), gradient, np.float32(0), SHIFT, FIRST, slope, total)
    level = torch.bucketize(v.double(), LEVELS).numpy()
    assert slope.tolist() == np.bincount(level, gradient, COUNT + 1).tolist()
    np.testing.assert_allclose(total, np.bincount(level, gradient * values.astype(np.float64), COUNT + 1), rtol=1e-12)


def test_nothing_above_zero_costs_nothing():
    assert clip_effects(-torch.rand(10), torch.ones(10)).eq(0).all()
    assert clip_effects(torch.zeros(10), torch.ones(10)).eq(0).all()


def test_effects_are_read_off_between_levels():
    effects = torch.arange(len(LEVELS), dtype=torch.float64)
    levels = torch.tensor([LEVELS[20], 0.75 * LEVELS[20] + 0.25 * LEVELS[21], 0.0, 1e9])
    assert effects_at(effects, levels).tolist() == pytest.approx([20, 20.25, 0, len(LEVELS) - 1])
