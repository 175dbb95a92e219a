"""Convolutions in other shapes, and maps with channels last, give the same integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import TINY, convert, randomise, smooth_picture
from onnx import TensorProto, helper, numpy_helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import CheckError, InputError
from dsconvert.export.check import check_export, check_images, reference_of
from dsconvert.export.onnx import PLAIN, Ends, export_quantized
from dsconvert.export.ort.quickconv import (
    image_by_quads,
    kernel_by_quads,
    more_channels,
    outputs_apart,
    quads_of,
    twice,
)
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.ir import INPUT, Node
from dsconvert.model.model import DSModel
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
    """A convolution with random integers: its inputs as QLinearConv has them, and its answer."""

    def __init__(self, shape: tuple[int, int, int, int], stride: int, pad: int) -> None:
        rng = np.random.default_rng(0)
        self.stride, self.pad = stride, pad
        self.weight = rng.integers(-30, 30, shape).astype(np.int8)
        self.bias = rng.integers(-900, 900, shape[0]).astype(np.int32)
        self.scale = (rng.random(shape[0]) * 0.02 + 0.001).astype(np.float32)
        self.b = OnnxBuilder(21)
        one, zero = self.b.scalar(1.0), self.b.constant(np.array(ZERO, np.uint8))
        self.inputs = [
            "x", one, zero, self.b.tensor("w", self.weight), self.b.tensor("s", self.scale),
            self.b.constant(np.array(0, np.int8)), one, self.b.constant(np.array(OUT_ZERO, np.uint8)),
            self.b.tensor("b", self.bias),
        ]  # fmt: skip

    def answer(self, x: np.ndarray) -> np.ndarray:
        """x (n, chi, h, w) -> (n, h', w', cho), in 64-bit integers until the one rounding."""
        parts = (torch.from_numpy(v.astype(np.float64)) for v in (x - float(ZERO), self.weight, self.bias))
        total = torch.nn.functional.conv2d(*parts, stride=self.stride, padding=self.pad).numpy()
        real = total.astype(np.float32) * self.scale[:, None, None]
        return (np.clip(np.rint(real) + OUT_ZERO, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("kernel", "pad", "taken"),
    [(6, 2, (3, 2)), (3, 1, (2, 2)), (5, 2, (3, 2)), (4, 1, (3, 2)), (1, 0, (1, 1)), (8, 3, (5, 3))],
)
@pytest.mark.parametrize("count", [1, 2])
def test_every_second_pixel_by_quads(kernel, pad, taken, count):
    case = Case((8, 3, kernel, kernel), 2, pad)
    b, inputs = case.b, case.inputs
    quads = quads_of((kernel, kernel), [pad] * 4, (24, 32))
    assert quads is not None
    assert quads.kernel == taken
    inputs[0] = image_by_quads(b, "x", (3, 24), quads, inputs[2], "i")
    inputs[3] = kernel_by_quads(b, inputs[3], (8, 3, kernel, kernel), quads, "k")
    inputs[4], inputs[8] = twice(b, inputs[4], "t4"), twice(b, inputs[8], "t8")
    pads = [quads.pads[0], 0, quads.pads[1], 0]
    paired = b.node("QLinearConv", inputs, "c", pads=pads, channels_last=1, domain="com.microsoft")
    outputs_apart(b, paired, 8, quads, "y")
    x = np.random.default_rng(1).integers(0, 256, (count, 3, 24, 32)).astype(np.uint8)
    found = session(model_of(b, ("n", 3, 24, 32))).run(None, {"x": x})[0]
    assert np.array_equal(found, case.answer(x))


@pytest.mark.parametrize(("kernel", "pad", "size"), [(6, 1, (24, 32)), (3, 1, (23, 32)), (4, 0, (24, 32))])
def test_no_quads_of_what_comes_in_no_pairs(kernel, pad, size):
    assert quads_of((kernel, kernel), [pad] * 4, size) is None


def network_of(stem: list[int], nc: int = 2) -> DSModel:
    """The small network with another first convolution, quantized; every map's side is a multiple of two."""
    layers = [[-1, 1, "Conv", stem], *TINY["backbone"][1:]]
    network = Network({**TINY, "backbone": layers}, nc=nc, na=3).eval()
    randomise(network)
    network.requires_grad_(False)
    strides = [4, 8] if stem[2] == 2 else [2, 4]
    return convert(network, head_from_detect(network.detect, strides, [str(i) for i in range(nc)]), smooth_picture())


