"""Warnings: none for what is usual, and for what is not, which option to change."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from dsconvert.convert.advice import advice, bits_of_layers
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.record import Quantized
from dsconvert.graph.grids import QParams
from dsconvert.scoring.compare import ScoreShift


@pytest.fixture
def make(converted):
    """A conversion with given images, options, damages by DSConv layer, errors and ranges."""

    def build(images=128, skipped=0, damage=(), sqnr=20.0, grids=None, scores=None, **options) -> Quantized:
        four_bits = [n for n, c in converted.convs.items() if c.weight.bits == 4]
        damages = {n: {"4/16": d} for n, d in zip(four_bits, damage, strict=False)}
        provenance = {"options": asdict(QuantizeOptions(**options)), "damage": damages}
        model = replace(converted, provenance=provenance, activations=grids or converted.activations)
        errors = dict.fromkeys(converted.convs, 20.0) | {four_bits[1]: sqnr}
        return Quantized(model, images, 0, 0, skipped, errors, scores or ScoreShift(0.7, 0.69, 5, 5))

    return build


def test_nothing_to_say_of_what_is_usual(make):
    assert advice(make(damage=[1, 1, 1, 1]), 128) == []
    assert advice(make(bits=4), 1000) == []
    assert advice(make(images=16), 0) == []  # synthesised: said elsewhere


def test_few_images_and_what_keeps_them_few(make):
    assert advice(make(images=32), 32) == []
    (more,) = advice(make(images=9, skipped=1), 10)
    assert "Only 9 calibration images" in more
    assert "give images about 100 photos" in more
    assert "leave out samples 9" in advice(make(images=8, skipped=1, samples=9), 500)[0]


def test_scores_that_shift_come_first(make):
    assert advice(make(scores=ScoreShift(0.73, 0.70, 9, 9)), 128) == []
    first, _ = advice(make(images=9, scores=ScoreShift(0.73, 0.61, 332, 305)), 9)
    assert first.startswith("The best score of an image is 0.73 on average with the float model and 0.61 with the")


def test_the_layer_that_does_most_of_the_damage(make):
    assert advice(make(damage=[2.9, 2.9, 2.9, 1.3]), 128) == []
    (most,) = advice(make(damage=[1, 7, 2]), 128)
    assert most.startswith("model.2.cv1, at 4 bits, is expected to cause 70 % of the loss; a target_size above")
    assert "above 0.90MB" in advice(make(damage=[1, 7, 2], target_bytes=900_000), 128)[0]


def test_with_a_target_for_the_loss_images_are_held_back_on_purpose(make):
    assert advice(make(images=96, target_drop=1.0), 128) == []
    assert "photos" in advice(make(images=9, target_drop=1.0), 12)[0]  # three of them held back
    (most,) = advice(make(damage=[1, 7, 2], target_drop=1.0), 128)
    assert "a target_map_drop below 1 gives it more bits" in most


def test_with_one_width_the_largest_error_speaks(make):
    assert advice(make(sqnr=10.0, bits=3), 128) == []
    (most,) = advice(make(sqnr=9.0, bits=3), 128)
    assert most.startswith("model.2.cv1 loses most: at 4 bits its weights are only 9.0 dB above their rounding error")
    assert "leave out bits 3" in most
    assert advice(make(sqnr=9.0, damage=[1, 1, 1, 1]), 128) == []  # where damage was measured it counts, not errors


def test_ranges_far_wider_than_the_others(make):
    grids = {f"model.{i}.act": QParams(0.01, 0) for i in range(5)}
    assert advice(make(grids=grids | {"model.9.conv": QParams(0.16, 0)}), 128) == []
    (wide,) = advice(make(grids=grids | {"model.9.conv": QParams(0.5, 0)}), 128)
    assert wide.startswith("The values of model.9 span 127.5, 50 times the usual range")
    assert "activations float" in wide
    (wide,) = advice(make(grids=grids | {"a": QParams(0.5, 0), "b": QParams(0.6, 0)}), 128)
    assert wide.startswith("The values of b (and of 1 other layers) span")
    assert advice(replace(make(), model=replace(make().model, activations={})), 128) == []  # activations float


def test_bits_are_counted(converted):
    four = sum(c.weight.bits == 4 for c in converted.convs.values())
    assert bits_of_layers(converted) == f"{four} with 4 bits"
