"""From an ONNX graph to ours: each way of spelling something, as torch's exporter does it, is the operation that it is,
and the graph computes what the file computes."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from spellings import SIDE, Between, Decoded, Focus, Gate, Heads, Shuffle, source_of
from torch import nn
from torch.nn import functional as F

from dsconvert.convert.onnx_int8 import taken_apart
from dsconvert.graph.run import run_float
from dsconvert.measure.importance import gradients
from dsconvert.onnxfile.lower import Lowered, NotLowered
from dsconvert.onnxfile.meaning import in_steps, score_kinds
from dsconvert.onnxfile.source import read_source

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def operations(low: Lowered) -> Counter[str]:
    return Counter(n.attrs["kind"] if n.op == "act" else n.op for n in low.graph.nodes if n.op != "conv")


def halves_joined(x):
    return torch.cat((x[:, :4], x[:, 4:].relu()), 1)


# what stands between two convolutions, and what it is in the graph
FOUND = {
    "SiLU": (nn.SiLU(), {"SiLU": 1}),
    "Hardswish": (nn.Hardswish(), {"Hardswish": 1}),
    "Hardswish spelled out": (lambda x: x * F.relu6(x + 3) / 6, {"Hardswish": 1}),
    "HardSigmoid spelled out": (lambda x: F.relu6(x + 3) / 6, {"HardSigmoid": 1}),
    "Mish": (nn.Mish(), {"Mish": 1}),
    "GELU": (nn.GELU(), {"GELU": 1}),
    "LeakyReLU": (nn.LeakyReLU(0.1), {"LeakyReLU": 1}),
    "ReLU6": (nn.ReLU6(), {"relu": 1}),
    "two activations": (lambda x: F.silu(F.relu(x)), {"relu": 1, "SiLU": 1}),
    "halves joined": (halves_joined, {"select": 2, "relu": 1, "concat": 1}),
    "halves turned": (lambda x: torch.cat((x[:, 4:], x[:, :4]), 1), {"select": 1}),
    "as it was": (lambda x: torch.cat(x.chunk(2, 1), 1).reshape(1, 8, SIDE, SIDE), {}),
    "shuffle": (Shuffle(), {"select": 1}),
    "two shuffles": (nn.Sequential(Shuffle(), Shuffle()), {"select": 1}),
    "gate": (Gate(), {"mean": 1, "relu": 1, "HardSigmoid": 1, "product": 1}),
    "residual": (lambda x: x + F.silu(x), {"SiLU": 1, "add": 1}),
    "max pooling": (nn.MaxPool2d(3, 2, 1), {"maxpool": 1}),
    "means": (nn.AvgPool2d(3, 2, 1), {"mean_pool": 1}),
    "means of what lies inside": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), {"mean_pool": 1}),
    "twice as large": (nn.Upsample(scale_factor=2), {"upsample": 1}),
    "between pixels": (nn.Upsample(scale_factor=2, mode="bilinear"), {"resize": 1}),
    "half as large": (nn.Upsample(scale_factor=0.5, mode="bilinear"), {"mean_pool": 1}),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_is_between_two_convolutions_is_what_it_does(what, tmp_path):
    function, wanted = FOUND[what]
    source, x = source_of(Between(function), tmp_path)
    _, low = taken_apart(source, x)  # which holds the graph against the file
    assert operations(low) == wanted
    assert low.exits == (source.model.graph.output[0].name,)
    assert not low.tail


def test_attention_is_found_with_its_own_channels(tmp_path):
    source, x = source_of(Between(Heads(), 8, 4), tmp_path)
    _, low = taken_apart(source, x)
    assert operations(low) == {"select": 3, "uneven_attention": 1}
    (node,) = (n for n in low.graph.nodes if n.op == "uneven_attention")
    assert node.attrs == {"heads": 2, "size": 1, "value": 2}
    parts = {n.name: n.attrs["channels"] for n in low.graph.nodes if n.op == "select"}
    assert [parts[name] for name in node.inputs] == [[0, 4], [1, 5], [2, 3, 6, 7]]


def test_attention_on_another_scale_stays_as_it_is(tmp_path):
    source, x = source_of(Between(Heads(3.0), 8, 4), tmp_path)
    _, low = taken_apart(source, x)
    assert operations(low) == {"island": 1}
    assert low.stayed["Softmax"] == 1


def test_a_focus_layer_and_its_convolution_are_one_of_every_second_pixel(tmp_path):
    source, x = source_of(Focus(), tmp_path)
    _, low = taken_apart(source, x)
    (node,) = low.graph.nodes
    assert node.attrs == {"stride": 2, "padding": 2, "dilation": 1, "groups": 1}
    assert low.params[node.name].weight.shape == (4, 3, 6, 6)


def test_a_matrix_behind_a_map_is_a_convolution_of_the_whole_map(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(980, 7), nn.ReLU(), nn.Linear(7, 2))
    source, x = source_of(net, tmp_path)
    _, low = taken_apart(source, x)
    shapes = [tuple(low.params[n.name].weight.shape) for n in low.graph.convs()]
    assert shapes == [(5, 3, 3, 3), (7, 5, 14, 14), (2, 7, 1, 1)]
    assert len(low.flat) == 1


def test_batchnorm_and_factors_go_into_the_convolution(tmp_path):
    """By hand: convolution, BatchNormalization, a factor and a term for each channel, ReLU, convolution."""
    rng = np.random.default_rng(0)

    def stored(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((rng.random(shape) + 0.5).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], ["n"]),
        helper.make_node("Mul", ["n", "f"], ["t"]), helper.make_node("Add", ["g", "t"], ["u"]),
        helper.make_node("Relu", ["u"], ["r"]), helper.make_node("Conv", ["r", "w2"], ["y"]),
    ]  # fmt: skip
    tensors = [stored("w", 4, 3, 1, 1), *(stored(n, 4) for n in "sbmv"), stored("f", 4, 1, 1), stored("g", 1, 4, 1, 1),
               stored("w2", 2, 4, 1, 1)]  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 8, 8]) for n, c in (("x", 3), ("y", 2))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "net.onnx"
    )
    source = read_source(tmp_path / "net.onnx", None, 1)
    _, low = taken_apart(source, rng.random((1, 3, 8, 8)).astype(np.float32))
    assert [n.op for n in low.graph.nodes] == ["conv", "relu", "conv"]


def test_decoding_stays_float_from_the_last_convolutions_on(tmp_path):
    source, x = source_of(Decoded(), tmp_path)
    facts, low = taken_apart(source, x)
    assert len(low.graph.convs()) == 3
    assert sorted(facts.shape(name)[1] for name in low.exits) == [3, 16]
    assert low.stayed["Softmax"] == low.stayed["Sigmoid"] == low.stayed["Conv"] == 1
    mean, every = 4 * 4, 8 * 27 + 19 * 8 + 4 * 4  # multiplications a pixel
    assert low.float_share == pytest.approx(mean / every, rel=1e-6)


def test_what_the_graph_cannot_express_is_named(tmp_path):
    source, x = source_of(Between(lambda x: x.cumsum(2)), tmp_path)
    with pytest.raises(NotLowered, match="CumSum"):
        taken_apart(source, x)


def test_one_value_under_two_names_is_scaled_once(tmp_path):
    """Two outputs of one convolution: each is read back in its own unit, by the same steps."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return y, y.reshape(1, 2, 2, SIDE, SIDE).reshape(1, 4, SIDE, SIDE)

    source, x = source_of(Twice(), tmp_path)
    facts, low = taken_apart(source, x)
    run = partial(run_float, low.graph, low.params)
    stepped, maps = in_steps(low, score_kinds(facts, low), [torch.from_numpy(x)])
    for e, value, made in zip(
        maps.exits, run(torch.from_numpy(x)), run_float(stepped.graph, stepped.params, torch.from_numpy(x)), strict=True
    ):
        assert torch.allclose(e.real(made), value, atol=1e-5)


