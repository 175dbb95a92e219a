"""The brief fine-tune: it mends what it can learn, keeps what it cannot, and says which."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

from dsconvert.base import workers
from dsconvert.convert.division import EACH, FEWEST, HELD_BACK, JUDGES, divided
from dsconvert.graph.integer import QConv
from dsconvert.graph.run import run_float
from dsconvert.measure.outputs import Detections
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel
from dsconvert.photos.dataset import calibration_images
from dsconvert.tune import distil as brief
from dsconvert.tune.distil import Pictures, distil
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.lower import lower, split_detect

SPOILED = "model.0.conv"


def pictures_of(count: int = 8) -> list[torch.Tensor]:
    """The smooth picture, moved along, (3, 64, 64) uint8."""
    own = (smooth_picture()[0] * 255).to(torch.uint8)
    return [own.roll((3 * i, 5 * i), (1, 2)) for i in range(count)]


def given(count: int = 8) -> Pictures:
    """The first pictures to learn from, others as judges."""
    images = pictures_of(count + 4)
    return Pictures(count, range(count), lambda i: images[i].float()[None] / 255, images[count:])


@pytest.fixture
def float_params(tiny, converted):
    """The float network's convolutions, as the converted model has them split."""
    network, head = tiny
    return split_detect(*lower(network.fused()), head)[1]


@pytest.fixture
def spoiled(converted) -> DSModel:
    """The converted model with one layer's CDSw a twentieth too large: an error that a factor mends."""
    conv = converted.convs[SPOILED]
    weight = replace(conv.weight, cds_w=conv.weight.cds_w * 1.05)
    return replace(converted, convs={**converted.convs, SPOILED: QConv(weight, conv.bias)})


def run(model, params, steps=24, seconds=None, pictures=None):
    outputs, quiet = Detections(model.head), lambda done, total: None
    return distil(model, params, outputs, pictures or given(), steps, seconds, 0, "cpu", quiet)


