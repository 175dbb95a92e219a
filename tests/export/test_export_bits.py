"""No bit of an exported file's numbers, and no constant of its decoding, can be wrong unnoticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import DEMO, SIDE, convert, smooth_picture, tiny_network, widen, with_real_shifts
from onnx import numpy_helper

from dsconvert.base.errors import CheckError
from dsconvert.base.size import Size
from dsconvert.dsconv.codes import TRELLIS
from dsconvert.export import check, stored
from dsconvert.export.check import check_export, check_images, float_reference, reference_of
from dsconvert.export.ends import decode
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, export_float, export_quantized, write_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.model.model import DSModel
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import decode as boxes_of
from dsconvert.yolo.lower import lower

PLAIN = Ends()
DEMO_SIDE = 64
LAYOUTS = ("packed", "fused", "blocked", "int8")


@pytest.fixture(scope="module")
def widths() -> DSModel:
    """Every width and every spelling of a weight."""
    return widen(convert(*tiny_network(), smooth_picture()))


@pytest.fixture(scope="module")
def reals() -> DSModel:
    """The paper's real shifts, float activations."""
    return with_real_shifts(convert(*tiny_network(), smooth_picture()))


@pytest.fixture(scope="module")
def demo() -> DSModel:
    """The demo network."""
    checkpoint = load_checkpoint(DEMO / "demo.pt")
    checkpoint.network.requires_grad_(False)
    return replace(convert(checkpoint.network, checkpoint.head, smooth_picture()), imgsz=Size.of(DEMO_SIDE))


