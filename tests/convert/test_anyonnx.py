"""quantize of ONNX files from anywhere: what is found in them, what is fitted, and what the written file computes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import zoo
from conftest import DEMO
from onnx import TensorProto, helper, numpy_helper
from test_anymodule import Small
from torch import nn

from dsconvert.base.errors import CheckError, InputError
from dsconvert.convert import exporting
from dsconvert.convert import onnx as convert
from dsconvert.convert import onnx_lockstep as lockstep
from dsconvert.convert.onnx import OnnxConverted, OnnxPlan, quantize_onnx
from dsconvert.export.onnx import Ends
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.ops import conv
from dsconvert.onnxfile.images import as_input, pictures
from dsconvert.onnxfile.inspect import conv_weights
from dsconvert.onnxfile.layers import find_layers
from dsconvert.onnxfile.operators import with_operators
from dsconvert.onnxfile.source import ImageInput, read_source
from dsconvert.photos.form import PLAIN, InputForm

weights_only = partial(OnnxPlan, activations="float")
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of six small pictures."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (40, 30)))
    return folder


def exported(module: nn.Module, path: Path, shape=(1, 3, 32, 32), opset: int = 17, **how) -> Path:
    torch.manual_seed(0)
    torch.onnx.export(module.eval(), (torch.rand(shape),), str(path), dynamo=False, opset_version=opset, **how)
    return path


def run(model: onnx.ModelProto | Path, x: np.ndarray, level: int = 99) -> list[np.ndarray]:
    options = with_operators(ort.SessionOptions())
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel(level)
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def error(path: Path, made: OnnxConverted, x: np.ndarray) -> float:
    (wanted, *_), (found, *_) = run(path, x), run(made.model, x)
    return float(np.square(found - wanted).mean() / np.square(wanted).mean())


def image(side: int = 32, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 3, side, side), np.float32)


def put_in(path: Path, made: OnnxConverted) -> onnx.ModelProto:
    """The file as it was, its layers reading the numbers of the fit in the place of their weights and biases."""
    model = onnx.load(path)
    for layer in made.layers:
        fitted, node = made.fitted[layer.index], model.graph.node[layer.index]
        weight = fitted.weight.weight().numpy()
        value = weight if node.op_type == "Conv" else weight[:, :, 0, 0]
        for place, (name, array) in enumerate({"w": value, "b": fitted.bias.numpy()}.items(), 1):
            model.graph.initializer.append(numpy_helper.from_array(array, f"{name}{layer.index}"))
            node.input[place:] = [f"{name}{layer.index}", *node.input[place + 1 :]]
    return model


@pytest.fixture(scope="module")
def resnet(tmp_path_factory, photos) -> tuple[Path, OnnxConverted]:
    """A small ResNet from torch's exporter (BatchNorm folded, Gemm at the end), and its conversion."""
    path = exported(
        zoo._resnet(False, (1, 1, 1, 1), 1 / 8, 10), tmp_path_factory.mktemp("resnet") / "net.onnx", (1, 3, 48, 48)
    )
    return path, quantize_onnx(path, photos, weights_only(samples=3))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, OnnxConverted]:
    """The demo's detector as a float ONNX file, and its conversion: by least squares, which takes seconds less."""
    path = tmp_path_factory.mktemp("demo") / "demo.onnx"
    path.write_bytes(exporting.onnx_bytes(DEMO / "demo.pt", layout_named("packed"), 96, Ends(), False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "MOST_COLUMNS", 0)
        return path, quantize_onnx(path, DEMO / "data.yaml", weights_only(bits=6, samples=2))


@pytest.mark.parametrize("which", ["resnet", "demo"])
def test_the_file_is_the_float_graph_with_the_fitted_weights(which, request):
    """Both graphs have the same operators on the same float32 weights; only how the engine lays out the sums may
    differ. Unoptimised, so that the packed chain is run as it is written."""
    path, made = request.getfixturevalue(which)
    side = made.source.image.height
    for level in (99, 0):
        (wanted, *_), (found, *_) = run(put_in(path, made), image(side), level), run(made.model, image(side), level)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    onnx.checker.check_model(made.model)
    kinds = [w.type for w in conv_weights(made.model)]
    assert set(kinds) <= {"int8", "uint4", "int4", "uint8"}
    assert len(kinds) == sum(n.op_type == "Conv" for n in onnx.load(path).graph.node)


@pytest.mark.parametrize("which", ["resnet", "demo"])
def test_packed_and_int8_are_the_same_numbers(which, request):
    path, made = request.getfixturevalue(which)
    given = read_source(path, None, 1)
    plain = convert.with_integers(given, find_layers(given), made.fitted, layout_named("int8"))
    assert plain.opset_import[0].version == given.opset < 21 == made.model.opset_import[0].version
    side = made.source.image.height
    for a, b in zip(run(plain, image(side)), run(made.model, image(side)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max())
    sizes = [len(m.SerializeToString()) for m in (onnx.load(path), plain, made.model)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_resnet_is_close_to_the_float_one(resnet):
    path, made = resnet
    assert error(path, made, image(48)) < 1e-3
    assert len(made.layers) == 13
    assert 4 < made.weight_bits < 4.6


def test_every_kind_of_layer_is_fitted_and_every_bit_counts(photos, tmp_path):
    torch.manual_seed(0)
    small = Small()
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(2)  # torch's own start shrinks what goes through, until nothing depends on the image
    path = exported(small, tmp_path / "small.onnx")
    made = [quantize_onnx(path, photos, weights_only(bits, 4)) for bits in (2, 4, 8)]
    # from dark to bright, what does not change with the image being left out
    pictures = [image(seed=i) * i / 8 for i in range(1, 9)]
    wanted, *found = (np.concatenate([run(m, x)[0] for x in pictures]) for m in (path, *(m.model for m in made)))
    errors = [float(np.square(f - wanted).sum() / np.square(wanted - wanted.mean(0)).sum()) for f in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    ops = [made[0].source.nodes[layer.index].op_type for layer in made[0].layers]
    assert ops.count("Conv") == 7  # plain, grouped, depthwise, odd, mirrored, and the shared one twice
    assert ops.count("MatMul") == 2
    bits = [made[0].fitted[layer.index].weight.bits for layer in made[0].layers]
    assert bits == [8, 2, 8, 2, 2, 2, 2, 2, 8]  # the first, the depthwise and the last little one
    shared = [made[0].fitted[layer.index].weight for layer in made[0].layers[5:7]]
    assert shared[0] is shared[1]
    packed = [t for t in made[0].model.graph.initializer if t.name.startswith("shared.vqk")]
    assert len(packed) == 1


def test_the_fit_on_images_beats_the_weights_alone(photos, tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)]
    path = exported(nn.Sequential(*layers), tmp_path / "net.onnx")
    fitted = quantize_onnx(path, photos, weights_only(bits=2))
    monkeypatch.setattr(convert, "MOST_COLUMNS", 0)
    plain = quantize_onnx(path, photos, weights_only(bits=2))
    smooth = cv2.resize(np.random.default_rng(9).random((6, 8, 3), np.float32), (32, 32)).transpose(2, 0, 1)[None]
    wanted, *found = (run(m, smooth)[0] for m in (path, fitted.model, plain.model))
    ours, others = (float(np.square(f - wanted).mean()) for f in found)
    assert ours < 0.7 * others


def test_a_grouped_convolution_is_its_groups(photos, tmp_path):
    """Each group is fitted as a convolution of its own would be."""
    torch.manual_seed(3)
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2))
    made = quantize_onnx(exported(whole, tmp_path / "whole.onnx"), photos, weights_only(bits=3, block_size=4))
    half = nn.Sequential(whole[0], whole[1], Half(whole[2]))
    one = quantize_onnx(exported(half, tmp_path / "half.onnx"), photos, weights_only(bits=3, block_size=4))
    widths = [[m.fitted[layer.index].weight.bits for layer in m.layers] for m in (made, one)]
    assert widths == [[8, 3], [8, 3]]
    grouped, alone = (m.fitted[m.layers[1].index].weight for m in (made, one))
    assert torch.equal(grouped.vqk[3:], alone.vqk)
    assert torch.equal(grouped.m[3:], alone.m)


class Half(nn.Module):
    """The second group of a convolution of two."""

    def __init__(self, both: nn.Conv2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3)
        self.conv.weight, self.conv.bias = (nn.Parameter(p.detach()[3:]) for p in (both.weight, both.bias))

    def forward(self, x):
        return self.conv(x[:, 4:])


PADDINGS = {
    "uneven": "pads = [0, 1, 2, 3], strides = [2, 2]", "upper": 'auto_pad = "SAME_UPPER", strides = [2, 2]',
    "lower": 'auto_pad = "SAME_LOWER", strides = [3, 3]', "valid": 'auto_pad = "VALID", dilations = [2, 2]',
    "unequal": "strides = [1, 2], dilations = [2, 1]",
}  # fmt: skip


def model_of(text: str, weights: dict[str, np.ndarray], path: Path, opset: int = 17) -> Path:
    """A file of these nodes, from x float[1,3,16,16] unless the text says otherwise."""
    if not text.startswith("("):
        text = f"(float[1,3,16,16] x) => (float y) {{ {text} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> agraph {text}')
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    path.write_bytes(model.SerializeToString())
    return path


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("how", PADDINGS)
def test_padding_strides_and_dilations_are_the_files(how, tmp_path, photos):
    path = model_of(f"y = Conv<{PADDINGS[how]}>(x, w)", {"w": normal(4, 3, 3, 3)}, tmp_path / "conv.onnx")
    source = read_source(path, None, 1)
    (layer,) = find_layers(source)
    x = image(16)
    (wanted,) = run(path, x)
    seen = layer.images(x)
    found = conv(layer.node, seen, layer.weight, None)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    made = quantize_onnx(path, photos, weights_only(layout="int8"))
    assert error(path, made, x) < 1e-3


MATRICES = {
    "gemm": ("y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(f, w, c)", (5, 768), (5,)),
    "gemm turned": ("y = Gemm<alpha = 2.0>(f, w, c)", (768, 5), (1, 5)),
    "gemm one bias": ("y = Gemm(f, w, c)", (768, 5), ()),
    "matmul": ("y = MatMul(f, w)", (768, 5), None),
    "matmul and add": ("p = MatMul(f, w) y = Add(c, p)", (768, 5), (5,)),
    "matmul read twice": ("p = MatMul(f, w) q = Add(p, c) y = Mul(p, q)", (768, 5), (5,)),
    "computed weight": ("t = Transpose<perm = [1, 0]>(w) y = MatMul(f, t)", (5, 768), None),
}  # fmt: skip


@pytest.mark.parametrize("how", MATRICES)
def test_matrix_products_keep_their_meaning(how, tmp_path, photos):
    """At 8 bits: transposed, scaled and biased as they were."""
    text, shape, bias = MATRICES[how]
    weights = {"w": normal(*shape)} | ({} if bias is None else {"c": normal(*bias, seed=1)})
    path = model_of(f"f = Flatten(x) {text}", weights, tmp_path / "matrix.onnx")
    made = quantize_onnx(path, photos, weights_only(8))
    assert error(path, made, image(16)) < 2e-4
    assert "w" not in {t.name for t in made.model.graph.initializer}
    adds = sum(n.op_type == "Add" for n in made.model.graph.node)
    assert adds == {"matmul": 1, "matmul and add": 1, "matmul read twice": 2, "computed weight": 1}.get(how, 0)


def test_one_matrix_read_by_two_products(tmp_path, photos):
    """Found by benchmarks/fuzz.py: both got a Transpose and a sum of the same names."""
    text = "t = Reshape(x, s) p = MatMul(t, w) a = Relu(p) y = MatMul(a, w)"
    path = model_of(text, {"s": np.array([1, 48, 16]), "w": normal(16, 16)}, tmp_path / "tied.onnx")
    made = quantize_onnx(path, photos, weights_only(8))
    assert made.fitted[made.layers[0].index].weight is made.fitted[made.layers[1].index].weight
    assert error(path, made, image(16)) < 1e-3
    assert run(made.float_model(), image(16))[0].shape == (1, 48, 16)


ODD = {
    "two outputs of one node": ("a = Conv(x, w) p, q = Split<axis = 1>(a, n) r = Conv(p, v) s = Conv(q, v) "
                                "y = Add(r, s)", {"v": normal(4, 4, 3, 3), "n": np.array([4, 4])}),
    "a value that a later layer alone reads": ("a = Conv(x, w) r = Relu(a) s = Sigmoid(r) b = Conv(s, v) "
                                               "c = Conv(r, v) y = Sub(b, c)", {"v": normal(8, 8, 3, 3)}),
    "a name of ours within an If": (
        """a = Conv(x, w) m = ReduceSum<keepdims = 0>(a) o = Greater(m, z) y = If<then_branch = t () => (float i)
        { ds_a = Relu(a) i = Neg(ds_a) }, else_branch = e () => (float j) { ds_a = Neg(a) j = Relu(ds_a) }>(o)""",
        {"z": np.float32(0).reshape(())}),
    "a loop": ("""a = Conv<pads = [1, 1, 1, 1]>(x, w) l = Loop<body = b (int64 i, bool c, float[1,8,16,16] h) =>
               (bool d, float[1,8,16,16] k) { d = Identity(c) k = Conv<pads = [1, 1, 1, 1]>(h, v) }>(n, yes, a)
               y = Conv(l, v)""", {"v": normal(8, 8, 3, 3), "n": np.array(2), "yes": np.array(True)}),
    "a shared bias": ("a = Conv(x, w, c) r = Relu(a) y = Conv(r, v, c)", {"v": normal(8, 8, 3, 3), "c": normal(8)}),
    "one matrix, both ways": ("f = Flatten(x) a = Gemm(f, g) b = Gemm(a, v) c = Gemm<transB = 1>(b, v) "
                              "y = MatMul(c, v)", {"g": normal(768, 8), "v": normal(8, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("how", ODD)
def test_odd_but_legal_graphs_keep_their_meaning(how, tmp_path, photos):
    """The first three were found by hand: values that the fit had forgotten, and a name that was taken."""
    text, weights = ODD[how]
    weights = weights if "(x, w" not in text else {**weights, "w": normal(8, 3, 3, 3)}
    path = model_of(text, weights, tmp_path / "odd.onnx")
    path.write_bytes(path.read_bytes().replace(b"ds_a", b"ds.a"))
    for layout in convert.LAYOUTS:
        made = quantize_onnx(path, photos, weights_only(8, layout=layout, samples=2))
        assert error(path, made, image(16)) < 1e-3
        onnx.checker.check_model(made.model)


def test_what_may_be_stored_in_other_ways(tmp_path, photos):
    """Constants as nodes, or as inputs with a default; channels last between the layers; an open batch and sides."""
    text = """(float[N,H,W,3] x) => (float y) { t = Transpose<perm = [0, 3, 1, 2]>(x) a = Conv(t, w, c)
        u = Transpose<perm = [0, 2, 3, 1]>(a) r = Relu(u) s = Transpose<perm = [0, 3, 1, 2]>(r) y = Conv(s, v) }"""
    weights = {"w": normal(8, 3, 3, 3), "c": normal(8), "v": normal(8, 8, 3, 3)}
    plain = model_of(text, weights, tmp_path / "plain.onnx", 11)
    model = onnx.load(plain)
    for tensor in list(model.graph.initializer)[:2]:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)
    (last,) = model.graph.initializer
    model.graph.input.insert(0, helper.make_tensor_value_info(last.name, TensorProto.FLOAT, last.dims))
    other = tmp_path / "other.onnx"
    other.write_bytes(model.SerializeToString())
    found = [quantize_onnx(p, photos, weights_only(imgsz=16, samples=2)) for p in (plain, other)]
    for a, b in zip(*(made.fitted.values() for made in found), strict=True):
        assert torch.equal(a.weight.vqk, b.weight.vqk)
    x = image(16).transpose(0, 2, 3, 1)
    assert np.array_equal(*(run(made.model, x)[0] for made in found))
    assert error(plain, found[0], x) < 0.01
    assert len(found[1].model.graph.input) == 1


def test_a_matrix_product_of_tokens(tmp_path, photos):
    text = "t = Reshape(x, s) p = MatMul(t, w) a = Relu(p) y = MatMul(a, v)"
    weights = {"s": np.array([1, 48, 16]), "w": normal(16, 24), "v": normal(24, 8, seed=2)}
    path = model_of(text, weights, tmp_path / "tokens.onnx")
    made = quantize_onnx(path, photos, weights_only(4, 8))
    assert [tuple(layer.weight.shape) for layer in made.layers] == [(24, 16, 1, 1), (8, 24, 1, 1)]
    assert error(path, made, image(16)) < 0.02


INPUTS = {
    "bytes": ("(uint8[1,3,16,16] x)", "f = Cast<to = 1>(x) y = Conv(f, w)", 3, np.uint8, (1, 3, 16, 16)),
    "half": ("(float16[1,3,16,16] x)", "y = Conv(x, w)", 3, np.float16, (1, 3, 16, 16)),
    "two at once": ("(float[2,3,16,12] x)", "y = Conv(x, w)", 3, np.float32, (2, 3, 16, 12)),
    "grey": ("(float[N,1,16,16] x)", "y = Conv(x, w)", 1, np.float32, (1, 1, 16, 16)),
    "channels last": ("(float[1,16,16,3] x)", "t = Transpose<perm = [0, 3, 1, 2]>(x) y = Conv(t, w)", 3, np.float32,
                      (1, 16, 16, 3)),
}  # fmt: skip


@pytest.mark.parametrize("how", INPUTS)
def test_inputs_of_every_kind(how, tmp_path, photos):
    given, text, channels, kind, shape = INPUTS[how]
    weight = normal(4, channels, 3, 3).astype(np.float16 if how == "half" else np.float32)
    out = "float16 y" if how == "half" else "float y"
    path = model_of(f"{given} => ({out}) {{ {text} }}", {"w": weight}, tmp_path / "input.onnx")
    made = quantize_onnx(path, photos, weights_only(samples=3))
    assert made.images == 3
    x = (np.random.default_rng(0).random(shape) * (255 if kind is np.uint8 else 1)).astype(kind)
    assert error(path, made, x) < 2e-3


def test_pictures_are_placed_as_detectors_and_classifiers_do(photos):
    wanted = ImageInput("x", np.float32, 1, 3, 20, 20)
    whole = cv2.cvtColor(cv2.imread(str(photos / "0.png")), cv2.COLOR_BGR2RGB)  # 30 x 40
    (boxed,), _ = pictures([photos / "0.png"], wanted, PLAIN)
    assert (boxed[[0, 1, -2, -1]] == 114).all()
    assert not (boxed[3] == 114).all()
    (cropped,), _ = pictures([photos / "0.png"], wanted, InputForm(fit="crop"))
    middle = cv2.resize(whole, (27, 20), interpolation=cv2.INTER_LINEAR)[:, 3:23]
    assert np.array_equal(cropped, middle)
    found = as_input([cropped], wanted, InputForm((0.5, 0.25, 0.0), (0.5, 1.0, 2.0)))
    for c, (mean, std) in enumerate([(0.5, 0.5), (0.25, 1.0), (0.0, 2.0)]):
        np.testing.assert_allclose(found[0, c], (middle[..., c] / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_values_are_deleted_after_their_last_use(resnet, photos, monkeypatch):
    """Of 13 layers' inputs two wait at most: that of the layer, and what a residual adds."""
    path, _ = resnet
    waiting = []

    def watch(source, sides, layers, left, count, forget=lockstep._forget):
        forget(source, sides, layers, left, count)
        waiting.append(max(len(list(side.folder.iterdir())) for side in sides))

    monkeypatch.setattr(lockstep, "_forget", watch)
    monkeypatch.setattr(convert, "MOST_COLUMNS", 0)
    quantize_onnx(path, photos, weights_only(samples=1))
    assert len(waiting) == 13
    assert max(waiting) <= 2
    assert waiting[-1] == 0


def test_an_opset_that_cannot_be_raised_is_named_and_int8_keeps_it(tmp_path, photos):
    text = "c = Conv(x, w) y = com.microsoft.QuickGelu(c)"
    path = model_of(text, {"w": normal(4, 3, 3, 3)}, tmp_path / "own.onnx", 12)
    made = quantize_onnx(path, photos, weights_only(layout="int8"))
    assert made.source.opset == 12
    assert error(path, made, image(16)) < 1e-3
    old = model_of("y = Conv(x, w)", {"w": normal(4, 3, 3, 3)}, tmp_path / "old.onnx", 12)
    assert quantize_onnx(old, photos, weights_only()).source.opset == 21


def hostile(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be converted, and what is said of them."""
    w = {"w": normal(4, 3, 3, 3)}
    junk = folder / "junk.onnx"
    junk.write_bytes(b"\x08\x07 not a model")
    outside = onnx.load(model_of("y = Conv(x, w)", w, folder / "base.onnx"))
    (tensor,) = outside.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    (folder / "outside.onnx").write_bytes(outside.SerializeToString())
    circle = onnx.load(folder / "base.onnx")
    circle.graph.node.append(helper.make_node("Relu", ["b"], ["a"]))
    circle.graph.node.append(helper.make_node("Relu", ["a"], ["b"]))
    (folder / "circle.onnx").write_bytes(circle.SerializeToString())
    turned = onnx.load(model_of("a = Relu(x) y = Conv(a, w)", w, folder / "turned.onnx"))
    nodes = list(turned.graph.node)[::-1]
    del turned.graph.node[:]
    turned.graph.node.extend(nodes)
    (folder / "turned.onnx").write_bytes(turned.SerializeToString())
    again = onnx.load(folder / "base.onnx")
    again.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    again.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=again.graph.initializer.pop()))
    (folder / "again.onnx").write_bytes(again.SerializeToString())
    two = "(float[1,3,16,16] x, float[1] z) => (float y) { c = Conv(x, w) y = Mul(c, z) }"
    integers = {"w": np.ones((4, 3, 3, 3), np.int8), "s": np.float32(1) * np.ones(1, np.float32)}
    words = "(float[1,20] x) => (float y) { y = MatMul(x, w) }"
    return {
        "junk": (junk, "is not an ONNX file"),
        "missing": (folder / "none.onnx", "There is no ONNX file"),
        "outside": (folder / "outside.onnx", "outside of its own folder"),
        "circle": (folder / "circle.onnx", "is not an ONNX file|not in the order"),
        "turned": (folder / "turned.onnx", "not in the order"),
        "an input made again": (folder / "again.onnx", "two values of one name"),
        "no conv": (model_of("y = Relu(x)", {}, folder / "none_at_all.onnx"), "no convolution"),
        "weight from the image": (model_of("y = Conv(x, x)", {}, folder / "self.onnx"), "no convolution|not an ONNX"),
        "wrong shapes": (model_of("y = Conv(x, w)", {"w": normal(4, 5, 3, 3)}, folder / "shapes.onnx"),
                         "is not an ONNX file|fails in ONNX Runtime"),
        "two inputs": (model_of(two, w, folder / "two.onnx"), "2 inputs"),
        "words": (model_of(words, {"w": normal(20, 4)}, folder / "words.onnx"), "does not take one image"),
        "quantized": (model_of("d = DequantizeLinear(w, s) y = Conv(x, d)", integers, folder / "q.onnx"),
                      "no convolution"),
        "random": (model_of("u = RandomUniformLike(x) a = Add(x, u) y = Conv(a, w)", w, folder / "random.onnx"),
                   "something else each time"),
        "infinite": (model_of("z = Sub(x, x) i = Div(x, z) y = Conv(i, w)", w, folder / "inf.onnx"), "not finite"),
    }  # fmt: skip


def test_hostile_files_are_one_sentence_and_exit_2(tmp_path, photos, call):
    for name, (path, said) in hostile(tmp_path).items():
        done = call("quantize", path, "--calib", photos, "--out", "out", cwd=tmp_path)
        assert done.code == 2, (name, done.err)
        (line,) = [text for text in done.err.splitlines() if text.startswith("Error: ")]
        assert any(part in line for part in said.split("|")), (name, line)
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()


def test_the_engine_writes_no_log_of_its_own(tmp_path, photos, capfd):
    """It would repeat a file's names as they are, escape codes of terminals included."""
    files = hostile(tmp_path)
    for name in ("circle", "wrong shapes"):
        with pytest.raises(InputError):
            quantize_onnx(files[name][0], photos, weights_only())
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_the_command_writes_one_file_and_says_what_it_did(tmp_path, photos, call):
    path = exported(Small(), tmp_path / "net.onnx")
    arguments = ["quantize", path, "--calib", photos, "--block-size", "4"]
    done = call(*arguments, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    written = tmp_path / said["path"]
    assert said["path"] == "runs/dsconvert/net/net-packed.onnx"
    assert said["size_bytes"] == written.stat().st_size
    assert [row["bits"] for row in said["layers"]] == [8, 4, 8, 4, 4, 4, 4, 4, 8]
    (wanted, *_), (found, *_) = run(path, image()), run(written, image())
    assert np.square(found - wanted).mean() < 0.1 * np.square(wanted).mean()
    again = call(*arguments, "--out", "made.onnx", "-q", "--layout", "int8", cwd=tmp_path)
    assert again.out == "made.onnx\n"
    refused = call(*arguments, "--out", "made.onnx", cwd=tmp_path)
    assert refused.code == 2
    assert "already exists" in refused.err
    before = path.read_bytes()
    (tmp_path / "link.onnx").symlink_to(path)
    for itself in (path, "link.onnx"):
        refused = call(*arguments, "--out", itself, "--force", cwd=tmp_path)
        assert refused.code == 2
        assert "is an input" in refused.err
    assert path.read_bytes() == before
    table = call(*arguments, "--out", "made.onnx", "--force", "-v", "--mean", "0.485,0.456,0.406", cwd=tmp_path)
    assert table.code == 0, table.err
    assert "Converted 9 layers to DSConv" in table.out


def test_options_that_do_not_belong_are_refused(tmp_path, photos, call, work):
    path = model_of("y = Conv(x, w)", {"w": normal(4, 3, 3, 3)}, tmp_path / "net.onnx")
    for wrong, said in {
        ("--blocks", "head"): "--blocks is for a checkpoint", ("--kds", "float"): "--kds is for a checkpoint",
        ("--target-map-drop", "1"): "--target-map-drop is for a checkpoint", ("--imgsz", "32"): "does not fit it",
        ("--layout", "openvino", "--activations", "float"): "is not a layout", ("--std", "0"): "--std above 0",
        ("--mean", "a,b"): "is not numbers",
    }.items():  # fmt: skip
        done = call("quantize", path, "--calib", photos, *wrong, cwd=tmp_path)
        assert done.code == 2, wrong
        assert said in done.err
    assert "give --calib" in call("quantize", path, cwd=tmp_path).err
    done = call("quantize", "best.pt", "--calib", "images", "--layout", "int8", cwd=work)
    assert done.code == 2
    assert "--layout is for an ONNX file" in done.err


def test_a_file_that_computes_something_else_is_not_written(tmp_path, photos, monkeypatch):
    path = exported(Small(), tmp_path / "net.onnx")
    real = convert.with_integers

    def broken(*args):
        made = real(*args)
        cds = next(t for t in made.graph.initializer if t.name.endswith(".cds"))
        cds.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(cds) * np.float32(1.1), cds.name))
        return made

    monkeypatch.setattr(convert, "with_integers", broken)
    with pytest.raises(CheckError, match="something else"):
        quantize_onnx(path, photos, weights_only())


def test_bad_plans_are_one_sentence():
    for wrong in ({"bits": 9}, {"block_size": 0}, {"layout": "fused"}, {"samples": 0}):
        with pytest.raises(InputError):
            weights_only(**wrong)
    with pytest.raises(InputError, match="three numbers"):
        InputForm((0.1, 0.2), (1.0,))
