"""Every operation's entry in the table, by known answers, and new ones that are in no file but this."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from formats import fit_weight
from onnx import helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.export.check import check_export, check_images
from dsconvert.export.onnx import PLAIN, export_float, export_quantized
from dsconvert.export.reference import float_reference, reference_of
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.activations import GATES
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv, grid_of, gridded, integer_step, real_params, run_integer
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.island import Part
from dsconvert.graph.ops import OPS, Op
from dsconvert.graph.run import run_float
from dsconvert.graph.shapes import check_node, value_shapes
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel
from dsconvert.tune.latents import start
from dsconvert.tune.simulate import simulate
from dsconvert.yolo.network import Head

SIDE = 16
PLAIN_CONV = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
X = [[[-1.0, 3.0]]]
# (operation, attributes, inputs (c, h, w), what comes out)
KNOWN = [
    ("conv", PLAIN_CONV, [[[[1.0, 2.0], [3.0, 4.0]]], [[[[1.0, 0.0], [0.0, -1.0]]]], [0.5]], [[[-2.5]]]),
    ("act", {"kind": "ReLU"}, [X], [[[0.0, 3.0]]]),
    ("act", {"kind": "LeakyReLU"}, [X], [[[-0.1, 3.0]]]),
    ("act", {"kind": "Hardswish"}, [X], [[[-1 / 3, 3.0]]]),
    ("act", {"kind": "SiLU"}, [[[[math.log(3), 0.0]]]], [[[0.75 * math.log(3), 0.0]]]),
    ("add", {}, [X, [[[2.0, 0.5]]]], [[[1.0, 3.5]]]),
    ("concat", {}, [X, [[[2.0, 0.5]], [[4.0, 5.0]]]], [X[0], [[2.0, 0.5]], [[4.0, 5.0]]]),
    ("maxpool", {"kernel": 3, "stride": 2, "padding": 1}, [[[[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]]]], [[[6.0, 5.0]]]),
    ("upsample", {"scale": 2}, [X], [[[-1.0, -1.0, 3.0, 3.0]] * 2]),
    ("space_to_depth", {}, [[[[1.0, 2.0], [3.0, 4.0]]]], [[[1.0]], [[3.0]], [[2.0]], [[4.0]]]),
    ("act", {"kind": "Sigmoid"}, [[[[math.log(3), 0.0]]]], [[[0.75, 0.5]]]),
    ("act", {"kind": "HardSigmoid"}, [[[[-4.0, -1.0, 4.0]]]], [[[0.0, 1 / 3, 1.0]]]),
    ("relu", {"top": 2}, [X], [[[0.0, 2.0]]]),
    ("relu", {"top": 0}, [X], [[[0.0, 3.0]]]),
    ("product", {}, [X, [[[2.0]]]], [[[-2.0, 6.0]]]),
    ("mean", {}, [X], [[[1.0]]]),
    (
        "island",
        {"part": Part((helper.make_node("Neg", ["a"], ["y"]),), {}, ("a",), "y", (1, 1, 2))},
        [X],
        [[[1.0, -3.0]]],
    ),
    ("times", {"by": 1.5}, [X], [[[-1.5, 4.5]]]),
    ("mean_pool", {"kernel": 2, "stride": 2, "padding": 0, "padded": 0}, [[[[1.0, 2.0], [3.0, 6.0]]]], [[[3.0]]]),
    ("mean_pool", {"kernel": 3, "stride": 3, "padding": 1, "padded": 1}, [[[[1.0, 2.0], [3.0, 3.0]]]], [[[1.0]]]),
    ("select", {"channels": [2, 0]}, [[[[1.0]], [[2.0]], [[3.0]]]], [[[3.0]], [[1.0]]]),
    ("resize", {"scale": 2}, [[[[1.0, 3.0]]]], [[[1.0, 1.5, 2.5, 3.0]] * 2]),
    # two values for a query
    (
        "uneven_attention",
        {"heads": 1, "size": 1, "value": 2},
        [[[[0.0, math.log(3)]]], [[[0.0, 1.0]]], [[[1.0, 5.0]], [[0.0, 4.0]]]],
        [[[3.0, 4.0]], [[2.0, 3.0]]],
    ),
    # the first query sees both keys alike, the second the second key three times as much
    ("attention", {"heads": 1, "size": 1}, [[[[0.0, math.log(3)]]], [[[0.0, 1.0]]], [[[1.0, 5.0]]]], [[[3.0, 4.0]]]),
]
EVERY = pytest.mark.parametrize(("op", "attrs", "inputs", "wanted"), KNOWN)


def case(op, attrs, inputs):
    """The node, and its inputs as tensors, maps with a batch of one. A convolution's weight and bias have no names."""
    names = "a" if op == "conv" else "abc"[: len(inputs)]
    tensors = [torch.tensor(x) for x in inputs]
    return Node(op, "y", tuple(names), attrs), [t[None] if t.dim() == 3 else t for t in tensors]