def flipped(tensor: onnx.TensorProto, bit: int) -> onnx.TensorProto:
    """The tensor with one bit of its bytes the other way."""
    made = onnx.TensorProto()
    made.CopyFrom(tensor)
    data = bytearray(made.raw_data)
    data[bit // 8] ^= 1 << bit % 8
    made.raw_data = bytes(data)
    return made


def with_tensor(model: onnx.ModelProto, index: int, tensor: onnx.TensorProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.initializer[index].CopyFrom(tensor)
    return made


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, "float"])
def test_a_flipped_bit_of_any_stored_tensor_is_noticed(widths, reals, layout):
    """Of everything that is stored, constants too, a bit of some bytes, the last among them."""
    model = reals if layout == "float" else widths
    reference = reference_of(model, layout_named(layout))
    file = export_quantized(model, layout_named(layout), SIDE)
    again = reference.again(SIDE, PLAIN).model
    assert stored._other_bytes(file, again, reference) is None
    tried = 0
    for index, tensor in enumerate(file.graph.initializer):
        last = len(tensor.raw_data) - 1
        for byte in {0, last // 3, last // 2, last}:
            other = with_tensor(file, index, flipped(tensor, 8 * byte + (byte + index) % 8))
            assert stored._other_bytes(other, again, reference) is not None, tensor.name
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_is_laid_to_its_layer(widths, layout):
    """By the check that the command makes; the bit is of the last number, whatever stands there."""
    reference, images = reference_of(widths, layout_named(layout)), check_images(SIDE)
    file = export_quantized(widths, layout_named(layout), SIDE)
    for part in ("kds", "vqk", "cds", "weight", "bias"):
        found = [i for i, t in enumerate(file.graph.initializer) if t.name.startswith("model.") and part in t.name]
        if not found:
            assert (layout, part) in {("int8", "kds"), ("int8", "vqk"), *((x, "bias") for x in LAYOUTS if x != "int8")}
            continue
        tensor = file.graph.initializer[found[-1]]
        other = with_tensor(file, found[-1], flipped(tensor, 8 * len(tensor.raw_data) - 8))
        layer = tensor.name.rsplit(f".{part}", 1)[0]
        with pytest.raises(CheckError, match=rf"at layer {layer}, so it was not written"):
            check_export(other.SerializeToString(), reference, PLAIN, images)


def test_a_flipped_bit_of_the_joint_biases_is_laid_to_its_layer(widths):
    reference = reference_of(widths, layout_named("packed"))
    file = export_quantized(widths, layout_named("packed"), SIDE)
    index = next(i for i, t in enumerate(file.graph.initializer) if t.name == "bias.low")
    again, convs = reference.again(SIDE, PLAIN).model, widths.graph.convs()
    place = 0
    for node in convs:
        other = with_tensor(file, index, flipped(file.graph.initializer[index], 16 * place))
        assert stored._other_bytes(other, again, reference) == node.name.removesuffix(".conv")
        place += len(widths.convs[node.name].bias)


def test_flipped_bits_of_a_float_file_are_noticed():
    network, head = tiny_network()
    graph, params = lower(network.fused())
    reference, file = float_reference(graph, params, head), export_float(graph, params, head, SIDE)
    images = check_images(SIDE)
    check_export(file.SerializeToString(), reference, PLAIN, images)
    again = reference.again(SIDE, PLAIN).model
    for index, tensor in enumerate(file.graph.initializer):
        other = with_tensor(file, index, flipped(tensor, 0))  # the last bit of a float32, or of a shape
        assert stored._other_bytes(other, again, reference) is not None
    index = next(i for i, t in enumerate(file.graph.initializer) if t.name == "model.4.cv2.weight")
    other = with_tensor(file, index, flipped(file.graph.initializer[index], 0))
    with pytest.raises(CheckError, match=r"at layer model\.4\.cv2,"):
        check_export(other.SerializeToString(), reference, PLAIN, images)


@pytest.mark.parametrize("layout", [*LAYOUTS, "float"])
def test_what_the_nodes_make_of_the_bytes_is_held_against_the_model(widths, reals, layout):
    """Without the file made once more: an exporter that is wrong is wrong twice."""
    model = reals if layout == "float" else widths
    written, reference = write_quantized(model, layout_named(layout), SIDE), reference_of(model, layout_named(layout))
    file, weights = written.model, written.weights
    assert stored._other_numbers(file, reference, weights) is None
    for node in (*model.graph.convs()[:4], *model.graph.convs()[-2:]):
        conv = model.convs[node.name]
        cds, bias = conv.weight.cds_w.clone(), conv.bias.clone()
        cds[-1] = float(np.nextafter(np.float32(cds[-1]), np.float32(9)))
        bias[-1] = bias[-1] + 1
        vqk = conv.weight.vqk.clone()
        vqk[-1, -1, -1, -1] = 0 if vqk[-1, -1, -1, -1] else 1
        changes = [replace(conv, bias=bias), replace(conv, weight=replace(conv.weight, cds_w=cds))]
        if conv.weight.format.code != TRELLIS:
            changes.append(replace(conv, weight=replace(conv.weight, stored=vqk)))
        for changed in changes:
            other = reference_of(replace(model, convs={**model.convs, node.name: changed}), layout_named(layout))
            assert stored._other_numbers(file, other, weights) == node.name.removesuffix(".conv")


def test_a_compacted_file_that_is_not_the_named_one_is_refused(widths):
    file = export_quantized(widths, layout_named("packed"), SIDE)
    named, reference = file.SerializeToString(), reference_of(widths, layout_named("packed"))
    short = stored.compact(file)
    check_export(short.SerializeToString(deterministic=True), reference, PLAIN, check_images(SIDE), named)
    index = next(i for i, t in enumerate(short.graph.initializer) if t.name == "model.7.cv3.kds")
    other = with_tensor(short, index, flipped(short.graph.initializer[index], 0))
    with pytest.raises(CheckError, match=r"at layer model\.7\.cv3,"):
        check_export(other.SerializeToString(deterministic=True), reference, PLAIN, check_images(SIDE), named)
    short.graph.node[-1].name = "another"
    with pytest.raises(CheckError, match="at layer Detect,"):
        check_export(short.SerializeToString(deterministic=True), reference, PLAIN, check_images(SIDE), named)


# --- the decoding ---------------------------------------------------------------------------------------------------


def tail_of(file: onnx.ModelProto, maps: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The decoding alone, from the graph's last maps to the boxes."""
    left, needed = [file.graph.output[0].name], set()
    makers = {out: i for i, node in enumerate(file.graph.node) for out in node.output}
    while left:
        name = left.pop()
        if name in makers and name not in maps and makers[name] not in needed:
            needed.add(makers[name])
            left += file.graph.node[makers[name]].input
    made = onnx.ModelProto()
    made.CopyFrom(file)
    del made.graph.node[:], made.graph.input[:], made.graph.initializer[:]
    made.graph.node.extend(file.graph.node[i] for i in sorted(needed))
    read = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(t for t in file.graph.initializer if t.name in read)
    kind = onnx.helper.np_dtype_to_tensor_dtype
    made.graph.input.extend(onnx.helper.make_tensor_value_info(n, kind(a.dtype), a.shape) for n, a in maps.items())
    return made


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)


def others(value: np.generic) -> list[object]:
    if value.dtype == bool:
        return [not value]
    return [0, 2 * int(value) % 256] if value.dtype == np.uint8 else [0, 2 * value]


@pytest.mark.parametrize("layout", ["packed", "int8"])
def test_each_constant_of_the_demos_decoding_is_told_from_decoding_it_here(demo, layout):
    """Each number of it for itself, zeroed and doubled: anchors, strides, cells, the grids of the maps."""
    file, reference = export_quantized(demo, layout_named(layout), DEMO_SIDE), reference_of(demo, layout_named(layout))
    names = {name: f"{name}.q" for name in demo.graph.outputs}
    whole = onnx.ModelProto()
    whole.CopyFrom(file)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values())
    image = check_images(DEMO_SIDE)[0][None].astype(np.float32) / np.float32(255)
    maps = dict(zip(names.values(), run(whole, {"images": image}), strict=True))
    raw = [reference.real(name, torch.from_numpy(maps[stored]).float()) for name, stored in names.items()]
    wanted, tail = [boxes_of(raw, demo.head).numpy()], tail_of(file, maps)

    def same(model: onnx.ModelProto) -> bool:
        return check._close(check._compared(run(model, maps), wanted, demo.head.nc, DEMO_SIDE), *check.EXACT)

    assert same(tail)
    tried = 0
    for index, tensor in enumerate(tail.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype not in (np.float32, np.uint8, bool):  # shapes
            continue
        places = [(0,), (1,)] if values.dtype == bool else list(np.ndindex(values.shape))  # of x and y alone
        for place, other in [(at, other) for at in places for other in others(values[at])]:
            changed = values.copy()
            changed[place] = other
            told = with_tensor(tail, index, numpy_helper.from_array(changed, tensor.name))
            assert np.array_equal(changed, values) or not same(told), (tensor.name, place)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("how", ["an anchor doubled", "a column zeroed"])
def test_a_wrong_number_of_the_decoding_is_laid_to_detect(demo, monkeypatch, how):
    """The stored bytes are not looked at: as if the exporter itself were wrong."""
    monkeypatch.setattr(check, "wrong_layer", lambda *args: None)
    file = export_quantized(demo, layout_named("int8"), DEMO_SIDE)
    reader = "detect.square.wide" if how == "an anchor doubled" else "detect.0.xyxy"
    name = next(n for n in file.graph.node if n.output[0] == reader).input[how == "a column zeroed"]
    index = next(i for i, t in enumerate(file.graph.initializer) if t.name == name)
    values = numpy_helper.to_array(file.graph.initializer[index]).copy()
    values.flat[3] *= 2 if how == "an anchor doubled" else 0
    other = with_tensor(file, index, numpy_helper.from_array(values, name))
    with pytest.raises(CheckError, match="at layer Detect,"):
        check_export(
            other.SerializeToString(), reference_of(demo, layout_named("int8")), PLAIN, check_images(DEMO_SIDE)
        )


@pytest.mark.parametrize(("layout", "ends"), [("packed", PLAIN), ("fused", PLAIN), ("int8", Ends(nms=Nms()))])
def test_an_exporter_with_a_wrong_tail_is_refused(demo, monkeypatch, layout, ends):
    """Wrong whenever it is asked, so that writing the file once more shows nothing: strides and grids."""
    reference, images = reference_of(demo, layout_named(layout)), check_images(DEMO_SIDE)
    rows, table = decode._rows, decode._table

    def longer(b, values, name, sides):
        return rows(b, [[(*row[:3], row[3] * 1.001) for row in level] for level in values], name, sides)

    def coarser(b, maps, *rest):
        grids = [replace(raw, grid=replace(raw.grid, scale=raw.grid.scale * 1.01)) for raw in maps]
        return table(b, grids, *rest)

    for name, wrong in (("_rows", longer), ("_table", coarser)):
        monkeypatch.setattr(decode, name, wrong)
        file = export_quantized(demo, layout_named(layout), DEMO_SIDE, ends)
        with pytest.raises(CheckError, match="at layer Detect,"):
            check_export(file.SerializeToString(), reference, ends, images)
        monkeypatch.undo()
    file = export_quantized(demo, layout_named(layout), DEMO_SIDE, ends)
    check_export(file.SerializeToString(), reference, ends, images)


def test_limits_of_the_suppression_are_numbers_of_the_file(demo):
    """Nothing that is run shows that a threshold is another one."""
    ends = Ends(nms=Nms(0.2, 0.5, 9))
    file = export_quantized(demo, layout_named("packed"), DEMO_SIDE, Ends(nms=Nms(0.21, 0.5, 9)))
    with pytest.raises(CheckError):
        check_export(
            file.SerializeToString(), reference_of(demo, layout_named("packed")), ends, check_images(DEMO_SIDE)
        )


# --- roundings ------------------------------------------------------------------------------------------------------


def test_so_many_integers_may_be_rounded_otherwise_and_no_more():
    wanted = torch.zeros(1, 10, 10, 10)
    for count, same in ((0, True), (10, True), (11, False), (400, False)):
        found = wanted.clone()
        found.view(-1)[:count] = 1
        assert check._same(found, wanted, True) is same, count
    found = wanted.clone()
    found[0, 0, 0, 0] = 2
    assert not check._same(found, wanted, True)
