"""The figures behind the report: known answers and brute force."""

from __future__ import annotations

import base64
import json

import cv2
import numpy as np
import pytest
import torch
from formats import free

from dsconvert.base.errors import InputError
from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.integer import grid_of
from dsconvert.graph.run import run_float
from dsconvert.report.activations import activation_view, watch
from dsconvert.report.gather import read_record
from dsconvert.report.layers import Layer, check_same_network, layer_rows, weight_view, worst_first
from dsconvert.report.photos import MOST_BYTES, alone, differing, load_photo, small_jpeg
from dsconvert.report.placing import Spot, place, text_width
from dsconvert.report.text import labels_of, plain
from dsconvert.scoring.coco import coco_tables, metrics_of
from dsconvert.scoring.curves import class_curves, mean_curve, object_counts
from dsconvert.yolo.lower import lower, split_detect


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 6)


A, NEAR_A, B = [0, 0, 10, 10, 0.9, 0], [0, 0, 10, 8, 0.8, 0], [50, 50, 60, 60, 0.7, 1]


def test_boxes_without_a_partner():
    for first, second, wanted in (
        (boxes(A, B), boxes(B, NEAR_A), ([False, False], [False, False])),  # IoU 0.8
        (boxes(A), boxes([*A[:5], 1]), ([True], [True])),  # another class
        (boxes(A), boxes([0, 0, 10, 4.9, 0.9, 0]), ([True], [True])),  # IoU 0.49
        (boxes(A), boxes([0, 0, 10, 5, 0.9, 0]), ([False], [False])),  # IoU 0.5
        (boxes(A), boxes(NEAR_A, A), ([False], [True, False])),  # one partner each, the closest
        (boxes(), boxes(A), ([], [True])),
        (boxes(A, B), boxes(), ([True, True], [])),
    ):
        assert [v.tolist() for v in alone(first, second)] == list(wanted)
    assert differing([boxes(A), boxes(B)], [boxes(A, B), boxes(B)]) == [1, 0]


def test_a_photo_shows_boxes_where_they_were_found(tmp_path):
    picture = np.full((40, 80, 3), (200, 30, 30), np.uint8)
    path = tmp_path / "red.png"
    cv2.imwrite(str(path), picture[..., ::-1])
    # in a square of 64 pixels the picture is 0.8 as large, below 16 rows of padding
    found = boxes([8, 16 + 8, 40, 16 + 24, 0.5, 1])
    photo = load_photo(path, 64, found, boxes())
    (box,) = photo.first
    assert (box.x, box.y, box.width, box.height, box.kind, box.alone) == (10, 10, 40, 20, 1, True)
    assert (photo.width, photo.height, photo.second) == (80, 40, ())
    kind, data = photo.uri.split(",")
    assert kind == "data:image/jpeg;base64"
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(shown.astype(int) - picture).max() <= 8  # JPEG's loss in a plain colour


def test_embedded_photos_are_bounded():
    noise = np.random.default_rng(0).integers(0, 256, (1200, 2400, 3), dtype=np.uint8)  # nothing compresses worse
    data, (h, w) = small_jpeg(noise)
    assert len(data) <= MOST_BYTES
    assert (w, h) == (2 * h, h)
    assert w <= 640
    with pytest.raises(InputError, match="small enough"):
        small_jpeg(noise, most=100)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_the_grid_fall_on_its_levels(bits):
    low, high = FREE.limits(bits)
    vqk = torch.arange(low, high + 1).repeat(4, 1)[:, :, None, None].to(torch.int8)
    m = torch.ones(4, 1, 1, 1, dtype=torch.int8)
    fitted = DSTensor(vqk, m, torch.tensor([0.5, 2.0, 0.0, 1e-3]), free(bits, vqk.shape[1]))
    view = weight_view("a", fitted.weight(), fitted)
    assert view.outside == 0
    assert view.levels.tolist() == list(range(low, high + 1))
    assert set(view.level_counts) == {3}  # a channel whose scale is 0 says nothing
    assert view.counts.sum() == 3 * (high - low + 1)
    assert len(view.counts) <= 200
    # no bin is luckier than another: each holds the same number of levels, or one in so many
    filled = view.counts[view.counts > 0]
    assert set(filled[:-1]) in ({3}, {3 * round(view.edges[1] - view.edges[0])})
    at = np.digitize(view.levels, view.edges) - 1
    assert (view.counts[at] > 0).all()


