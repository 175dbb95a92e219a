"""Layout fused with channels last: convolutions in other shapes, and upsampling by Gather, give the same integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import TINY, convert, randomise, smooth_picture
from onnx import TensorProto, helper, numpy_helper

from dsconvert.errors import CheckError
from dsconvert.export.builder import OnnxBuilder
from dsconvert.export.check import check_export, check_images, reference_of
from dsconvert.export.lastchannels import channels_last
from dsconvert.export.onnx import PLAIN, Ends, export_quantized
from dsconvert.export.quickconv import Conv, add_conv, add_first_conv
from dsconvert.yolo.network import Network, head_from_detect

SIDE = 64
ZERO, OUT_ZERO = 3, 100


def session(model: onnx.ModelProto, folder=None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimised.onnx")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def model_of(b: OnnxBuilder, shape: tuple[int, ...], kind: int = TensorProto.UINT8) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", kind, shape)], [helper.make_tensor_value_info("y", kind, None)]
    graph = helper.make_graph(b.nodes, "t", *ends, list(b.initializers.values()))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Case:
    """A convolution with random integers, as a node and as numbers."""

    def __init__(self, shape: tuple[int, int, int, int], stride: int = 1, pad: int = 0, **attrs: object) -> None:
        rng = np.random.default_rng(0)
        self.stride, self.pad = stride, pad
        self.weight = rng.integers(-30, 30, shape).astype(np.int8)
        self.bias = rng.integers(-900, 900, shape[0]).astype(np.int32)
        self.scale = (rng.random(shape[0]) * 0.02 + 0.001).astype(np.float32)
        self.b = OnnxBuilder(21)
        one, zero = self.b.scalar(1.0), self.b.constant(np.array(ZERO, np.uint8))
        inputs = [
            "x", one, zero, self.b.tensor("w", self.weight), self.b.tensor("s", self.scale),
            self.b.constant(np.array(0, np.int8)), one, self.b.constant(np.array(OUT_ZERO, np.uint8)),
            self.b.tensor("b", self.bias),
        ]  # fmt: skip
        node = helper.make_node("QLinearConv", inputs, ["y"], name="it", pads=[pad] * 4, strides=[stride] * 2, **attrs)
        self.conv = Conv(node, shape)

    def answer(self, x: np.ndarray) -> np.ndarray:
        """x (n, chi, h, w) -> (n, h', w', cho), in 64-bit integers until the one rounding."""
        parts = (torch.from_numpy(v.astype(np.float64)) for v in (x - float(ZERO), self.weight, self.bias))
        total = torch.nn.functional.conv2d(*parts, stride=self.stride, padding=self.pad).numpy()
        real = total.astype(np.float32) * self.scale[:, None, None]
        return (np.clip(np.rint(real) + OUT_ZERO, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "taken"),
    [
        (6, 2, 2, (16, 24, 3, 2)), (3, 2, 1, (16, 24, 2, 2)), (5, 2, 2, (16, 24, 3, 2)), (4, 2, 1, (16, 24, 3, 2)),
        (1, 2, 0, (16, 24, 1, 1)), (8, 2, 3, (16, 24, 5, 3)),
        # outputs that come in no pairs, and every pixel or every third
        (6, 2, 1, (8, 4, 6, 6)), (4, 2, 0, (8, 4, 4, 4)), (3, 1, 1, (8, 4, 3, 3)), (7, 3, 2, (8, 4, 7, 7)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2])
def test_the_first_convolution_in_channels_that_are_a_multiple_of_four(kernel, stride, pad, taken, count, tmp_path):
    case = Case((8, 3, kernel, kernel), stride, pad)
    assert add_first_conv(case.b, case.conv, "x", (24, 32), "y")
    x = np.random.default_rng(1).integers(0, 256, (count, 3, 24, 32)).astype(np.uint8)
    found = session(model_of(case.b, ("n", 3, 24, 32)), tmp_path).run(None, {"x": x})[0]
    assert np.array_equal(found, case.answer(x))
    folded = onnx.load(tmp_path / "optimised.onnx").graph
    node = next(n for n in folded.node if n.op_type == "QLinearConv")
    weight = next(t for t in folded.initializer if t.name == node.input[3])  # known at load, or it is slow
    assert tuple(weight.dims) == taken
    assert node.name.startswith("it")


def test_an_odd_image_has_its_channels_filled_up():
    case = Case((8, 3, 3, 3), 2, 1)
    assert add_first_conv(case.b, case.conv, "x", (23, 32), "y")
    x = np.random.default_rng(1).integers(0, 256, (1, 3, 23, 32)).astype(np.uint8)
    assert np.array_equal(session(model_of(case.b, x.shape)).run(None, {"x": x})[0], case.answer(x))


@pytest.mark.parametrize(
    "case",
    [
        Case((8, 4, 3, 3), 2, 1), Case((8, 3, 3, 3), 1, 2, dilations=[2, 2]), Case((9, 1, 3, 3), 1, 1, group=3),
        Case((8, 3, 3, 3), 1, 0, auto_pad="SAME_UPPER"),
    ],
    ids=["channels", "dilation", "groups", "auto_pad"],
)  # fmt: skip
def test_other_first_convolutions_are_left_alone(case):
    before = list(case.b.nodes)
    assert not add_first_conv(case.b, case.conv, "x", (24, 32), "y")
    assert case.b.nodes == before


@pytest.mark.parametrize(("cho", "computed"), [(243, 256), (33, 48), (63, 64), (36, 36), (21, 21), (64, 64)])
def test_channels_are_filled_up_where_that_is_faster(cho, computed, tmp_path):
    case = Case((cho, 8, 1, 1))
    add_conv(case.b, case.conv, "x", "y")
    x = np.random.default_rng(1).integers(0, 256, (1, 5, 7, 8)).astype(np.uint8)
    found = session(model_of(case.b, (1, 5, 7, 8)), tmp_path).run(None, {"x": x})[0]
    assert np.array_equal(found, case.answer(x.transpose(0, 3, 1, 2)))
    folded = onnx.load(tmp_path / "optimised.onnx").graph
    node = next(n for n in folded.node if n.op_type == "QLinearConv")
    assert next(t for t in folded.initializer if t.name == node.input[3]).dims[0] == computed


def turned(scales: tuple[float, float], **attrs: str) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """Convolution, Resize, and an answer channels first: the model turned around, and what it says before and after."""
    case = Case((16, 4, 1, 1))
    case.conv.node.output[0] = "c"
    case.b.nodes.append(case.conv.node)
    b = case.b
    how = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"} | attrs
    b.node("Resize", ["c", "", b.constant(np.array([1, 1, *scales], np.float32))], "y", **how)
    high, wide = (int(5 * s) for s in scales)
    model = model_of(b, (1, 4, 5, 5))
    x = np.random.default_rng(1).integers(0, 256, (1, 4, 5, 5)).astype(np.uint8)
    before = session(model).run(None, {"x": x})[0]
    values = {"x": (0, 4, 5, 5), "c": (0, 16, 5, 5), "y": (0, 16, high, wide)}
    b.node("Identity", ["y"], "z")  # an output is never turned
    del model.graph.node[:]
    model.graph.node.extend(b.nodes)
    model.graph.output[0].name = "z"
    channels_last(model, values, {t.name: tuple(t.dims) for t in model.graph.initializer})
    after = session(model).run(None, {"x": x})[0]
    return model, before, after


@pytest.mark.parametrize(
    ("scales", "attrs", "gathers"),
    [
        ((2, 2), {}, 2), ((3, 1), {}, 2), ((1.4, 2), {}, 0), ((2, 2), {"nearest_mode": "ceil"}, 0),
        ((2, 2), {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}, 0),
    ],
)  # fmt: skip
def test_upsampling_repeats_pixels_or_stays_a_resize(scales, attrs, gathers):
    model, before, after = turned(scales, **attrs)
    assert np.array_equal(before, after)
    ops = Counter(node.op_type for node in model.graph.node)
    assert (ops["Gather"], ops["Resize"]) == (gathers, 0 if gathers else 1)


def test_maps_are_turned_around_once_and_boxes_once(converted, tmp_path):
    made = export_quantized(converted, "fused", SIDE)
    session(made, tmp_path)
    loaded = onnx.load(tmp_path / "optimised.onnx")
    levels = len(converted.head.strides)
    for model in (made, loaded):  # and ONNX Runtime sees nothing to turn either
        ops = Counter(node.op_type for node in model.graph.node)
        folded = 1 if model is made else 0  # the weight of the first convolution
        assert ops["Transpose"] - folded == 2 + 2 * levels  # two turn the image
        assert not ops["Resize"]
        assert not ops["MaxPool"]
        assert all(
            any(a.name == "channels_last" and a.i for a in node.attribute)
            for node in model.graph.node
            if node.op_type == "QLinearConv"
        )
    used = {name for node in made.graph.node for name in node.input}
    assert {t.name for t in made.graph.initializer} <= used


@pytest.mark.parametrize(("nc", "pieces", "rest"), [(20, [21, 21, 21, 1], 1), (31, [32, 32, 32], 0)])
def test_boxes_of_many_classes_are_cut_out_by_anchor(nc, pieces, rest):
    """63 channels are computed as 64, and the one more is cut off with the anchors; 96 are as they are."""
    network = Network(TINY, nc=nc, na=3).eval()
    randomise(network)
    network.requires_grad_(False)
    head = head_from_detect(network.detect, [4, 8], [str(i) for i in range(nc)])
    model = convert(network, head, smooth_picture())
    packed, fused = (export_quantized(model, layout, SIDE, Ends(dynamic_batch=True)) for layout in ("packed", "fused"))
    x = np.random.default_rng(0).random((2, 3, SIDE, SIDE), np.float32)
    found, wanted = (session(made).run(None, {"images": x})[0] for made in (fused, packed))
    assert np.array_equal(found, wanted)
    tensors = {t.name: numpy_helper.to_array(t).tolist() for t in fused.graph.initializer if t.data_type == 7}
    splits = [n for n in fused.graph.node if n.op_type == "Split" and n.input[0].endswith((".wide", ".q.last"))]
    assert [tensors[n.input[1]] for n in splits] == [pieces] * 2
    assert {n.input[0].endswith(".wide") for n in splits} == {bool(rest)}
    slices = [n for n in fused.graph.node if n.op_type == "Slice"]  # of weights; nothing else reads the 63
    assert not [n for n in slices if n.input[0].endswith(".wide")]


@pytest.mark.parametrize("layer", ["model.0", "model.2.m.0.cv1", "model.7.cv3"])
def test_the_check_names_a_wrong_layer(converted, layer):
    made = export_quantized(converted, "fused", SIDE)
    stored = next(t for t in made.graph.initializer if t.name == f"{layer}.cds")
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * np.float32(1.5), stored.name))
    with pytest.raises(CheckError, match=rf"at layer {layer},"):
        check_export(made.SerializeToString(), reference_of(converted), PLAIN, check_images(SIDE))
