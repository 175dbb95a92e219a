"""The network definitions: published sizes, fusion, equivalences, lowering, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from conftest import DEMO, TINY, randomise
from tables import yolov7_tiny

from dsconvert.base.errors import InputError
from dsconvert.graph.ir import Graph
from dsconvert.graph.run import run_float
from dsconvert.yolo.decode import decode
from dsconvert.yolo.lower import lower
from dsconvert.yolo.modules import SPP, SPPF, Conv, Focus
from dsconvert.yolo.network import Head, Network


def yolov5(depth: float, width: float) -> dict:
    config = yaml.safe_load((DEMO / "model.yaml").read_text())
    return {**config, "depth_multiple": depth, "width_multiple": width}


@pytest.mark.parametrize(
    ("depth", "width", "parameters"),
    # the parameter counts published with YOLOv5 v6.0 for 80 classes: 1.9, 7.2 and 21.2 million
    [(0.33, 0.25, 1_872_157), (0.33, 0.50, 7_235_389), (0.67, 0.75, 21_190_557)],
)
def test_parameter_counts_are_the_published_ones(depth, width, parameters):
    network = Network(yolov5(depth, width), nc=80, na=3)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_fused_equals_unfused(tiny, picture):
    network, _ = tiny
    before = network(picture)
    fused = network.fused()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    for a, b in zip(before, fused(picture), strict=True):
        # the same sums with the scale inside the weights: float32 rounding through 12 layers
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, yolov7_tiny(2, 0.125)], ids=["YOLOv5", "YOLOv7"])
def test_fusing_leaves_the_network_as_it_was(config, picture):
    """In training mode even, and with convolutions that IDetect's fusing would write into."""
    network = Network(config, 2, 3)
    randomise(network)
    before, modules = copy.deepcopy(network.state_dict()), [type(m) for m in network.modules()]
    fused = network.fused()
    assert network.training
    assert not fused.training
    assert [type(m) for m in network.modules()] == modules
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    own = {t.data_ptr() for t in network.state_dict().values()}
    assert not own & {t.data_ptr() for t in fused.state_dict().values()}  # what changes one does not change the other
    again = fused.fused()
    assert all(torch.equal(a, b) for a, b in zip(again(picture), fused(picture), strict=True))


def test_one_conv_fuses_to_float32_rounding():
    conv = Conv(3, 4, 3)
    conv.bn.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    conv.bn.running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 9.0]))
    conv.eval()
    x = torch.rand(1, 3, 8, 8)
    before = conv(x)
    conv.fuse()
    assert torch.allclose(conv(x), before, rtol=1e-6, atol=1e-6)  # a few float32 roundings


def test_sppf_is_spp():
    spp, sppf = SPP(16, 16), SPPF(16, 16)
    sppf.load_state_dict(spp.state_dict())
    x = torch.rand(1, 16, 20, 20)
    assert torch.equal(spp.eval()(x), sppf.eval()(x))


def test_focus_takes_the_four_phases():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    focus = Focus(1, 4, 1)
    seen = []
    focus.conv.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    focus(x)
    assert [seen[0][0, c].flatten().tolist() for c in range(4)] == [
        [0, 2, 8, 10], [4, 6, 12, 14], [1, 3, 9, 11], [5, 7, 13, 15],
    ]  # fmt: skip


V5 = {**TINY, "backbone": [[-1, 1, "Focus", [32, 3]], *TINY["backbone"][1:4], [-1, 1, "SPP", [160, [5, 9, 13]]]]}


@pytest.mark.parametrize("config", [TINY, V5])
@pytest.mark.parametrize("act", ["SiLU", "LeakyReLU", "Hardswish", "ReLU"])
def test_lowered_graph_computes_the_network(config, act, picture):
    network = Network(config, 2, 3, act).eval()
    randomise(network)
    network = network.requires_grad_(False).fused()
    graph, params = lower(network)
    for a, b in zip(network(picture), run_float(graph, params, picture), strict=True):
        assert torch.equal(a, b)  # the very same operations
    assert Graph.from_json(graph.to_json()) == graph


def test_decode_by_hand():
    head = Head(("a",), (8,), (((10.0, 20.0), (30.0, 40.0)),))
    raw = torch.zeros(1, 12, 1, 2)
    raw[0, 6 + 0, 0, 1] = 100.0  # second anchor, second column: sigmoid(x) = 1
    out = decode([raw], head)
    assert out.shape == (1, 4, 6)
    # sigmoid(0) = 0.5: xy = (1 - 0.5 + cell) * 8, wh = anchor, scores 0.5
    assert out[0, 0].tolist() == [4, 4, 10, 20, 0.5, 0.5]
    assert out[0, 1].tolist() == [12, 4, 10, 20, 0.5, 0.5]
    assert out[0, 3].tolist() == [(2 - 0.5 + 1) * 8, 4, 30, 40, 0.5, 0.5]


def bad(**changes) -> dict:
    return {**TINY, **changes}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "no usable"),
        (bad(width_multiple=0), "impossible"),
        (bad(head=[]), "not Detect"),
        (bad(backbone=[[-1, 1, "CBAM", [64]]]), "CBAM is not supported"),
        (bad(backbone=[[5, 1, "Conv", [64]]]), "not before it"),
        (bad(backbone=[[-1, 1, "Conv", [-64, 3]]]), "gives -64, which is not a number"),
        (bad(backbone=[[-1, 1, "Conv", ["__import__('os')", 3]]]), "does not know"),
        (bad(backbone=["Conv"]), "not \\[from"),
        (bad(backbone=[[-1, 1, "nn.Upsample", [None, 2, "bilinear"]]]), "does not know"),
    ],
)
def test_unusable_configs_are_refused(config, words):
    with pytest.raises(InputError, match=words):
        Network(config, 2, 3)
