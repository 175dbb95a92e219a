"""The bootstrap's shortcut against computing the metrics anew for every draw."""

from __future__ import annotations

import numpy as np
import pytest
from bootstrap import bootstrap, image_draws, match, mean_ap

from dsconvert.scoring.accuracy import Detections


@pytest.fixture
def found() -> Detections:
    """Two predictors over eight images of three classes: one finds shaken boxes, one fewer of them."""
    rng = np.random.default_rng(0)
    truths, good, poor = [], [], []
    for _ in range(8):
        n = int(rng.integers(1, 8))
        corner = rng.uniform(0, 200, (n, 2))
        boxes = np.concatenate((corner, corner + rng.uniform(20, 80, (n, 2))), 1)
        kinds = rng.integers(0, 3, (n, 1))
        truths.append(np.concatenate((kinds, boxes), 1).astype(np.float64))
        shaken = np.concatenate((boxes + rng.normal(0, 4, boxes.shape), rng.uniform(0, 1, (n, 1)), kinds), 1)
        stray = np.concatenate((boxes[::-1] + 15, rng.uniform(0, 0.6, (n, 1)), kinds), 1)
        good.append(np.concatenate((shaken, stray)).astype(np.float32))
        poor.append(good[-1][::2])
    return Detections([good, poor], truths, [(300, 300)] * 8, 3)


# means of float64 quotients of the same integers
EXACT = {"abs": 1e-9}


def test_weights_of_one_give_the_metric(found):
    for i, metrics in enumerate(found.metrics()):
        assert 0 < mean_ap(match(found, i), np.ones(8)) == pytest.approx(metrics.map50_95, **EXACT)


def test_weights_are_repeated_images(found):
    draw = [0, 0, 0, 2, 3, 5, 5, 7]
    weights = np.bincount(draw, minlength=8).astype(float)
    for i, metrics in enumerate(found.metrics(draw)):
        assert mean_ap(match(found, i), weights) == pytest.approx(metrics.map50_95, **EXACT)


def test_draws_are_paired(found):
    same = Detections([found.found[0], found.found[0], found.found[1]], found.truths, found.shapes, 3)
    samples = bootstrap(same, image_draws(len(same.truths), 20))
    assert np.array_equal(samples[:, 0], samples[:, 1])
    assert (samples[:, 0] > samples[:, 2]).mean() > 0.5
    assert samples[:, 0].std() > 0