@pytest.mark.parametrize(
    ("stem", "taken"),
    [
        ([32, 6, 2, 2], (16, 24, 3, 2)), ([32, 3, 2], (16, 24, 2, 2)), ([32, 5, 2], (16, 24, 3, 2)),
        ([32, 3, 1], (8, 4, 3, 3)),  # every pixel: the image's channels filled up
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["packed", "fused"])
def test_first_convolutions_in_channels_that_are_a_multiple_of_four(stem, taken, layout, tmp_path):
    model = network_of(stem)
    made = export_quantized(model, layout_named(layout), SIDE)
    check_export(made.SerializeToString(), reference_of(model, layout_named(layout)), PLAIN, check_images(SIDE))
    session(made, tmp_path)
    folded = onnx.load(tmp_path / "optimised.onnx").graph
    node = next(n for n in folded.node if n.op_type == "QLinearConv")
    weight = next(t for t in folded.initializer if t.name == node.input[3])  # known at load, or it is slow
    assert tuple(weight.dims) == taken


@pytest.mark.parametrize(("cho", "computed"), [(243, 256), (33, 48), (63, 64), (36, 36), (21, 21), (64, 64)])
def test_channels_are_filled_up_where_that_is_faster(cho, computed):
    assert cho + more_channels(cho) == computed


def test_maps_are_turned_around_once_and_boxes_once(converted, tmp_path):
    made = export_quantized(converted, layout_named("fused"), SIDE)
    session(made, tmp_path)
    loaded = onnx.load(tmp_path / "optimised.onnx")
    levels = len(converted.head.strides)
    for model in (made, loaded):  # and ONNX Runtime sees nothing to turn either
        ops = Counter(node.op_type for node in model.graph.node)
        known = {t.name for t in model.graph.initializer}
        for node in model.graph.node:  # what weights are made of is folded
            if node.input and known.issuperset(node.input):
                known.update(node.output)
                ops[node.op_type] -= 1
        assert ops["Transpose"] == 2 + 3 * levels  # two turn the image, three the parts of boxes
        assert not ops["Resize"]
        assert not ops["MaxPool"]
        assert all(
            any(a.name == "channels_last" and a.i for a in node.attribute)
            for node in model.graph.node
            if node.op_type == "QLinearConv"
        )
    used = {name for node in made.graph.node for name in node.input}
    assert {t.name for t in made.graph.initializer} <= used


@pytest.mark.parametrize(("nc", "pieces", "rest"), [(21, [21, 21, 21, 1], 1), (32, [32, 32, 32], 0)])
def test_boxes_of_many_classes_are_cut_out_by_anchor(nc, pieces, rest):
    """63 channels are computed as 64, and the one more is cut off with the anchors; 96 are as they are."""
    network = Network(TINY, nc=nc, na=3).eval()
    randomise(network)
    network.requires_grad_(False)
    head = head_from_detect(network.detect, [4, 8], [str(i) for i in range(nc)])
    model = convert(network, head, smooth_picture())
    packed, fused = (
        export_quantized(model, layout_named(layout), SIDE, Ends(dynamic_batch=True)) for layout in ("packed", "fused")
    )
    x = np.random.default_rng(0).random((2, 3, SIDE, SIDE), np.float32)
    found, wanted = (session(made).run(None, {"images": x})[0] for made in (fused, packed))
    assert np.array_equal(found, wanted)
    tensors = {t.name: numpy_helper.to_array(t).tolist() for t in fused.graph.initializer if t.data_type == 7}
    splits = [n for n in fused.graph.node if n.op_type == "Split" and "cls" in n.input[0]]
    assert [tensors[n.input[1]] for n in splits] == [pieces] * 2
    assert {n.input[0].endswith(".wide.last") for n in splits} == {bool(rest)}
    slices = [n for n in fused.graph.node if n.op_type == "Slice"]  # of weights; nothing else reads the 63
    assert not [n for n in slices if n.input[0].endswith(".wide")]


@pytest.mark.parametrize("layer", ["model.0", "model.2.m.0.cv1", "model.7.cv3"])
def test_the_check_names_a_wrong_layer(converted, layer):
    made = export_quantized(converted, layout_named("fused"), SIDE)
    stored = next(t for t in made.graph.initializer if t.name == f"{layer}.cds")
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * np.float32(1.5), stored.name))
    with pytest.raises(CheckError, match=rf"at layer {layer},"):
        check_export(
            made.SerializeToString(), reference_of(converted, layout_named("fused")), PLAIN, check_images(SIDE)
        )


