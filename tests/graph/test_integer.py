"""The integer executor against plain numpy integers and float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from formats import fit_weight, free

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.activations import GATES, activation_table
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv, grid_of, integer_conv, integer_step, real_between, run_integer
from dsconvert.graph.ir import INPUT, Graph, Node

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 1, 2)])
def test_conv_is_exact_integer_arithmetic(stride, padding, groups):
    node = Node("conv", "c", ("x",), {"stride": stride, "padding": padding, "dilation": 1, "groups": groups})
    weight = fit_weight(torch.randn(4, 4 // groups, 3, 3, generator=torch.Generator().manual_seed(0)), 4, 2)
    source, target = QParams(0.02, 7), QParams(0.05, 120)
    conv = QConv(weight, torch.tensor([0.1, -0.2, 0.3, 0.0]))
    q = torch.from_numpy(RNG.integers(0, 256, (1, 4, 6, 6)).astype(np.float32))
    out = integer_conv(node, q, conv, source, target).numpy()

    x = np.pad(q.numpy().astype(np.int64) - 7, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    w = weight.merged().numpy().astype(np.int64)
    bias = conv.bias_int(source.scale).numpy().astype(np.int64)
    for o, r, c in np.ndindex(out.shape[1:]):
        first = (o // (4 // groups)) * (4 // groups)
        patch = x[0, first : first + 4 // groups, r * stride : r * stride + 3, c * stride : c * stride + 3]
        acc = int((patch * w[o]).sum() + bias[o])
        multiplier = np.float32(np.float32(source.scale) * weight.cds_w[o].numpy()) / np.float32(target.scale)
        wanted = np.clip(np.rint(np.float32(acc) * multiplier) + 120, 0, 255)
        assert out[0, o, r, c] == wanted


def test_what_is_real_between_is_rounded_once_behind_the_activation():
    """Against float64: the convolution's accumulator in its own unit, SiLU, and one rounding."""
    conv_node = Node("conv", "c", (INPUT,), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    graph = Graph((conv_node, Node("act", "a", ("c",), {"kind": "SiLU"}), Node("maxpool", "m", ("a",), {
        "kernel": 1, "stride": 1, "padding": 0})), ("m",))  # fmt: skip
    weight = fit_weight(torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(1)), 4, 2)
    convs = {"c": QConv(weight, torch.tensor([0.3, -0.2, 0.0]))}
    grids = {INPUT: QParams(1 / 255, 0), "c": QParams(0.1, 90), "a": QParams(0.01, 30)}
    own = real_between(graph, grids)
    assert set(own) == {INPUT, "a"}
    assert set(grid_of(graph, own)) == {INPUT, "a", "m"}
    image = torch.from_numpy(RNG.integers(0, 256, (1, 3, 5, 5)).astype(np.float32)) / 255
    found = run_integer(graph, convs, own, image)[0].numpy()

    q = np.rint(image.numpy().astype(np.float64) * 255)
    unit = weight.cds_w.numpy().astype(np.float64)[:, None, None] / 255
    acc = np.einsum("oi,bihw->bohw", weight.merged().numpy()[..., 0, 0].astype(np.float64), q)
    x = (acc + convs["c"].bias_int(1 / 255).numpy()[:, None, None]) * unit
    wanted = np.clip(np.rint(x / (1 + np.exp(-x)) / 0.01) + 30, 0, 255)
    # float32 may round a tie the other way, which a second rounding, on the grid of 0.1, would do by steps of ten
    assert np.abs(found / 0.01 + 30 - wanted).max() < 1.001
    assert np.mean(np.rint(found / 0.01 + 30) != wanted) < 0.05
    twice = run_integer(graph, convs, grids, image)[0].numpy()
    assert np.mean(np.rint(twice / 0.01 + 30) != wanted) > 0.5


def test_bias_is_in_accumulator_units():
    weight = fit_weight(torch.ones(1, 1, 1, 1), 8, 1)
    bias = QConv(weight, torch.tensor([1.0])).bias_int(0.5)
    assert bias.dtype == torch.int32
    assert bias.item() == round(1.0 / (0.5 * weight.cds_w.item()))


@pytest.mark.parametrize("kind", ["SiLU", "ReLU", "LeakyReLU", "Hardswish"])
def test_activation_table_is_within_a_step_of_the_real_function(kind):
    source, target = QParams(0.05, 100), QParams(0.04, 20)
    table = activation_table(kind, source, target).astype(np.float64)
    x = (np.arange(256) - 100) * 0.05
    real = {
        "SiLU": x / (1 + np.exp(-x)),
        "ReLU": np.maximum(x, 0),
        "LeakyReLU": np.where(x > 0, x, 0.1 * x),
        "Hardswish": x * np.clip(x + 3, 0, 6) / 6,
    }[kind]
    wanted = np.clip(real / 0.04 + 20, 0, 255)
    # half a step of rounding; a gate is itself on a 1/255 grid: |x| / 510 more, at most 0.4 steps here
    assert np.abs(table - wanted).max() < 0.5 + (0.4 if kind in GATES else 0.001)