def test_every_operation_is_known():
    assert {op for op, *_ in KNOWN} == set(OPS)


@EVERY
def test_in_float_and_in_shape(op, attrs, inputs, wanted):
    node, given = case(op, attrs, inputs)
    torch.testing.assert_close(OPS[op].real(node, given)[0], torch.tensor(wanted))
    shapes = [tuple(t.shape[1:] if i == 0 or op != "conv" else t.shape) for i, t in enumerate(given)]
    assert OPS[op].shape(node, shapes[:2] if op == "conv" else shapes) == np.array(wanted).shape


def test_an_island_reads_its_nodes_once(monkeypatch):
    """For any number of images. Copies of it are equal to it and compute the same."""
    nodes = (helper.make_node("Concat", ["a", "c"], ["b"], axis=3), helper.make_node("Softmax", ["b"], ["y"], axis=3))
    part = Part(nodes, {"c": np.zeros((1, 1, 1, 1), np.float32)}, ("a",), "y", (1, 1, 2))
    read, decode = [], helper.get_attribute_value
    monkeypatch.setattr(helper, "get_attribute_value", lambda a: read.append(a.name) or decode(a))
    maps = torch.tensor([0.0, math.log(3), math.log(7)]).reshape(3, 1, 1, 1)
    wanted = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.875, 0.125]]).reshape(3, 1, 1, 2)
    for _ in range(2):
        torch.testing.assert_close(part.compute([maps]), wanted)
    assert read == ["axis", "axis"]
    assert part == Part(nodes, part.fixed, ("a",), "y", (1, 1, 2))  # which has computed nothing
    for copied in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert copied.nodes == part.nodes
        torch.testing.assert_close(copied.compute([maps]), wanted)


@EVERY
def test_in_onnx(op, attrs, inputs, wanted):
    node, given = case(op, attrs, inputs)
    b = OnnxBuilder(13)
    names = [b.tensor(f"x{i}", t.numpy()) for i, t in enumerate(given[1:])]
    OPS[op].onnx(b, node, [INPUT, *names], "y")
    shape = np.array(wanted)[None].shape
    data = b.model({INPUT: tuple(given[0].shape)}, {"y": shape}, {}).SerializeToString()
    found = ort.InferenceSession(data).run(None, {INPUT: given[0].numpy()})[0]
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)


@EVERY
def test_between_grids(op, attrs, inputs, wanted):
    """Of the real numbers that its inputs stand for; half a step of its own grid away at most, and SiLU and Hardswish
    |x| / 510 more, as their gate is rounded to 1 / 255. Convolutions have weights of another kind: see test_integer."""
    if op == "conv":
        return
    node, given = case(op, attrs, inputs)
    grids = {name: QParams(0.05, 40 + i) for i, name in enumerate(node.inputs)}
    grids["y"] = grids["a"] if OPS[op].keeps_grid else QParams(0.04, 90)
    quantized = [grids[name].quantize(t) for name, t in zip(node.inputs, given, strict=True)]
    real = [grids[name].dequantize(q) for name, q in zip(node.inputs, quantized, strict=True)]
    found = grids["y"].dequantize(integer_step(node, quantized, {}, grids))
    more = 3.5 / 510 if attrs.get("kind") in GATES else 0.0
    torch.testing.assert_close(found, OPS[op].real(node, real), rtol=0, atol=0.0201 + more)


@pytest.mark.parametrize(
    "node",
    [
        Node("negate", "y", ("a",)),
        Node(["add"], "y", ("a", "b")),
        Node("add", "y", ("a",)),
        Node("add", "y", ("a", "b"), {"more": 1}),
        Node("upsample", "y", ("a",), {"scale": 17}),
        Node("upsample", "y", ("a",), {"scale": True}),
        Node("upsample", "y", ("a",), {"scale": 2.0}),
        Node("act", "y", ("a",), {"kind": "Softsign"}),
        Node("act", "y", ("a",), {"kind": ["ReLU"]}),
        Node("act", "y", ("a",)),
    ],
)
def test_what_no_entry_allows_is_refused(node):
    with pytest.raises(ValueError, match="of y"):
        check_node(node)


# --- operations that only this file knows ---------------------------------------------------------------------------

