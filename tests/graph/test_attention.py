"""Attention: the arithmetic of the block, its folded layers, and what the commands make of it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import convert, randomise, smooth_picture
from tables import SHORT, meta, parameters, yolov5
from torch.nn import functional as F

from dsconvert.base.errors import InputError
from dsconvert.graph.integer import run_integer
from dsconvert.graph.ir import INPUT, Graph, Node
from dsconvert.graph.ops import attention
from dsconvert.graph.shapes import check_node, value_shapes
from dsconvert.tune.latents import start
from dsconvert.tune.simulate import simulate
from dsconvert.yolo.attention import QKV, TransformerBlock, TransformerLayer
from dsconvert.yolo.lower import lower
from dsconvert.yolo.network import Network, head_from_detect
from dsconvert.yolo.plan import choose_convs

TWO = Node("attention", "a", ("q", "k", "v"), {"heads": 2, "size": 3})


def test_by_hand():
    """One head of one channel over two pixels: q = (0, log 3), k = (0, 1), v = (1, 5). The first query sees both keys
    alike, the second the second key three times as much."""
    node = Node("attention", "a", ("q", "k", "v"), {"heads": 1, "size": 1})
    q, k, v = (torch.tensor(x).reshape(1, 1, 1, 2) for x in ([0.0, math.log(3)], [0.0, 1.0], [1.0, 5.0]))
    torch.testing.assert_close(attention(node, [q, k, v]).flatten(), torch.tensor([3.0, 4.0]))


def test_it_is_torchs():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 4, 5, generator=g) for _ in range(3))
    tokens = [x.reshape(2, 2, 3, 20).transpose(2, 3) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*tokens).transpose(2, 3).reshape(2, 6, 4, 5)
    torch.testing.assert_close(attention(TWO, [q, k, v]), wanted)


def test_folded_layers_are_the_block():
    """float32 rounds the products of two layers once more: 1e-5 of the largest number."""
    torch.manual_seed(0)
    layer = TransformerLayer(8).eval()
    tokens = torch.randn(6, 2, 8)
    p = layer.projections()
    q, k, v = ((tokens @ w.T + b).permute(1, 2, 0)[..., None] for w, b in (p[name] for name in QKV))
    node = Node("attention", "a", ("q", "k", "v"), {"heads": 4, "size": 2})
    seen = attention(node, [q, k, v])[..., 0].permute(2, 0, 1)
    x = tokens + seen @ p["out"][0].T + p["out"][1]
    torch.testing.assert_close(x + x @ p["fc"][0].T, layer(tokens), rtol=0, atol=1e-5)


def test_channels_that_the_heads_do_not_share_evenly_are_refused():
    with pytest.raises(ValueError, match="6 channels for 4 heads"):
        TransformerBlock(6, 1)


def test_a_map_that_takes_too_much_memory_is_one_sentence():
    large = torch.zeros(1, 1, 256, 256).expand(1, 6, 256, 256)
    with pytest.raises(InputError, match="over 256 by 256 pixels"):
        attention(TWO, [large] * 3)


@pytest.mark.parametrize(
    ("inputs", "attrs"),
    [(2, TWO.attrs), (3, {"heads": 0, "size": 3}), (3, {"heads": 2}), (3, {"heads": 2, "size": 3.0})],
)
def test_nodes_that_cannot_be_run_are_refused(inputs, attrs):
    with pytest.raises(ValueError, match=r"(inputs|attributes|heads|size) of a"):
        check_node(Node("attention", "a", ("q", "k", "v")[:inputs], attrs))


@pytest.mark.parametrize("channels", [(6, 6, 6), (6, 6, 4), (4, 4, 4)])
def test_maps_that_the_heads_do_not_fit_are_refused(channels):
    convs = [Node("conv", name, (INPUT,), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}) for name in "qkv"]
    graph = Graph((*convs, TWO), ("a",))
    weights = {name: (c, 3, 1, 1) for name, c in zip("qkv", channels, strict=True)}
    if channels == (6, 6, 6):
        assert value_shapes(graph, weights, (3, 4, 5))["a"] == (6, 4, 5)
        return
    with pytest.raises(ValueError, match="shapes at a"):
        value_shapes(graph, weights, (3, 4, 5))


def test_yolov5s_transformer_has_as_many_parameters_as_the_trees():
    """As YOLOv5 prints them for its models/hub/yolov5s-transformer.yaml, of 80 classes."""
    assert parameters(meta(yolov5(0.33, 0.5, deepest="C3TR"))) == 7_235_645


def test_its_layers_are_those_of_a_bottleneck():
    """`--scope bottleneck` converts what stands in their place."""
    config, _ = SHORT["attention"]
    network = Network(config, 3, 3).eval()
    randomise(network)
    graph, _ = lower(network.fused())
    names = choose_convs(network, graph, "4", "bottleneck")
    inner = {f"model.4.m.tr.{i}.{part}" for i in (0, 1) for part in (*QKV, "out", "fc")}
    assert names == {"model.4.m.linear", *inner}


def test_training_runs_on_the_exported_files_numbers_and_reaches_what_attention_reads():
    """What differs is rounded to the other side of a tie, in few places; gradients go through the softmax."""
    config, strides = SHORT["attention"]
    network = Network(config, 3, 3).eval()
    randomise(network)
    network.requires_grad_(False)
    x = smooth_picture()
    model = convert(network, head_from_detect(network.detect, strides, ["a", "b", "c"]), x)
    layers, latents = start(model, "shifts", "cpu")
    parts = {name: layer.parts(name, latents) for name, layer in layers.items()}
    found = simulate(model.graph, parts, model.activations, x)
    wanted = run_integer(model.graph, model.convs, model.activations, x)
    for name, f, w in zip(model.graph.outputs, found, wanted, strict=True):  # less than two steps of the map's own grid
        assert float((f.detach() - w).abs().mean()) < 2 * model.activations[name].scale
    torch.stack([f.square().mean() for f in found]).sum().backward()
    for part in QKV:
        assert float(latents[f"model.4.m.tr.0.{part}.cdsw"].grad.abs().max()) > 0