def test_names_inside_of_a_nodes_own_graph_are_left_alone(tmp_path):
    """A tail with an If, whose branches read what only they know."""
    branch = [
        helper.make_graph(
            [
                helper.make_node("Constant", [], [f"{n}k"], value=numpy_helper.from_array(np.float32(n == "a"))),
                helper.make_node("Add", ["c", f"{n}k"], [f"{n}s"]),
            ],
            n,
            [],
            [helper.make_tensor_value_info(f"{n}s", TensorProto.FLOAT, None)],
        )
        for n in "ab"
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["high"]),
        helper.make_node("If", ["high"], ["y"], then_branch=branch[0], else_branch=branch[1]),
    ]
    weight = np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32)
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(0), "zero")]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 8, 8]) for n, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "net.onnx"
    )
    source = read_source(tmp_path / "net.onnx", None, 1)
    _, low = taken_apart(source, np.random.default_rng(1).random((1, 3, 8, 8)).astype(np.float32))
    assert low.exits == ("c",)
    assert low.stayed["If"] == 1


def normed(x):
    """A normalisation of channels as ConvNeXt has it."""
    return F.layer_norm(x.permute(0, 2, 3, 1), (8,), torch.linspace(0.5, 1.5, 8)).permute(0, 3, 1, 2)


def tokens(x):
    """Attention whose queries are scaled pixel by pixel, which the graph's own does not know."""
    n, c, h, w = x.shape
    t = x.flatten(2).transpose(1, 2)
    return (
        (((t * t.mean(2, keepdim=True).exp()) @ t.transpose(1, 2)).softmax(2) @ t).transpose(1, 2).reshape(n, c, h, w)
    )


