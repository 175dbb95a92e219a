"""Importance: gradients with a known answer, and samples that keep weighted sums."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dsconvert.fit import draws
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.shapes import value_shapes
from dsconvert.measure import importance
from dsconvert.measure.clipping import clip_effects
from dsconvert.measure.importance import Part, gradients, measure_importance
from dsconvert.yolo.decode import decode, detection_measure
from dsconvert.yolo.lower import lower, split_detect

POINT = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
CHAIN = Graph((Node("conv", "a", (INPUT,), POINT), Node("act", "b", ("a",), {"kind": "ReLU"}),
               Node("conv", "c", ("b",), POINT)), ("c",))  # fmt: skip
PARAMS = {
    "a": ConvParams(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1), torch.zeros(2)),
    "c": ConvParams(torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1), torch.zeros(1)),
}


def test_gradients_are_the_chain_rule_up_to_sign():
    x = torch.tensor([[[[1.0, -2.0]]]])
    found = gradients(CHAIN, PARAMS, x, lambda raw, _: [2 * raw[0]], torch.Generator().manual_seed(0))
    assert found["c"][1].abs().flatten().tolist() == [2, 2]
    assert found["b"][1].abs()[0, :, 0].tolist() == [[6, 6], [10, 10]]
    # ReLU lets through channel 0 at the first pixel and channel 1 at the second
    assert found["a"][1].abs()[0, :, 0].tolist() == [[6, 0], [0, 10]]


def test_mean_squared_gradient_is_the_gauss_newton_diagonal():
    """Two results that pull on one value: the cross term averages out over random signs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(1, 1, 1, 1)
    squares = [
        gradients(CHAIN, PARAMS, x, lambda raw, _: [2 * raw[0], 7 * raw[0]], generator)["c"][1].square().item()
        for _ in range(400)
    ]
    # values are 25 or 81, each half the time: 4 + 49 in the mean, with a deviation of 28 / 20 over 400 draws
    assert sum(squares) / 400 == pytest.approx(53, abs=5 * 28 / 20)


def test_positions_are_the_root_of_the_squared_gradients_over_channels():
    x = torch.tensor([[[[1.0, -2.0]]]])
    found = measure_importance(CHAIN, PARAMS, [x, x], lambda raw, _: [2 * raw[0]], seed=0)
    assert [found.drawn["a"].get(i).weights.tolist() for i in range(2)] == [[6, 10], [6, 10]]
    assert [found.drawn["a"].get(i).picks.tolist() for i in range(2)] == [[0, 1], [0, 1]]
    assert found.drawn["a"].outputs(1).tolist() == [[1, -2], [-1, 2]]
    # one channel's gradient at a time: 6 and 10 long, in both images
    wanted = torch.tensor([[12.0, 0.0], [0.0, 20.0]])
    torch.testing.assert_close(found.channels["a"], wanted)  # square roots in float32
    assert CHAIN.activated() == {"a": "b"}


