"""What benchmarks/arm.py says of outputs: integers are equal or not, floats are apart by so much."""

from __future__ import annotations

import sys

import numpy as np
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import arm


def test_a_single_integer_is_seen():
    one = {"map": np.zeros((1, 2, 3), np.uint8), "boxes": np.ones((1, 2, 7), np.float32)}
    assert [wrong for _, wrong, _ in arm.differences(one, one, 64)] == [False, False]
    other = {name: value.copy() for name, value in one.items()}
    other["map"][0, 1, 2] = 1
    assert [(name, wrong) for name, wrong, _ in arm.differences(one, other, 64)] == [("map", True), ("boxes", False)]


def test_floats_are_shares_of_the_number_and_pixels_of_the_side():
    one = {"boxes": np.full((1, 1, 7), 2, np.float32)}
    other = {"boxes": one["boxes"].copy()}
    other["boxes"][..., 0] += 6.4
    ((_, wrong, apart),) = arm.differences(one, other, 64)
    assert not wrong
    assert abs(apart - 0.1) < 1e-6
    other = {"boxes": one["boxes"].copy()}
    other["boxes"][..., 6] += 0.5
    ((_, _, apart),) = arm.differences(one, other, 64)
    assert abs(apart - 0.25) < 1e-6


def test_another_shape_is_wrong():
    ((_, wrong, _),) = arm.differences({"x": np.zeros(3, np.uint8)}, {"x": np.zeros(4, np.uint8)}, 64)
    assert wrong


def test_the_emulator_plays_the_processor_that_it_is_told(tmp_path):
    command = arm.play(arm.PROCESSORS[1], tmp_path)
    assert command[0] == arm.QEMU
    assert "cortex-a76" in command
    said = (tmp_path / "proc/cpuinfo").read_text()
    assert "0xd0b" in said
    assert "asimddp" in said