def test_the_error_is_that_of_scores_and_boxes(converted, float_params, picture):
    parts = {name: brief._as_parts(p) for name, p in float_params.items()}
    real = replace(converted, activations={})
    # float arithmetic in another order: the factor after the sum
    assert float(brief._errors(real, float_params, Detections(real.head), parts, picture)) == pytest.approx(0, abs=1e-8)
    other = {n: replace(p, bias=p.bias + 0.01) for n, p in parts.items()}
    raw = run_float(real.graph, float_params, picture)
    moved = {n: replace(p, bias=p.bias + 0.01) for n, p in float_params.items()}
    pairs = zip(
        detection_measure(raw, raw, real.head),
        detection_measure(run_float(real.graph, moved, picture), raw, real.head),
        strict=True,
    )
    expected = sum(float((a - b).square().sum()) for a, b in pairs)
    found = brief._errors(real, float_params, Detections(real.head), other, picture)
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_a_step_has_the_mean_gradient_of_its_images(spoiled, float_params):
    """Of two processes with a part of the images each, the gradients add up to those of one."""
    layers, latents = brief.start(spoiled, "shifts+bias", "cpu")
    latents = {name: u for name, u in latents.items() if not name.endswith(".m")}
    whole = given()

    def errors(x):
        parts = {name: layer.parts(name, latents) for name, layer in layers.items()}
        return brief._errors(spoiled, float_params, Detections(spoiled.head), parts, x)

    def gradients(pictures, picks):
        loss = brief._step(errors, latents, pictures, picks)
        return loss, {name: u.grad.clone() for name, u in latents.items()}

    loss, found = gradients(whole, [1, 5])
    alone = [errors(whole.one(i)).item() for i in (1, 5)]
    assert loss == pytest.approx(sum(alone) / 2, rel=1e-5)
    first, second = (
        gradients(replace(whole, mine=mine, one=lambda i, mine=mine: whole.one(mine.start + i)), [1, 5])
        for mine in (range(4), range(4, 8))
    )
    assert first[0] + second[0] == pytest.approx(loss, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(first[1][name] + second[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_it_mends_a_layer_that_is_off(spoiled, float_params, monkeypatch):
    monkeypatch.setattr(brief, "RATE", 0.01)  # a twentieth within 24 steps
    made = run(spoiled, float_params)
    assert made.kept > 0
    assert made.gain > made.uncertainty > 0
    assert made.gain == pytest.approx(made.curve[0].held_back - min(look.held_back for look in made.curve), rel=1e-6)
    for name, conv in made.model.convs.items():
        before = spoiled.convs[name].weight
        assert torch.equal(conv.weight.vqk, before.vqk)
        assert torch.equal(conv.weight.m, before.m)
    ratio = made.model.convs[SPOILED].weight.cds_w / spoiled.convs[SPOILED].weight.cds_w
    assert float(ratio.mean()) < 0.99


def test_what_does_not_help_leaves_the_fit_as_it_was(spoiled, float_params, monkeypatch):
    monkeypatch.setattr(brief, "RATE", 0.5)
    monkeypatch.setattr(brief, "BIAS_RATE", 50.0)
    made = run(spoiled, float_params)
    assert made.kept == 0
    assert made.model is spoiled
    assert len(made.curve) > 1


def test_nothing_is_learned_where_activations_do_most_of_the_error(converted, float_params, monkeypatch):
    monkeypatch.setattr(brief, "WORTHWHILE", 1.0)
    made = run(converted, float_params, steps=None)
    assert not made.tried
    assert made.model is converted
    assert made.activations > 0
    assert run(converted, float_params, steps=1).tried  # whoever names steps gets them
    monkeypatch.setattr(brief, "WORTHWHILE", 0.0)
    monkeypatch.setattr(brief, "TURNS", 1)
    assert run(converted, float_params, steps=None).curve[-1].step == 8 // brief.IMAGES


def test_the_time_ends_it(spoiled, float_params):
    assert run(spoiled, float_params, seconds=1e-9).curve[-1].step == 1
    assert run(spoiled, float_params, steps=2, seconds=1e9).curve[-1].step == 2


def test_any_number_of_threads_learns_the_same(spoiled, float_params, monkeypatch):
    monkeypatch.setattr(brief, "RATE", 0.01)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(model_bytes(run(spoiled, float_params, steps=4).model))
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("available", "samples", "target", "fit", "held", "judges"),
    [
        (FEWEST - 1, 256, False, FEWEST - 1, 0, 0),  # too few to miss any
        (FEWEST, 256, False, FEWEST - FEWEST // EACH, 0, FEWEST // EACH),
        (600, 600, False, 600 - JUDGES, 0, JUDGES),
        (300, 256, False, 256, 0, JUDGES),  # those beyond the samples cost the fit nothing
        (16 + JUDGES, 16, False, 16, 0, JUDGES),
        (15 + JUDGES, 16, False, 16, 0, 0),
        (40, 256, True, 30, 10, 10),  # the target's judges serve both
    ],
)
def test_who_learns_and_who_judges(available, samples, target, fit, held, judges):
    made = divided([f"{i:03}.png" for i in range(available)], samples, target, True)
    assert tuple(map(len, (made.fit, made.target, made.judges))) == (fit, held, judges)
    assert not set(made.fit) & {*made.target, *made.judges}
    without = divided([f"{i:03}.png" for i in range(available)], samples, target, False)
    assert without.judges == ()
    taken = min(available, samples)
    assert len(without.fit) == taken - (taken // HELD_BACK if target else 0)


def write_photographs(folder, count):
    folder.mkdir()
    for i, image in enumerate(pictures_of(count)):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / f"{i:02}.png")


def test_quantize_notes_what_it_did(work, call):
    write_photographs(work / "photos", 4 + JUDGES)
    options = ["quantize", "best.pt", "--calib", "photos", "--imgsz", "64", "--samples", "4", "--bits", "2"]
    told = call(*options, "--finetune-steps", "3", "--out", "tuned", cwd=work)
    noted = json.loads((work / "tuned/quantize.json").read_text())["finetune"]
    assert noted["images_held_back"] == JUDGES
    assert [look["step"] for look in noted["curve"]] == [0, 3]
    assert "Fine-tuning, 3 steps" in told.out
    assert load_model(work / "tuned/model.safetensors").provenance["options"]["finetune_steps"] == 3
    told = call(*options, "--finetune-time", "0", "--out", "plain", cwd=work)
    assert json.loads((work / "plain/quantize.json").read_text())["finetune"] is None
    assert "ine-tuning" not in told.out
    refused = call(*options, "--finetune-steps", "-1", "--out", "no", cwd=work)
    assert refused.code == 2


def test_one_judge_is_not_enough(work, call):
    """It has no standard error; the others cannot be read."""
    write_photographs(work / "photos", 4 + JUDGES)
    taken = divided(calibration_images(work / "photos"), 4, False, True)
    for path in taken.judges[1:]:
        path.write_bytes(b"no picture")
    options = ["quantize", "best.pt", "--calib", "photos", "--imgsz", "64", "--samples", "4", "--bits", "2"]
    assert call(*options, "--finetune-steps", "3", "--out", "q", cwd=work).code == 0
    assert json.loads((work / "q/quantize.json").read_text())["finetune"] is None


def test_processes_are_one(spoiled, float_params, monkeypatch):
    """With everything in the first of two processes, sums are those of one."""
    alone = run(spoiled, float_params, steps=2)
    monkeypatch.setattr(workers, "count", lambda: 2)
    monkeypatch.setattr(workers, "summed", lambda tensor: tensor)
    monkeypatch.setattr(workers, "gathered", lambda value: [value, value])
    assert model_bytes(run(spoiled, float_params, steps=2).model) == model_bytes(alone.model)