def test_an_image_draws_the_same_wherever_it_is_looked_at():
    """Two processes with a part of the images each find together what one finds."""
    images = [torch.randn(1, 1, 60, 60, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def measure(mine, first):
        part = Part(first, len(mine), 3)
        return measure_importance(CHAIN, PARAMS, mine, lambda raw, _: [raw[0].square()], 7, part=part)

    whole, parts = measure(images, 0), [measure(images[:1], 0), measure(images[1:], 1)]
    for name, (values, weights) in whole.samples.items():
        assert torch.equal(values, torch.cat([p.samples[name][0] for p in parts]))
        assert torch.equal(weights, torch.cat([p.samples[name][1] for p in parts]))
    assert not torch.equal(measure(images[1:], 0).samples["a"][0], parts[1].samples["a"][0])  # draws of other images


def test_thorough_images_stand_for_the_others(monkeypatch):
    """Only they have samples that weigh, and all squares are theirs; every image has positions."""
    monkeypatch.setattr(importance, "THOROUGH", 3)
    monkeypatch.setattr(importance, "MANY", 0)
    images = [torch.full((1, 1, 1, 2), float(i + 1)) for i in range(6)]

    def measure(images, first):
        part = Part(first, len(images), 6)
        return measure_importance(CHAIN, PARAMS, images, lambda raw, _: [raw[0]], 0, ["c"], part)

    found = measure(images, 0)
    values, weights = found.samples["c"]
    assert values[weights > 0].unique().tolist() == [3, 9, 15]
    assert values[weights == 0].unique().tolist() == [3, 6, 9, 12, 15, 18]
    assert len(found.drawn["c"].places) == 6
    single = [measure(images[i : i + 1], i).squares["c"] for i in (0, 2, 4)]  # the draws belong to an image
    torch.testing.assert_close(found.squares["c"], 2 * torch.stack(single).sum(0))


def test_clipping_is_judged_on_every_image_whose_gradient_is_whole(tiny, picture, monkeypatch):
    """Of two images one is looked at thoroughly; the way back through the other ends before the last convolutions."""
    monkeypatch.setattr(importance, "THOROUGH", 1)
    monkeypatch.setattr(importance, "MANY", 0)
    monkeypatch.setattr(importance, "BRIEFLY", 0)
    network, head = tiny
    graph, params = split_detect(*lower(network.fused()), head)
    images = [picture, picture.flip(3) * 0.5]

    def measure(raw, reference):
        return detection_measure(raw, reference, head)

    found = measure_importance(graph, params, images, measure, 0)
    single = [gradients(graph, params, x, measure, draws.of_image(0, i)) for i, x in enumerate(images)]
    readers = graph.consumers()
    for name, effects in found.clipping.items():
        each = [clip_effects(*values[name]) for values in single]
        whole = name in graph.outputs or all(r.name in graph.outputs for r in readers[name])
        # as many as one thorough image; sums of float32, which cancel where an effect is small
        wanted = sum(each) / 2 if whole else each[0]
        torch.testing.assert_close(effects, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()) + 1e-12)
        both = torch.cat([values[name][0].flatten() for values in (single if whole else single[:1])])
        assert torch.stack(torch.aminmax(found.samples[name][0])).tolist() == torch.stack(torch.aminmax(both)).tolist()


@pytest.mark.parametrize(("images", "apart"), [(1, 1), (127, 1), (128, 2), (256, 4), (512, 8), (1024, 11)])
def test_more_images_are_looked_at_thoroughly_of_more(images, apart):
    assert importance.every(images) == apart


def test_of_many_images_only_the_last_layers_have_a_gradient(tiny, picture, monkeypatch):
    """Every layer still has positions: coarse maps by the mean square of finer ones' lengths."""
    monkeypatch.setattr(importance, "BRIEFLY", 0)
    network, head = tiny
    graph, params = split_detect(*lower(network.fused()), head)
    shapes = value_shapes(graph, {n: tuple(p.weight.shape) for n, p in params.items()}, tuple(picture.shape[1:]))
    start = importance.way_back(graph, shapes, *picture.shape[2:], 1)
    assert {node.name for node in graph.nodes[start:]} == set(graph.outputs)
    generator = torch.Generator().manual_seed(3)
    found = gradients(graph, params, picture, lambda a, b: detection_measure(a, b, head), generator, start)
    at = partial(torch.Generator().manual_seed, 5)
    drawn = importance._Look.at_gradients(graph, found, at, 1 << 30, start).drawn
    read = sorted({name for node in graph.nodes[start:] for name in node.inputs}, key=lambda n: -shapes[n][1])
    total = sum(float(found[name][1].square().sum()) / (shapes[name][1] * shapes[name][2]) for name in read)
    for node in graph.nodes[:start]:
        if node.op == "conv":
            weights = drawn[node.name][0].weights
            assert len(weights) == shapes[node.name][1] * shapes[node.name][2]
            assert float(weights.square().mean()) == pytest.approx(total, rel=1e-4)  # sums of float32


def test_early_layers_take_the_gradient_behind_them(tiny, picture):
    """Its size is the same as on the whole way back where that ends; layers before it have that size, spread out."""
    network, head = tiny
    graph, params = split_detect(*lower(network.fused()), head)
    shapes = value_shapes(graph, {n: tuple(p.weight.shape) for n, p in params.items()}, tuple(picture.shape[1:]))
    start = importance.behind_early(graph, shapes, *picture.shape[2:])
    assert 0 < start < len(graph.nodes) // 2
    cells = (picture.shape[2] // 8) * (picture.shape[3] // 8)
    assert all(shapes[n.name][1] * shapes[n.name][2] > cells for n in graph.nodes[:start])

    def found(start):
        generator = torch.Generator().manual_seed(3)
        return gradients(graph, params, picture, lambda a, b: detection_measure(a, b, head), generator, start)

    whole, cut = found(0), found(start)
    for index, node in enumerate(graph.nodes):
        torch.testing.assert_close(cut[node.name][0], whole[node.name][0])
        if index >= start:
            torch.testing.assert_close(cut[node.name][1], whole[node.name][1])
    (border,) = {name for n in graph.nodes[start:] for name in n.inputs} & {n.name for n in graph.nodes[:start]}
    torch.testing.assert_close(cut[border][1], whole[border][1])
    length = importance.length_of(cut[border][1])
    first = graph.convs()[0].name
    assert not len(cut[first][1])
    at = partial(torch.Generator().manual_seed, 5)
    places, outputs = importance._Look.at_gradients(graph, cut, at, 1 << 30, start).drawn[first]
    scale = shapes[first][1] // length.shape[0]
    spread = length.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    torch.testing.assert_close(places.weights.float(), spread.flatten())
    torch.testing.assert_close(outputs, whole[first][0][0].flatten(1))


def test_any_number_of_threads_finds_the_same(tiny, picture):
    network, head = tiny
    graph, params = split_detect(*lower(network.fused()), head)
    images = [picture, picture.flip(2), picture.flip(3), picture.flip(2, 3)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            names = [n.name for n in graph.convs()]
            found.append(
                measure_importance(graph, params, images, lambda a, b: detection_measure(a, b, head), 0, names)
            )
    finally:
        torch.set_num_threads(before)
    one, three = found
    for name, square in one.squares.items():
        assert torch.equal(square, three.squares[name])
        assert torch.equal(one.channels[name], three.channels[name])
        for index in range(len(images)):
            mine, theirs = (found.drawn[name] for found in (one, three))
            assert all(torch.equal(a, b) for a, b in zip(mine.get(index), theirs.get(index), strict=True))
            assert torch.equal(mine.outputs(index), theirs.outputs(index))
    for name, (values, weights) in one.samples.items():
        assert torch.equal(values, three.samples[name][0])
        assert torch.equal(weights, three.samples[name][1])


@pytest.mark.parametrize("searched", [1 << 16, 5000])
def test_samples_are_unbiased_and_hold_the_extremes(monkeypatch, searched):
    monkeypatch.setattr(importance, "SAMPLES_PER_IMAGE", 2000)
    monkeypatch.setattr(importance, "SEARCHED", searched)  # 5000: the 10 000 values are thinned out first
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 100, 100, generator=generator)
    found = measure_importance(CHAIN, PARAMS, [x], lambda raw, _: [raw[0].square()], seed=0)
    values, weights = found.samples["c"]
    y = gradients(CHAIN, PARAMS, x, lambda raw, _: [raw[0].square()], generator)["c"][0]
    assert values.min() == y.min()
    assert values.max() == y.max()
    for f in (torch.ones_like, lambda v: (v > 1).float()):
        # the weights are 4 y^2; the draw of 2000 is good to a few per cent
        wanted = (4 * y.square() * f(y)).sum().item()
        assert (weights * f(values)).sum().item() == pytest.approx(wanted, rel=0.1)


def test_split_detect_changes_no_number(tiny, picture):
    from dsconvert.graph.run import run_float

    network, head = tiny
    graph, params = lower(network.fused())
    apart, parts = split_detect(graph, params, head)
    assert len(apart.outputs) == 3 * len(graph.outputs)
    whole, split = (run_float(g, p, picture) for g, p in ((graph, params), (apart, parts)))
    # the same products, summed by another kernel choice
    torch.testing.assert_close(decode(split, head), decode(whole, head), rtol=1e-5, atol=1e-4)
    for a, b in zip(detection_measure(split, split, head), detection_measure(whole, whole, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_measure_weighs_boxes_by_their_score(tiny, picture):
    _, head = tiny
    raw = [torch.zeros(1, 21, 2, 2), torch.zeros(1, 21, 1, 1)]
    scored = [t.clone() for t in raw]
    scored[0].unflatten(1, (3, 7))[0, 0, 4:6] = 3.0  # one anchor is sure of class 0
    moved = [t.clone() for t in scored]
    moved[0].unflatten(1, (3, 7))[:, :, 0] += 0.1
    before, after = (detection_measure(t, scored, head)[1] for t in (scored, moved))
    shift = (after - before)[0, :, 0]
    # the weight is the root of objectness * class
    sure, unsure = (torch.tensor(3.0).sigmoid() ** 2).sqrt(), 0.5
    ratio = float(shift[0, 0, 0] / shift[1, 0, 0])
    sizes = [head.anchors[0][a][0] for a in (0, 1)]
    assert ratio == pytest.approx(float(sure / unsure) * max(sizes[1], 4) / max(sizes[0], 4), rel=1e-3)