def test_blocks_shifts_and_what_lies_beyond():
    vqk = torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8)[:, :, None, None]
    m = torch.tensor([[3, 5]], dtype=torch.int8)[:, :, None, None]
    fitted = DSTensor(vqk, m, torch.tensor([0.25]), free(2, 2))
    exact = weight_view("a", fitted.weight(), fitted)
    centres = (exact.edges[:-1] + exact.edges[1:]) / 2
    assert centres[exact.counts > 0].tolist() == pytest.approx([-2, -1, 0, 1])
    beyond = fitted.weight() + torch.tensor([0.0, 0, 0, 0.25 * 5 * 0.6])[None, :, None, None]  # 1.6 steps
    assert weight_view("a", beyond, fitted).outside == 0.25


def test_layers_say_what_was_measured(tiny, converted):
    network, head = tiny
    _, params = split_detect(*lower(network.fused()), head)
    check_same_network(params, converted, "best.pt")
    rows = layer_rows(converted, params, {"model.1": 12.5}, {"model.2.cv1.conv": 33.0})
    for row, node in zip(rows, converted.graph.convs(), strict=True):
        weight, made = params[node.name].weight, converted.convs[node.name].weight.weight()
        db = 20 * np.log10(np.linalg.norm(weight) / np.linalg.norm(weight - made))
        assert row.weight_db == pytest.approx(12.5 if row.name == "model.1" else db, abs=1e-4)
        assert row.activation_db == (33.0 if row.name == "model.2.cv1" else None)
        assert row.damage is None
    assert worst_first(rows)[0].name == min(rows, key=lambda r: r.weight_db).name
    with pytest.raises(InputError, match="not the network"):
        check_same_network({k: v for k, v in params.items() if k != "model.1.conv"}, converted, "other.pt")


def test_shares_of_damage_are_of_four_bits_everywhere(tiny, converted):
    network, head = tiny
    _, params = split_detect(*lower(network.fused()), head)
    names = [n.name for n in converted.graph.convs()[1:3]]  # both have 4 bits
    damage = {names[0]: {"4": 3.0, "8": 0.5}, names[1]: {"4": 1.0, "8": 0.1}}
    converted.provenance["damage"] = damage
    rows = layer_rows(converted, params, {}, {})
    assert [(r.sensitivity, r.damage) for r in rows if r.damage is not None] == [(75, 75), (25, 25)]
    assert worst_first(rows)[0].name == names[0].removesuffix(".conv")
    converted.provenance["damage"] = {names[0]: {"4": "much"}}
    with pytest.raises(InputError, match="damaged"):
        layer_rows(converted, params, {}, {})


def test_activation_errors_by_brute_force(tiny, converted, picture):
    network, head = tiny
    _, params = split_detect(*lower(network.fused()), head)
    own = converted.activations
    found = watch(converted.graph, params, own, [picture])
    values: dict[str, torch.Tensor] = {}
    run_float(converted.graph, params, picture, lambda name, v: values.__setitem__(name, v.clone()))
    grids = grid_of(converted.graph, own)
    assert set(found) == {n.name for n in converted.graph.convs()}

    def on_grid(name, v):
        return ((v / grids[name].scale).round() + grids[name].zero_point).clamp(0, 255).sub(
            grids[name].zero_point
        ) * grids[name].scale  # fmt: skip

    def db(true, made):
        return 20 * np.log10(np.linalg.norm(true) / np.linalg.norm(true - made))

    conv = "model.2.cv1.conv"
    x, y = values[conv], values["model.2.cv1.act"]
    made = on_grid("model.2.cv1.act", torch.nn.functional.silu(on_grid(conv, x)))
    assert found[conv].db == pytest.approx(db(y, made), abs=1e-3)
    output = converted.graph.outputs[1]
    made = on_grid(output, values[output]).sigmoid()
    assert found[output].db == pytest.approx(db(values[output].sigmoid(), made), abs=1e-3)
    view = activation_view(conv, found[conv])
    assert view.counts.sum() == y.numel()
    assert view.high - view.low == pytest.approx(255 * view.step)
    inside = ((y >= view.low - view.step / 2) & (y <= view.high + view.step / 2)).double().mean()
    assert view.outside == pytest.approx(1 - float(inside))