# what stays float between two convolutions
ISLANDS = {
    "PReLU": nn.PReLU(8, 0.3),
    "LeakyReLU of another slope": nn.LeakyReLU(0.2),
    "ELU": nn.ELU(0.7),
    "CELU and more": lambda x: F.selu(x) * F.softsign(x) + torch.sin(x).abs().sqrt(),
    "a power": lambda x: (x.abs() + 0.1) ** 1.5 / (x.square() + 1).log().exp(),
    "larger one and smaller one": lambda x: torch.maximum(x, 0.1 * x.flip(1)) - torch.minimum(x, -x),
    "normalised channels": normed,
    "normalised maps": nn.InstanceNorm2d(8, affine=True),
    "tokens": tokens,
    "transposed convolution": nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1, groups=8),
    "transposed convolution by groups": nn.ConvTranspose2d(8, 8, 2, 2, groups=4),
    "pixels from channels": Between(nn.PixelShuffle(2), 8, 2),
    "uneven padding": lambda x: F.pad(x, (1, 0, 2, 1)),
    "uneven strides": nn.MaxPool2d((2, 1), (2, 1)),
    "means of uneven windows": nn.AvgPool2d((3, 1), (2, 1), (1, 0), count_include_pad=False),
    "an uneven convolution": nn.Conv2d(8, 8, (1, 3), (1, 2), (0, 1)),
    "sums and extremes": lambda x: x - x.mean(1, keepdim=True) + x.amax((2, 3), keepdim=True) - x.sum(1, keepdim=True),
    "slices": lambda x: torch.cat((x[:, :, 1::2], x[:, :, ::2]), 2)[:, [3, 1, 2, 0, 7, 6, 5, 4]].clamp(-0.4, 0.3),
}


@pytest.mark.parametrize("between", ISLANDS.values(), ids=ISLANDS)
def test_what_the_graph_does_not_know_stays_float_between_grids(between, tmp_path):
    """With its gradient, which shows that what stands before it matters."""
    source, x = source_of(between if isinstance(between, Between) else Between(between), tmp_path)
    _, low = taken_apart(source, x)  # which holds the graph against the file
    (island,) = (n for n in low.graph.nodes if n.op == "island")
    assert len(low.graph.convs()) == 2
    assert set(low.stayed) == {n.op_type for n in island.attrs["part"].nodes}
    several = torch.cat((torch.from_numpy(x), torch.rand(2, *x.shape[1:])))
    alone = torch.cat([run_float(low.graph, low.params, one[None])[0] for one in several])
    torch.testing.assert_close(run_float(low.graph, low.params, several)[0], alone)
    found = gradients(low.graph, low.params, several[:1], lambda raw, _: raw, torch.Generator())
    assert float(found[low.graph.convs()[0].name][1].abs().sum()) > 0


def test_most_of_a_network_in_float_is_no_integer_file(tmp_path):
    """A convolution with uneven windows, which holds most of the multiplications."""
    source, x = source_of(Between(nn.Conv2d(8, 64, (1, 31), padding=(0, 15)), made=64), tmp_path)
    with pytest.raises(NotLowered, match="% of its multiplications"):
        taken_apart(source, x)


def test_spellings_of_older_files(tmp_path):
    """Axes, splits and limits as attributes, depths from channels, and a mean by Gemm."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Elu", ["a"], ["b"]),
        helper.make_node("Split", ["b"], ["c", "d"], axis=1, split=[3, 1]),
        helper.make_node("Clip", ["c"], ["e"], min=-0.1, max=0.2),
        helper.make_node("Concat", ["e", "d"], ["f"], axis=1),
        helper.make_node("DepthToSpace", ["f"], ["g"], blocksize=2),
        helper.make_node("SpaceToDepth", ["g"], ["h"], blocksize=2),
        helper.make_node("Unsqueeze", ["h"], ["i"], axes=[1]),
        helper.make_node("Squeeze", ["i"], ["j"], axes=[1]),
        helper.make_node("ReduceMean", ["j"], ["k"], axes=[2, 3]),
        helper.make_node("Mul", ["j", "k"], ["l"]),
        helper.make_node("Conv", ["l", "v"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    stored = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n)
              for n, s in (("w", (4, 3, 1, 1)), ("v", (2, 4, 1, 1)))]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 8])], stored,
    )  # fmt: skip
    path = tmp_path / "old.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=7), path)
    source = read_source(path, None, 1)
    _, low = taken_apart(source, rng.random((1, 3, 8, 8)).astype(np.float32))
    assert [n.op for n in low.graph.nodes] == ["conv", "island", "conv"]
