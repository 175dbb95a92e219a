"""The classification benchmark, one network and one width: what its table rests on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[bench]'")
import classification as bench

from dsconvert.dsconv.modules import DSConv


@pytest.fixture(scope="module")
def task():
    return bench.prepare(0, epochs=8)


@pytest.mark.long
def test_8_bits_are_float_2_bits_are_worse_and_training_the_shifts_recovers_a_part(task):
    wanted = task.accuracy(task.net)
    many = bench.measure(task, 8, 32, 1, 0)
    assert all(abs(many[name] - wanted) < 1 for name in ("plain", "images", "plain a8"))
    few = bench.measure(task, 2, 32, 40, 0)
    lost = wanted - few["plain"]
    assert lost > 4
    assert few["trained"] > few["plain"] + 0.3 * lost
    assert few["trained a8"] > few["plain a8"] + 0.3 * lost
    assert few["images"] > few["plain"] + 0.3 * lost


def test_training_moves_shifts_and_nothing_else(task):
    made = bench.quantize_module(task.net, [task.images[:64]], bench.ModulePlan(3, 8, fit="least_squares"))
    before = {n: v.clone() for n, v in made.state_dict().items()}
    torch.testing.assert_close(bench.trainable(made)(task.test[:8]), made(task.test[:8]))
    after = bench.train_shifts(task, made, 2, 0).state_dict()
    moved = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"alpha", "CDSw", "CDSb"}
    assert all(torch.equal(v, before[n]) for n, v in made.state_dict().items())
    assert sum(type(m) is DSConv for m in made.modules()) == 8