def test_curves_are_those_the_metrics_are_made_of():
    rng = np.random.default_rng(3)
    truths, found = [], []
    for _ in range(6):
        corner = rng.uniform(0, 100, (5, 2))
        kinds = rng.choice([0, 2], 5)
        truth = np.column_stack((kinds, corner, corner + 20))
        truths.append(truth)
        moved = truth[:, 1:] + rng.normal(0, 2, (5, 4))
        found.append(np.column_stack((moved, rng.random(5), np.where(rng.random(5) < 0.8, kinds, 0))))
    tables = coco_tables(found, truths, [(200, 200)] * 6, 3)
    metrics, curves = metrics_of(tables, 6), class_curves(tables)
    assert {k: c.ap50_95 for k, c in curves.items()} == metrics.per_class
    assert set(curves) == {0, 2}  # class 1 has no objects
    for c in curves.values():
        assert len(c.precision) == 101
        assert c.ap50 == pytest.approx(np.mean(c.precision))
        assert list(c.precision) == sorted(c.precision, reverse=True)  # interpolated precision never rises
    mean = mean_curve(curves)
    assert (mean.ap50_95, mean.ap50) == pytest.approx((metrics.map50_95, metrics.map50))
    assert sum(object_counts(truths).values()) == 30
    with pytest.raises(ValueError, match="no class"):
        mean_curve({})


def test_record_beside_the_model(tmp_path):
    path = tmp_path / "quantize.json"
    assert read_record(path, {"a": 1}).sqnr_db == {}  # not there
    layers = [{"name": "x", "sqnr_db": 20.5}, {"name": "y", "sqnr_db": float("inf")}]
    path.write_text(
        json.dumps({"provenance": {"a": 1}, "layers": layers, "finetune": {"curve": [{"step": 1, "held_back": 0.5}]}})
    )
    record = read_record(path, {"a": 1})
    assert (dict(record.sqnr_db), record.finetune) == ({"x": 20.5}, ((1.0, 0.5),))
    assert read_record(path, {"a": 2}).sqnr_db == {}  # about another model
    for text in ("", "[]", '{"provenance": {"a": 1}, "layers": [{}]}', '{"provenance": {"a": 1}, "layers": 3}'):
        path.write_text(text)
        with pytest.raises(InputError, match="not a readable record"):
            read_record(path, {"a": 1})


def test_labels_lie_inside_and_apart():
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.uniform(-5, 300, (4, 2))
        spots = [Spot(*c, *rng.uniform(5, 80, 2)) for c in corners]
        for s in place(spots, ["kite 0.92"] * 4, 11, 320, 320):
            assert 0 <= s.x <= s.x + s.width <= 320
            assert 0 <= s.y <= s.y + s.height <= 320
    same = [Spot(100, 100, 40, 40)] * 4
    placed = place(same, ["a 0.50"] * 4, 11, 320, 320)
    corners = np.array([[s.x, s.y, s.width, s.height] for s in placed])
    assert all(s.covered(np.delete(corners, i, 0)) == 0 for i, s in enumerate(placed))
    assert text_width("日本", 10) > text_width("ab", 10)


def test_names_are_made_visible_and_short(tmp_path):
    assert plain("a\x1b[31mb\u202e\x00\ud800c\n") == "a�[31mb���c�"
    assert plain("naïve 犬 👍") == "naïve 犬 👍"
    assert len(plain("x" * 999)) == 80
    assert plain("abcdefgh", 5) == "ab…gh"
    assert labels_of([tmp_path / "a/m.onnx", tmp_path / "b/m.onnx"]) == ["a/m.onnx", "b/m.onnx"]
    assert labels_of([tmp_path / "a/m.onnx", tmp_path / "b/n.onnx"]) == ["m.onnx", "n.onnx"]


def test_layers_without_damage_are_ranked_by_noise():
    def layer(name, db, damage):
        return Layer(name, (1,), "DSConv", 4, 32, 1, 1, db, None, damage, damage)

    assert [r.name for r in worst_first([layer("a", 30, None), layer("b", 20, None)])] == ["b", "a"]
    assert [r.name for r in worst_first([layer("a", 30, 2.0), layer("b", 20, 1.0)])] == ["a", "b"]
