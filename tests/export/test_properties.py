"""Properties that hold for any shape: hypothesis looks for one that breaks them.

Differential tests: the same convolution in ONNX Runtime, in ONNX's own reference evaluator, in torch, and in numpy's
64-bit integers and floats."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from built import HERE
from conftest import convert, smooth_picture, tiny_network
from formats import along, fit_weight, free
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.size import Size
from dsconvert.dsconv.codes import FREE, TRELLIS
from dsconvert.dsconv.codes.trellis_table import fits, from_strings, largest, strings
from dsconvert.dsconv.packing import pack_bits, unpack_bits
from dsconvert.dsconv.tensor import DSTensor, block_count
from dsconvert.export.onnx import Ends, export_quantized
from dsconvert.export.weights.layouts import LAYOUTS, add_int8_weight, layout_named
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv, run_integer
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import run_float
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel
from dsconvert.yolo.decode import decode
from dsconvert.yolo.network import Head

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FITS = settings(max_examples=12, deadline=None)
CLASSES, ANCHORS = 1, 1
CHANNELS = ANCHORS * (CLASSES + 5)  # of a detection map


@st.composite
def weights(
    draw: st.DrawFn, cho: int | None = None, chi: int | None = None, k: int | None = None, most: int = 127
) -> DSTensor:
    """Any DSConv weight: every width, block size, ragged last block; merged at most `most`."""
    chi = chi or draw(st.integers(1, 20) | st.sampled_from([8, 16, 24]))
    block = draw(st.integers(1, 24) | st.sampled_from([8, 24]))
    bits = draw(st.integers(1 if fits(1, chi, block) else 2, 8))
    k = k or draw(st.integers(1, 4))
    cho = cho or draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = (cho, block_count(chi, block), k, k)
    cds = torch.from_numpy(rng.uniform(1e-4, 0.1, cho).astype(np.float32))
    if bits == 1 or (fits(bits, chi, block) and draw(st.booleans())):
        code = torch.from_numpy(rng.integers(0, 1 << bits, (cho, chi, k, k)).astype(np.uint8))
        m = rng.integers(1, min(TRELLIS.most_m(bits), most // largest(bits)) + 1, blocks).astype(np.int8)
        return DSTensor(code, torch.from_numpy(m), cds, along(bits, block))
    low, high = FREE.limits(bits)
    low, high = max(low, -most), min(high, most)
    vqk = rng.integers(low, high + 1, (cho, chi, k, k)).astype(np.int8)
    m = rng.integers(1, min(FREE.most_m(bits), max(1, most // -low)) + 1, blocks).astype(np.int8)
    return DSTensor(torch.from_numpy(vqk), torch.from_numpy(m), cds, free(bits, block))


@st.composite
def models(draw: st.DrawFn) -> DSModel:
    """A detector of two convolutions: one of any kernel, stride, dilation and groups, and Detect's 1x1."""
    k, stride, dilation = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = dilation * (k - 1) // 2
    # the map must be the image's side / stride, which no padding gives an even span at stride 1
    assume(0 <= dilation * (k - 1) - 2 * padding <= stride - 1)
    groups = draw(st.sampled_from([1, 3]))
    middle = 3 * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def conv(cho: int, chi: int, k: int) -> QConv:
        # CPUs without VNNI add pairs of products in 16 bits: fitted weights stay below that, and so do these
        return QConv(draw(weights(cho, chi, k, 64)), torch.from_numpy(rng.normal(0, 1, cho).astype(np.float32)))

    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    first = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    nodes = [Node("conv", "model.0.conv", (INPUT,), first)]
    convs = {"model.0.conv": conv(middle, 3 // groups, k), "model.1.m.0": conv(CHANNELS, middle, 1)}
    kind = draw(st.sampled_from(["SiLU", "ReLU", "LeakyReLU", "Hardswish"]))
    nodes.append(Node("act", "model.0.act", ("model.0.conv",), {"kind": kind}))
    nodes.append(Node("conv", "model.1.m.0", ("model.0.act",), plain))
    grids = {n.name: QParams(float(np.float32(rng.uniform(0.01, 0.3))), int(rng.integers(0, 256))) for n in nodes}
    grids[INPUT] = QParams.of_range(0, 1)
    head = Head(("a",), (stride,), (((8.0, 6.0),),))
    side = stride * draw(st.integers(2, 6))
    return DSModel(Graph(tuple(nodes), ("model.1.m.0",)), convs, grids, head, Size.of(side), {})


def image_of(model: DSModel, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, *model.imgsz.image), generator=generator).float() / 255


def onnx_bytes(model: DSModel, layout: str) -> bytes:
    return export_quantized(model, layout_named(layout), model.imgsz).SerializeToString(deterministic=True)


def exposed(model: DSModel, layout: str) -> onnx.ModelProto:
    """The exported file with every integer as a further output."""
    file = export_quantized(model, layout_named(layout), model.imgsz)
    for node in model.graph.nodes:
        file.graph.output.append(onnx.helper.make_tensor_value_info(f"{node.name}.q", onnx.TensorProto.UINT8, None))
    return file


# --- storage --------------------------------------------------------------------------------------------------------


@FEW
@given(weights(), st.sampled_from(["packed", "blocked", "int8"]))
def test_every_weight_survives_every_layout(weight, layout):
    """The ONNX nodes, by ONNX's own definition, give m * VQK; as does plain numpy."""
    b = OnnxBuilder(LAYOUTS[layout].opset)
    name = add_int8_weight(b, "w", weight, layout_named(layout))
    b.node("Cast", [name], "out", to=onnx.TensorProto.FLOAT)
    model = b.model({}, {"out": tuple(weight.vqk.shape)}, {})
    (found,) = ReferenceEvaluator(model).run(None, {})
    wanted = np.empty(weight.vqk.shape)
    cho, chi, kh, kw = weight.vqk.shape
    for o, i, y, x in itertools.product(range(cho), range(chi), range(kh), range(kw)):
        block = (o, i // weight.block_size, y, x)
        wanted[o, i, y, x] = int(weight.m[block]) * int(weight.vqk[o, i, y, x])
    assert np.array_equal(found, wanted)
    assert np.array_equal(weight.merged().numpy(), wanted)
    assert np.abs(wanted).max() <= 127


@FEW
@given(weights())
def test_packed_bits_come_back_and_are_no_more_than_needed(weight):
    coded = weight.format.code == TRELLIS
    stored = strings(weight.stored, weight.block_size).numpy() if coded else weight.vqk.numpy()
    packed = pack_bits(stored, weight.bits)
    assert packed.size == -(-weight.vqk.numel() * weight.bits // 8)
    found = unpack_bits(packed, weight.bits, stored.shape, signed=not coded)
    assert np.array_equal(found.astype(stored.dtype), stored)
    if coded:
        back = from_strings(torch.from_numpy(stored), tuple(weight.vqk.shape), weight.block_size)
        assert torch.equal(back, weight.stored)
    kds = pack_bits(weight.m.numpy(), 4)
    assert np.array_equal(unpack_bits(kds, 4, tuple(weight.m.shape), signed=False), weight.m.numpy())


@settings(FEW, max_examples=15)
@given(models())
def test_a_model_file_read_and_written_is_the_same_file(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    path.write_bytes(model_bytes(model))
    read = load_model(path)
    assert model_bytes(read) == path.read_bytes()
    for layout in set(HERE) - {"float"}:  # which has float activations
        first, second = (
            export_quantized(m, layout_named(layout), m.imgsz).SerializeToString(deterministic=True)
            for m in (model, read)
        )
        assert first == second  # exporting what was read gives the same bytes, and so does exporting it again


# --- arithmetic -----------------------------------------------------------------------------------------------------


@FEW
@given(models(), st.sampled_from(["packed", "blocked", "int8"]), st.integers(0, 99))
def test_onnx_runtime_gives_torchs_integers(model, layout, seed):
    x = image_of(model, seed)
    file = exposed(model, layout)
    running = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    out, *integers = running.run(None, {INPUT: x.numpy()})
    mine: dict[str, torch.Tensor] = {}
    raw = run_integer(model.graph, model.convs, model.activations, x, lambda n, v: mine.__setitem__(n, v.clone()))
    for node, found in zip(model.graph.nodes, integers, strict=True):
        assert np.array_equal(found, mine[node.name].numpy()), node.name
    # equal integers, decoded in float32 by two libraries: pixels below 100
    np.testing.assert_allclose(out, decode(raw, model.head).numpy(), rtol=1e-5, atol=1e-4)


@FEW
@given(models(), st.integers(0, 99))
def test_torchs_integers_are_numpys(model, seed):
    """The first convolution, element by element in 64-bit integers and one float32 multiplication."""
    x = image_of(model, seed)
    mine: dict[str, torch.Tensor] = {}
    run_integer(model.graph, model.convs, model.activations, x, lambda n, v: mine.__setitem__(n, v.clone()))
    node, source = model.graph.nodes[0], model.activations[INPUT]
    conv, target = model.convs[node.name], model.activations[node.name]
    q = mine[INPUT].numpy().astype(np.int64)
    assert np.array_equal(q, np.rint(x.numpy().astype(np.float64) * 255))
    acc = conv_int64(q - source.zero_point, conv.weight.merged().numpy(), node.attrs)
    acc += conv.bias_int(source.scale).numpy().astype(np.int64)[:, None, None]
    unit = np.float32(source.scale) * conv.weight.cds_w.numpy()
    multiplier = (unit / np.float32(target.scale)).astype(np.float32)[:, None, None]
    wanted = np.clip(np.rint(acc.astype(np.float32) * multiplier) + target.zero_point, 0, 255)
    assert np.array_equal(mine[node.name].numpy(), wanted)


def conv_int64(x: np.ndarray, weight: np.ndarray, attrs) -> np.ndarray:
    """A convolution as its definition says, in 64-bit integers."""
    stride, padding, dilation, groups = (attrs[k] for k in ("stride", "padding", "dilation", "groups"))
    cho, chi, k, _ = weight.shape
    x = np.pad(x[0], ((0, 0), (padding, padding), (padding, padding)))
    side = (x.shape[1] - dilation * (k - 1) - 1) // stride + 1
    out = np.zeros((1, cho, side, side), np.int64)
    for o, y, c in itertools.product(range(cho), range(side), range(side)):
        first = o // (cho // groups) * chi
        patch = x[first : first + chi, y * stride :: dilation, c * stride :: dilation][:, :k, :k]
        out[0, o, y, c] = (patch * weight[o].astype(np.int64)).sum()
    return out


@FEW
@given(models(), st.integers(0, 99))
def test_layout_fused_gives_packeds_numbers(model, seed):
    """Its operators are ONNX Runtime's own; the exported file is what it makes of packed when it loads that."""
    x = image_of(model, seed)
    packed, fused = (
        ort.InferenceSession(onnx_bytes(model, layout), providers=["CPUExecutionProvider"])
        for layout in ("packed", "fused")
    )
    assert np.array_equal(packed.run(None, {INPUT: x.numpy()})[0], fused.run(None, {INPUT: x.numpy()})[0])


@FEW
@given(models(), st.sampled_from(["packed", "blocked"]), st.integers(0, 99))
def test_onnxs_reference_evaluator_agrees_but_for_ties(model, layout, seed):
    """It computes in float between the quantizers: a value within float32 rounding of a tie may fall the other way."""
    x = image_of(model, seed)
    file = exposed(model, layout)
    found = ReferenceEvaluator(file).run(None, {INPUT: x.numpy()})[1]  # the first convolution: no error before it
    mine: dict[str, torch.Tensor] = {}
    run_integer(model.graph, model.convs, model.activations, x, lambda n, v: mine.__setitem__(n, v.clone()))
    off = np.abs(found.astype(int) - mine[model.graph.nodes[0].name].numpy())
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.02


@FEW
@given(models(), st.integers(0, 99))
def test_integers_are_the_float_network_within_half_a_step(model, seed):
    """numpy float64: dequantized weights and the image give every unclipped output of the first layer to within the
    half step that rounding to its grid allows, and the half unit of its rounded bias."""
    x = image_of(model, seed)
    node = model.graph.nodes[0]
    conv, grid = model.convs[node.name], model.activations[node.name]
    mine: dict[str, torch.Tensor] = {}
    run_integer(model.graph, model.convs, model.activations, x, lambda n, v: mine.__setitem__(n, v.clone()))
    real = conv.weight.weight().double()
    pixels = mine[INPUT].double() / 255
    a = node.attrs
    wanted = torch.nn.functional.conv2d(
        pixels, real, conv.bias.double(), a["stride"], a["padding"], a["dilation"], a["groups"]
    )
    q = mine[node.name]
    unclipped = (q > 0) & (q < 255)
    unit = conv.weight.cds_w.double()[:, None, None] / 255
    # float32 multiplication: 2^-23 of the value besides
    allowed = 0.5 * grid.scale + 0.5 * unit + 3e-7 * wanted.abs() + 1e-7
    excess = ((grid.dequantize(q).double() - wanted).abs() - allowed)[unclipped]
    assert excess.numel() == 0 or float(excess.max()) <= 0


@FEW
@given(models(), st.integers(0, 99))
def test_weights_only_files_are_the_float_network(model, seed):
    model = DSModel(model.graph, model.convs, {}, model.head, model.imgsz, {})
    x = image_of(model, seed)
    params = {name: ConvParams(c.weight.weight(), c.bias) for name, c in model.convs.items()}
    wanted = decode(run_float(model.graph, params, x), model.head).numpy()
    file = export_quantized(model, layout_named("packed"), model.imgsz, Ends())
    running = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    # float32 sums in another order, of terms up to a few hundred
    np.testing.assert_allclose(running.run(None, {INPUT: x.numpy()})[0], wanted, rtol=1e-3, atol=1e-3)


# --- fits -----------------------------------------------------------------------------------------------------------


def rounding(weight: torch.Tensor, squares: float) -> float:
    """By how much a squared error may change when W' is rounded to float32, as CDSw and products are, three times at
    most: 2 |e| |change| (Cauchy and Schwarz). Where a baseline is the best there is, the fit finds that very one."""
    return 2 * (squares * float(weight.double().square().sum())) ** 0.5 * 3 * 2**-24


def error(weight: torch.Tensor, fitted: DSTensor) -> float:
    return float((fitted.weight().double() - weight.double()).square().sum())


@st.composite
def layers(draw: st.DrawFn, powers: tuple[float, ...] = (0.5, 1.0, 3.0)) -> torch.Tensor:
    """Weights of a whole layer (32, chi, k, k), with tails from light to heavy: powers of Gaussian numbers."""
    k = draw(st.integers(1, 3))
    shape = (32, draw(st.integers(16, 40)), k, k)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    power, scale = draw(st.sampled_from(powers)), draw(st.sampled_from([1e-4, 1.0, 100.0]))
    drawn = rng.normal(size=shape)
    return torch.from_numpy((scale * np.sign(drawn) * np.abs(drawn) ** power).astype(np.float32))


@FITS
@given(layers(), st.integers(2, 5), st.integers(4, 40))
def test_a_fit_is_never_worse_than_rounding_to_the_largest_weight(weight, bits, block):
    """The baseline everyone starts from: one scale a channel, its largest weight at the end of the grid, m = 1.

    Over a layer; single channels can lose, as the alternation of integers and scales stops where neither alone helps,
    and at 6 and 7 bits there is little left to gain."""
    fitted = fit_weight(weight, bits, block)
    _, high = FREE.limits(bits)
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / high
    rounded = float((torch.round(weight / scale) * scale - weight).double().square().sum())
    assert error(weight, fitted) <= rounded + rounding(weight, rounded)


@FITS
@given(layers(), st.integers(4, 40))
def test_every_further_bit_fits_better(weight, block):
    errors = [error(weight, fit_weight(weight, bits, block)) for bits in range(2, 8)]
    assert all(b < a for a, b in itertools.pairwise(errors)), errors


@FITS
@given(layers(), st.sampled_from([8, 16, 32]))
def test_every_further_bit_along_a_trellis_fits_better(weight, block):
    weight = weight[:, : weight.shape[1] // block * block]
    assume(weight.shape[1])
    errors = [error(weight, fit_weight(weight, bits, block, trellis=True)) for bits in (1, 2, 3, 4)]
    assert all(b < a for a, b in itertools.pairwise(errors)), errors


@FITS
@given(layers(), st.integers(2, 8), st.integers(4, 40))
def test_fitting_what_was_fitted_loses_little(weight, bits, block):
    """A fitted weight lies on its own grid; the fit need not find that very grid again, but one nearly as good."""
    once = fit_weight(weight, bits, block if bits < 8 else weight.shape[1])
    again = fit_weight(once.weight(), bits, once.block_size)
    assert error(once.weight(), again) <= error(weight, once) + 1e-6 * float(weight.double().square().sum())


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_fits_scale_with_their_weights(scale):
    """Powers of two move nothing but CDSw."""
    weight = torch.randn(4, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    one, other = fit_weight(weight, 4, 8), fit_weight(weight * scale, 4, 8)
    assert torch.equal(one.vqk, other.vqk)
    assert torch.equal(one.m, other.m)
    assert torch.equal(one.cds_w * scale, other.cds_w)


def test_exporting_twice_gives_the_same_bytes():
    model = convert(*tiny_network(), smooth_picture())
    for layout in set(HERE) - {"float"}:  # which has float activations
        assert onnx_bytes(model, layout) == onnx_bytes(model, layout)