def test_leaky_relu_is_onnx_runtimes_to_the_last_integer():
    """All 256 inputs on 64 pairs of grids, where ONNX Runtime fuses them to its int8 kernel, and where it does not."""
    rng = np.random.default_rng(2)
    b, wanted = OnnxBuilder(13), []
    for i in range(64):
        source = QParams.of_range(-float(rng.uniform(0, 8)), float(rng.uniform(0.1, 8)))
        target = QParams.of_range(-float(rng.uniform(0, 1)), float(rng.uniform(0.1, 8)))
        pair = [[b.scalar(g.scale), b.constant(np.array(g.zero_point, np.uint8))] for g in (source, target)]
        real = b.node("DequantizeLinear", ["q", *pair[0]], f"d{i}")
        real = b.node("LeakyRelu", [real], f"y{i}", alpha=0.1)
        b.node("QuantizeLinear", [real, *pair[1]], f"out{i}")
        wanted.append(activation_table("LeakyReLU", source, target))
    joined = b.node("Concat", [f"out{i}" for i in range(64)], "joined", axis=0)
    b.node("Cast", [joined], "all", to=onnx.TensorProto.FLOAT)
    model = b.model({"q": (1, 256)}, {"all": (64, 256)}, {}, onnx.TensorProto.UINT8)
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = running.run(None, {"q": np.arange(256, dtype=np.uint8)[None]})[0]
        assert np.array_equal(found, np.array(wanted))


def test_add_and_concat_requantize_to_the_target_grid():
    a, b, out = QParams(0.1, 10), QParams(0.03, 0), QParams(0.12, 40)
    qa = torch.from_numpy(RNG.integers(0, 256, 500).astype(np.float32))
    qb = torch.from_numpy(RNG.integers(0, 256, 500).astype(np.float32))
    exact = (qa.double() - 10) * 0.1 / 0.12 + qb.double() * 0.03 / 0.12 + 40
    # float32 rounding can only tip values that are within 1e-4 of a tie
    clear = ((exact % 1) - 0.5).abs() > 1e-4
    got = integer_step(Node("add", "o", ("a", "b")), [qa, qb], {}, {"a": a, "b": b, "o": out})
    assert torch.equal(got[clear].double(), exact.round().clamp(0, 255)[clear])
    node = Node("concat", "o", ("a", "b"))
    x = qa.reshape(1, 1, 20, 25)
    joined = integer_step(node, [x, x], {}, {"a": a, "b": out, "o": out})
    assert torch.equal(joined[:, 1:], x)  # same grid: untouched
    assert torch.equal(joined[:, :1], (((x - 10) * 0.1 / 0.12).round() + 40).clamp(0, 255))


def test_moving_ops_share_their_input_grid():
    pool = Node("maxpool", "p", (INPUT,), {"kernel": 3, "stride": 1, "padding": 1})
    up = Node("upsample", "u", ("p",), {"scale": 2})
    grid = QParams(1 / 255, 0)
    assert grid_of(Graph((pool, up), ("u",)), {INPUT: grid}) == {INPUT: grid, "p": grid, "u": grid}


def test_sums_beyond_the_exact_integers_of_float32_are_exact():
    """3000 products of up to 255 * 127 reach 9e7, where float32 counts in steps of eight."""
    node = Node("conv", "c", ("x",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    generator = torch.Generator().manual_seed(0)
    vqk = torch.randint(1, 128, (4, 3000, 1, 1), generator=generator, dtype=torch.int8)
    weight = DSTensor(vqk, torch.ones(4, 1, 1, 1, dtype=torch.int8), torch.full((4,), 1e-3), free(8, 3000))
    # output steps of one accumulator unit around the sums: the last bit of every sum shows
    source = QParams(1.0, 3)
    q = torch.from_numpy(RNG.integers(0, 256, (1, 3000, 1, 1)).astype(np.float32))
    sums = ((q.long() - 3) * vqk.long().squeeze()[:, :, None, None]).sum(1).flatten()
    assert int(sums.min()) > 1 << 24
    shift = torch.tensor([float(100 - s) for s in sums], dtype=torch.float64) * 1e-3
    conv = QConv(weight, shift)
    bias = conv.bias_int(1.0).long()
    assert int((sums + bias).abs().max()) < 256  # small again after the bias: what was lost before cannot hide
    out = integer_conv(node, q, conv, source, QParams(1e-3, 0)).flatten()
    assert out.tolist() == (sums + bias).clamp(0, 255).tolist()


def test_a_channel_whose_bias_has_no_int32_becomes_that_bias():
    """A channel switched off by its BatchNorm keeps its offset: at the scale of its weights it would be clamped."""
    node = Node("conv", "c", ("x",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    vqk = torch.tensor([[7, -3], [5, 5], [0, 0]], dtype=torch.int8)[:, :, None, None]
    weight = DSTensor(vqk, torch.ones(3, 1, 1, 1, dtype=torch.int8), torch.tensor([0.01, 1e-12, 1e-20]), free(4, 2))
    conv = QConv(weight, torch.tensor([0.5, -0.75, 0.25]))
    source, target = QParams(0.02, 10), QParams(0.01, 128)
    assert conv.bias_int(0.02).tolist()[1:] == [-(2**31), 2**31 - 1]  # clamped: the bias is lost
    roomy = conv.with_room(0.02)
    assert int(roomy.largest_sum(0.02).max()) < 2**31
    q = torch.from_numpy(RNG.integers(0, 256, (1, 2, 3, 3)).astype(np.float32))
    out = integer_conv(node, q, roomy, source, target)
    assert torch.equal(out[:, 0], integer_conv(node, q, conv, source, target)[:, 0])  # others are left alone
    assert bool((out[:, 1] == 128 - 75).all())
    assert bool((out[:, 2] == 128 + 25).all())
    assert roomy.with_room(0.02) is roomy
    assert QConv(weight, torch.zeros(3)).with_room(0.02).weight is weight  # a dead channel without bias needs nothing