FLIP = Op(
    real=lambda node, inputs: inputs[0].flip(1),
    shape=lambda node, inputs: inputs[0],
    onnx=lambda b, node, inputs, output: b.node(
        "Slice", [inputs[0], b.shape(-1), b.shape(-(1 << 40)), b.shape(1), b.shape(-1)], output
    ),
    moves=True,
)
SCALE = Op(
    real=lambda node, inputs: inputs[0] * -node.attrs["by"],
    shape=lambda node, inputs: inputs[0],
    onnx=lambda b, node, inputs, output: b.node("Mul", [inputs[0], b.scalar(-node.attrs["by"])], output),
    attrs={"by": range(1, 4)},
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> DSModel:
    """A detector of one class and one level with both operations in it, at 8 bits."""
    monkeypatch.setitem(OPS, "flip", FLIP)
    monkeypatch.setitem(OPS, "scale", SCALE)
    nodes = (
        Node("conv", "stem.conv", (INPUT,), {**PLAIN_CONV, "stride": 2, "padding": 1}),
        Node("act", "stem.act", ("stem.conv",), {"kind": "ReLU"}),
        Node("flip", "flip", ("stem.act",)),
        Node("scale", "scale", ("flip",), {"by": 3}),
        Node("concat", "cat", ("scale", "flip")),
        Node("conv", "detect", ("cat",), PLAIN_CONV),
    )
    graph, generator = Graph(nodes, ("detect",)), torch.Generator().manual_seed(0)
    shapes = {"stem.conv": (4, 3, 4, 4), "detect": (6, 8, 1, 1)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    convs = {n: QConv(fit_weight(w, 8, w.shape[1]), torch.linspace(-0.4, 0.4, len(w))) for n, w in weights.items()}
    own = {name: QParams.of_range(-30.0, 12.0) for name in gridded(graph)}
    own |= {INPUT: QParams.of_range(0, 1), "stem.act": QParams.of_range(0, 9)}
    return DSModel(graph, convs, own, Head(("thing",), (2,), (((4.0, 4.0),),)), Size.of(SIDE), {})


def image() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(2)) / 255


def test_a_new_operation_is_one_entry(model):
    """In shape, in float by hand, in integers within a step of that, and in training."""
    weights = {name: tuple(conv.weight.vqk.shape) for name, conv in model.convs.items()}
    for node in model.graph.nodes:
        check_node(node)
    shapes = value_shapes(model.graph, weights, (3, SIDE, SIDE))
    assert (shapes["flip"], shapes["cat"], shapes["detect"]) == ((4, 8, 8), (8, 8, 8), (6, 8, 8))
    values: dict[str, torch.Tensor] = {}
    run_float(model.graph, real_params(model.convs), image(), values.__setitem__)
    assert torch.equal(values["scale"][0, 0], -3 * values["stem.act"][0, 3])
    integers: dict[str, torch.Tensor] = {}
    raw = run_integer(model.graph, model.convs, model.activations, image(), integers.__setitem__)
    grids = grid_of(model.graph, model.activations)
    assert "flip" not in model.activations
    assert grids["flip"] == grids["stem.act"]
    assert torch.equal(integers["flip"], integers["stem.act"].flip(1))
    exact = grids["flip"].dequantize(integers["flip"]) * -3
    assert (grids["scale"].dequantize(integers["scale"]) - exact).abs().max() < 0.51 * grids["scale"].scale
    layers, latents = start(model, "shifts", "cpu")
    parts = {name: layer.parts(name, latents) for name, layer in layers.items()}
    (simulated,) = simulate(model.graph, parts, model.activations, image())
    assert (simulated.detach() - raw[0]).abs().mean() < grids["detect"].scale
    simulated.square().sum().backward()
    assert float(latents["stem.conv.cdsw"].grad.abs().max()) > 0  # it came through both


@pytest.mark.parametrize("layout", ["packed", "fused", "blocked", "int8", "openvino"])
def test_onnx_runtime_has_its_integers(model, layout):
    data = export_quantized(model, layout_named(layout), SIDE)
    reference = reference_of(model, layout_named(layout))
    check_export(data.SerializeToString(), reference, PLAIN, check_images(SIDE))
    if layout != "int8":
        return
    names = [f"{node.name}.q" for node in model.graph.nodes]
    data.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in names)
    found = ort.InferenceSession(data.SerializeToString()).run(names, {INPUT: image().numpy()})
    wanted: dict[str, torch.Tensor] = {}
    run_integer(model.graph, model.convs, model.activations, image(), wanted.__setitem__)
    for node, integers in zip(model.graph.nodes, found, strict=True):
        assert np.array_equal(integers, wanted[node.name].numpy()), node.name


def test_the_float_file_has_it(model):
    params = {name: ConvParams(p.weight, p.bias) for name, p in real_params(model.convs).items()}
    data = export_float(model.graph, params, model.head, SIDE).SerializeToString()
    check_export(data, float_reference(model.graph, params, model.head), PLAIN, check_images(SIDE))


def test_a_model_file_holds_it_and_is_refused_without_its_entry(model, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(model_bytes(model))
    assert load_model(path).graph == model.graph
    monkeypatch.delitem(OPS, "scale")
    with pytest.raises(InputError, match="operation of scale"):
        load_model(path)
