"""Weights decoded together: every integer comes back, in its own bits, and a layer more costs few nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import SIDE
from formats import along, free
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.codes import TRELLIS
from dsconvert.dsconv.codes.trellis_onnx import Matrix, Tables
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.joint import JointWeights, joins
from dsconvert.export.weights.layouts import layout_named
from dsconvert.export.weights.weights import Weights

KINDS = [(1, True), (2, True), (3, True), (4, True), (4, False), (5, False), (6, False)]
FLOAT = onnx.TensorProto.FLOAT


def weight_of(shape: tuple[int, int, int, int], width: WeightFormat, seed: int = 0) -> DSTensor:
    """Random integers up to both ends of their range, and all m."""
    rng = np.random.default_rng(seed)
    cho, chi, kh, kw = shape
    most = width.most_m
    multipliers = rng.integers(1, most + 1, (cho, -(-chi // width.block_size), kh, kw))
    multipliers.flat[0], multipliers.flat[-1] = 1, most
    m = torch.from_numpy(multipliers).to(torch.int8)
    if width.code == TRELLIS:
        code = rng.integers(0, 1 << width.bits, shape)
        code[0, -8:, -1, -1] = (1 << width.bits) - 1  # of ones, whatever precedes the next output channel's
        return DSTensor(torch.from_numpy(code).to(torch.uint8), m, torch.ones(cho), width)
    low, high = width.limits
    vqk = rng.integers(low, high + 1, shape)
    vqk.flat[:2] = low, high
    return DSTensor(torch.from_numpy(vqk).to(torch.int8), m, torch.ones(cho), width)


def model_of(weights: dict[str, DSTensor]) -> onnx.ModelProto:
    """A file that is nothing but these weights, as floats."""
    b = OnnxBuilder(21)
    joint = JointWeights(b)
    for name, weight in weights.items():
        b.node("Cast", [joint.add(name, weight)], f"{name}.out", to=FLOAT)
    joint.finish()
    return b.model({}, {f"{name}.out": tuple(w.vqk.shape) for name, w in weights.items()}, {})


def decoded(model: onnx.ModelProto) -> list[list[np.ndarray]]:
    """By ONNX Runtime, by ONNX's own definition, and by OpenVINO where it is installed."""
    found = [ort.InferenceSession(model.SerializeToString()).run(None, {}), ReferenceEvaluator(model).run(None, {})]
    try:
        import openvino
    except ImportError:
        return found
    core = openvino.Core()
    return [*found, list(core.compile_model(core.read_model(model.SerializeToString()), "CPU")({}).values())]


@pytest.mark.parametrize(("bits", "trellis"), KINDS)
@pytest.mark.parametrize("shapes", [[(6, 16, 1, 1)], [(2, 32, 3, 3), (6, 16, 1, 1), (4, 32, 1, 1), (3, 64, 3, 3)]])
def test_all_come_back(bits, trellis, shapes):
    sizes = (16, 16, 32, 8)
    weights = {
        f"layer{i}": weight_of(shape, free(bits, size, trellis), i)
        for i, (shape, size) in enumerate(zip(shapes, sizes, strict=False))
    }
    model = model_of(weights)
    for values in decoded(model):
        for weight, value in zip(weights.values(), values, strict=True):
            assert np.array_equal(value, weight.merged().numpy())
    for name, weight in weights.items():  # in as many bits as it has
        stored = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith(f"{name}.")]
        assert {a.dtype for a in stored} == {np.dtype(np.uint8)}
        assert sum(8 * a.size for a in stored) == round(weight.weight_bits * weight.vqk.numel())


def test_all_kinds_in_one_file():
    weights = {f"w{bits}{trellis}": weight_of((4, 32, 3, 3), free(bits, 16, trellis)) for bits, trellis in KINDS}
    for values in decoded(model_of(weights)):
        for weight, value in zip(weights.values(), values, strict=True):
            assert np.array_equal(value, weight.merged().numpy())


def test_words_are_as_documented():
    """5 bits: -16 and 15, the ends, are 0 and 31 above the lowest; their lower nibbles are a byte, their upper bits two
    of the eight that four words have above theirs. m 1 and 4 are one byte."""
    vqk = torch.tensor([[-16, 15, 0, -16, -16, -16, -16, -16]] * 2, dtype=torch.int8).reshape(2, 8, 1, 1)
    m = torch.tensor([1, 4], dtype=torch.int8).reshape(2, 1, 1, 1)
    model = model_of({"w": DSTensor(vqk, m, torch.ones(2), free(5, 8))})
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert stored["w.vqk"].tolist() == [[[[0xF0, 0x00, 0x00, 0x00]], [[0xF0, 0x00, 0x00, 0x00]]]]
    assert stored["w.vqk.high"].tolist() == [[[0b0110], [0b0110]]]
    assert stored["w.kds"].tolist() == [0x41]


@pytest.mark.parametrize(
    ("bits", "stored"),
    [(1, [0b10010110]), (2, [0b10010011, 0b01101100]), (4, [0x8A, 0x21, 0x0F, 0x47]), (3, [0xB7, 0x63, 0x1E])],
)
def test_bytes_along_a_trellis_are_as_documented(bits, stored):
    """A string of bits, the first highest: at 3 bits 101 101 110 110 001 100 011 110 are these three bytes."""
    digits = np.unpackbits(np.array(stored, np.uint8)).reshape(8, bits)
    code = torch.from_numpy(digits @ (1 << np.arange(bits)[::-1])).to(torch.uint8).reshape(1, 8, 1, 1)
    m = torch.ones(2, 1, 1, 1, dtype=torch.int8)
    weight = DSTensor(code.repeat(2, 1, 1, 1), m, torch.ones(2), along(bits, 8))
    found = {t.name: numpy_helper.to_array(t).tolist() for t in model_of({"w": weight}).graph.initializer}
    assert found["w.vqk"] == [stored, stored]
    assert found["w.kds"] == [0x11]


