"""The cost of cutting a value's upper end."""

from __future__ import annotations

import pytest
import torch

from dsconvert.fit.clipping import BELOW, LEAST_SHARE, LEVELS, PER_OCTAVE, clip_effects, effect_at


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
    """At each level rounded to float32, and the float32 on either side of it."""
    nearest = LEVELS.float()
    v = torch.cat((nearest, nearest.nextafter(torch.tensor(0.0)), nearest.nextafter(torch.tensor(1e9))))
    assert torch.equal(torch.bucketize(v, BELOW), torch.bucketize(v.double(), LEVELS))


def test_nothing_above_zero_costs_nothing():
    assert clip_effects(-torch.rand(10), torch.ones(10)).eq(0).all()
    assert clip_effects(torch.zeros(10), torch.ones(10)).eq(0).all()


def test_effects_are_read_off_between_levels():
    effects = torch.arange(len(LEVELS), dtype=torch.float64)
    assert effect_at(effects, float(LEVELS[20])) == pytest.approx(20)
    assert effect_at(effects, float(LEVELS[20]) * 2 ** (0.25 / PER_OCTAVE)) == pytest.approx(20.25)
    assert effect_at(effects, 0.0) == 0
    assert effect_at(effects, 1e9) == len(LEVELS) - 1