def also_of_the_image(model: DSModel, kernels: list[tuple[int, int, int]], end: str = "sum") -> DSModel:
    """The model with further convolutions of the image, (kernel, padding, dilation) each, added to its first."""
    first, act = model.graph.nodes[:2]
    assert (first.inputs, act.inputs) == ((INPUT,), (first.name,))
    nodes, convs, grids, total = [first, act], dict(model.convs), dict(model.activations), act.name
    for i, (kernel, padding, dilation) in enumerate(kernels):
        conv = Node("conv", f"more{i}", (INPUT,), {**first.attrs, "padding": padding, "dilation": dilation})
        silu = Node("act", f"more{i}.act", (conv.name,), act.attrs)
        both = Node("add", f"more{i}.{end}", (total, silu.name))
        nodes += [conv, silu, both]
        own, at = convs[first.name], (6 - kernel) // 2
        cut = [t[:, :, at : at + kernel, at : at + kernel].clone() for t in (own.weight.vqk, own.weight.m)]
        convs[conv.name] = replace(own, weight=replace(own.weight, stored=cut[0], m=cut[1]))
        grids |= {n.name: grids[first.name if n is conv else act.name] for n in (conv, silu, both)}
        total = both.name
    rest = [replace(n, inputs=tuple(total if x == act.name else x for x in n.inputs)) for n in model.graph.nodes[2:]]
    return replace(model, graph=replace(model.graph, nodes=(*nodes, *rest)), convs=convs, activations=grids)


@pytest.mark.parametrize("layout", ["packed", "fused"])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_several_convolutions_read_the_image(layout, kind):
    """One in the same quads, one in others, two with the image's channels filled up."""
    model = also_of_the_image(network_of([32, 6, 2, 2]), [(6, 2, 1), (2, 0, 1), (2, 1, 2), (2, 1, 2)])
    made = export_quantized(model, layout_named(layout), SIDE, Ends(input_type=kind))
    names = [out for node in made.graph.node for out in node.output if out]
    assert len(names) == len(set(names))
    pads = [n for n in made.graph.node if n.op_type == "Pad" and n.output[0].endswith(f"{INPUT}.filled")]
    assert len(pads) == 3  # the first two share the image that they read
    check_export(
        made.SerializeToString(), reference_of(model, layout_named(layout)), Ends(input_type=kind), check_images(SIDE)
    )


@pytest.mark.parametrize("name", ["both", "act.q", "split"])
def test_names_of_layers_that_the_file_needs_itself_are_refused(name):
    """As only a forged model file has them."""
    model = also_of_the_image(network_of([32, 6, 2, 2]), [(6, 2, 1)], name)
    with pytest.raises(InputError, match=rf"^Two values of the exported file would be called more0\.{name};"):
        export_quantized(model, layout_named("packed"), SIDE)