def test_a_row_is_a_blocks_channels_at_one_tap():
    code = torch.zeros(2, 16, 1, 2, dtype=torch.uint8)
    code[0, 8:, 0, 1] = torch.tensor([4, 0, 1, 0, 0, 6, 0, 1])  # 100 000 001 000 000 110 000 001: 80 81 81 hex
    weight = DSTensor(code, torch.ones(2, 1, 1, 2, dtype=torch.int8), torch.ones(2), along(3, 16))
    found = {t.name: numpy_helper.to_array(t).tolist() for t in model_of({"w": weight}).graph.initializer}
    assert found["w.vqk"] == [[0] * 6, [0, 0, 0, 0x80, 0x81, 0x81], [0] * 6, [0] * 6]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_processors_sums_of_bytes_saturate(bits):
    """Without VNNI two neighbouring products are added in 16 bits: 2 * 255 * 64 = 32640 fits."""
    for size in (8, 16, 32):
        for levels in (1, TRELLIS.most_m(bits), 15):
            t = Tables(OnnxBuilder(21), "t", bits, levels)
            weights = Matrix(bits, size * bits // 8).weights(t.step, t.copies).astype(int)
            assert np.abs(weights).max() <= 64
            assert t.step * (levels - 1) <= 255


@pytest.mark.parametrize(("bits", "most"), [(1, 15), (2, 14), (3, 10), (4, 6)])
def test_multipliers_beyond_what_a_fit_takes(bits, most):
    """As a model file may hold them: up to |m VQK| = 127."""
    weight = weight_of((4, 32, 3, 3), free(bits, 16, True))
    m = weight.m.clone()
    m.view(-1)[::2] = most
    weights = {"high": replace(weight, m=m), "usual": weight}
    for values in decoded(model_of(weights)):
        for w, value in zip(weights.values(), values, strict=True):
            assert np.array_equal(value, w.merged().numpy())


def test_what_does_not_join():
    good = weight_of((4, 32, 3, 3), free(4, 16))
    assert joins(good)
    for shape, width in [
        ((4, 40, 1, 1), free(4, 16)),  # a short last block
        ((4, 12, 1, 1), free(4, 4)),  # a block is no whole bytes
        ((3, 16, 1, 1), free(4, 16)),  # an odd number of m
        ((3, 16, 3, 3), free(4, 16, True)),
        ((4, 16, 1, 1), free(7, 16)), ((4, 16, 1, 1), free(8, 16)),
    ]:  # fmt: skip
        assert not joins(weight_of(shape, width))


@pytest.mark.parametrize(("bits", "trellis"), KINDS)
@pytest.mark.parametrize(("kernel", "nodes"), [(1, 1), (3, 3)])
def test_a_layer_more_is_one_node_or_three(bits, trellis, kernel, nodes):
    """Reshape; where the kernel is larger Reshape, Transpose, Reshape. What all share is not more for more of them."""
    layers = {f"w{i}": weight_of((4, 16, kernel, kernel), free(bits, 16, trellis), i) for i in range(4)}
    three, four = (len(model_of(dict(list(layers.items())[:count])).graph.node) for count in (3, 4))
    assert four - three - 1 == nodes  # and the Cast of this test


def test_onnx_runtime_finds_nothing_to_change_but_constants(widened, tmp_path):
    """It copies what several read, and makes one Transpose of two: each time it looks at the whole graph again."""
    made = export_quantized(widened, layout_named("packed"), SIDE)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "basic.onnx")
    ort.InferenceSession(made.SerializeToString(), options)
    known, left = {t.name for t in made.graph.initializer}, list[onnx.NodeProto]()
    for node in made.graph.node:
        if node.op_type != "DequantizeLinear" and node.input and known.issuperset(node.input):
            known.update(node.output)
        else:
            left.append(node)
    found = onnx.load(tmp_path / "basic.onnx").graph.node
    assert Counter(n.op_type for n in found) == Counter(n.op_type for n in left)
    assert _orders(found) == _orders(left)


def _orders(nodes: Iterable[onnx.NodeProto]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(n.attribute[0].ints) for n in nodes if n.op_type == "Transpose")


@pytest.mark.parametrize(("bits", "trellis"), KINDS)
def test_beside_layers_that_are_decoded_by_themselves(bits, trellis):
    b = OnnxBuilder(21)
    weights = Weights(b, layout_named("packed"))
    width = free(bits, 16, trellis)
    # by itself: an odd number of m, or a short last block
    alone = weight_of((3, 16, 3, 3) if trellis else (3, 40, 3, 3), width)
    both = {"w": weight_of((4, 32, 3, 3), width), "alone": alone}
    assert [joins(w) for w in both.values()] == [True, False]
    for name, weight in both.items():
        b.node("Cast", [weights.add(name, weight)], f"{name}.out", to=FLOAT)
    weights.finish()
    for values in decoded(b.model({}, {f"{name}.out": tuple(w.vqk.shape) for name, w in both.items()}, {})):
        for weight, value in zip(both.values(), values, strict=True):
            assert np.array_equal(value, weight.merged().numpy())
