"""Other inputs than float images, other outputs than all boxes: the same numbers as the plain file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import SIDE
from onnx.reference import ReferenceEvaluator

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.export.ends.decode import Decoded
from dsconvert.export.ends.nms import Nms, add_nms
from dsconvert.export.onnx import Ends, export_float, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.grids import QParams
from dsconvert.graph.ir import INPUT
from dsconvert.scoring.candidates import load_candidate
from dsconvert.yolo.boxes import non_max_suppression
from dsconvert.yolo.lower import lower


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    return session(model).run(None, {"images": image})[0]


def as_bytes(picture) -> np.ndarray:
    return (picture * 255).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("layout", ["packed", "int8"])
@pytest.mark.parametrize("kind", [np.uint8, np.float16])
def test_bytes_and_halves_give_the_float_files_numbers(converted, picture, layout, kind):
    wanted = run(export_quantized(converted, layout_named(layout), SIDE), picture.numpy())
    model = export_quantized(converted, layout_named(layout), SIDE, Ends(input_type=np.dtype(kind).name))
    image = as_bytes(picture) if kind is np.uint8 else picture.numpy().astype(kind)
    assert session(model).get_inputs()[0].type == f"tensor({'uint8' if kind is np.uint8 else 'float16'})"
    assert np.array_equal(run(model, image), wanted)  # a half is within 1/16 of a byte of the float: same integers


def test_every_byte_is_its_own_integer(converted):
    ramp = np.resize(np.arange(256, dtype=np.uint8), (1, 3, SIDE, SIDE))
    wanted = run(export_quantized(converted, layout_named("packed"), SIDE), ramp.astype(np.float32) / 255)
    assert np.array_equal(
        run(export_quantized(converted, layout_named("packed"), SIDE, Ends(input_type="uint8")), ramp), wanted
    )


def test_bytes_need_no_quantizer(converted):
    for layout, reader in (("int8", "DequantizeLinear"), ("packed", "Pad")):  # the latter to whole quads
        model = export_quantized(converted, layout_named(layout), SIDE, Ends(input_type="uint8"))
        assert [n.op_type for n in model.graph.node if "images" in n.input] == [reader]
    plain = [n.op_type for n in export_quantized(converted, layout_named("packed"), SIDE).graph.node]
    assert plain.count("QuantizeLinear") == [n.op_type for n in model.graph.node].count("QuantizeLinear") + 1


def test_bytes_on_another_image_grid_are_quantized_to_it(converted, picture):
    other = replace(converted, activations={**converted.activations, INPUT: QParams(1 / 200, 3)})
    wanted = run(export_quantized(other, layout_named("packed"), SIDE), picture.numpy())
    model = export_quantized(other, layout_named("packed"), SIDE, Ends(input_type="uint8"))
    assert np.array_equal(run(model, as_bytes(picture)), wanted)


def test_bytes_into_float_networks(tiny, converted, picture):
    network, head = tiny
    graph, params = lower(network.fused())
    weights_only = replace(converted, activations={})
    for make in (
        lambda ends: export_float(graph, params, head, SIDE, ends),
        lambda ends: export_quantized(weights_only, layout_named("packed"), SIDE, ends),
    ):
        wanted = run(make(Ends()), picture.numpy())
        assert np.array_equal(run(make(Ends(input_type="uint8")), as_bytes(picture)), wanted)
        halves = run(make(Ends(input_type="float16")), picture.numpy().astype(np.float16))
        # the image itself is rounded to 11 bits; boxes of up to 64 pixels
        np.testing.assert_allclose(halves, wanted, atol=0.1)


@pytest.mark.parametrize("ends", [Ends(), Ends(input_type="uint8"), Ends(input_type="float16")])
def test_evaluation_feeds_each_file_what_it_takes(converted, picture, tmp_path, ends):
    path = tmp_path / "model.onnx"
    path.write_bytes(export_quantized(converted, layout_named("packed"), SIDE, ends).SerializeToString())
    candidate = load_candidate(path, None)
    wanted = run(export_quantized(converted, layout_named("packed"), SIDE), picture.numpy())
    assert np.array_equal(candidate.predict(picture.numpy()), wanted)
    candidate.run_once()


def nms_model(n: int | str, boxes: int, nc: int, nms: Nms) -> onnx.ModelProto:
    """The suppression alone, on predictions as input."""
    b = OnnxBuilder(13)
    parts = ["box", "objectness", "classes"]
    b.nodes.append(onnx.helper.make_node("Split", ["predictions", b.shape(4, 1, nc)], parts, axis=2))
    add_nms(b, Decoded(*parts), nms, "detections")
    return b.model({"predictions": (n, boxes, nc + 5)}, {"detections": ("k", 7)}, {})


def suppress(predictions: np.ndarray, nms: Nms) -> np.ndarray:
    n, boxes, columns = predictions.shape
    return session(nms_model(n, boxes, columns - 5, nms)).run(None, {"predictions": predictions})[0]


HAND = np.array(
    [
        [  # cx, cy, w, h, objectness, two classes
            [50, 50, 20, 20, 1.0, 0.9, 0.0],  # the best cat
            [52, 50, 20, 20, 1.0, 0.8, 0.0],  # overlaps it by 18/22: dropped
            [52, 50, 20, 20, 0.5, 0.0, 1.0],  # the same box is a dog: kept
            [150, 50, 20, 20, 0.5, 0.6, 0.9],  # one box, two classes: 0.3 and 0.45
            [100, 100, 20, 40, 1.0, 0.2, 0.0],  # not sure enough
        ],
        [[10, 10, 4, 4, 0.8, 0.5, 0.0]] + [[0, 0, 1, 1, 0.0, 0.0, 0.0]] * 4,
    ],
    np.float32,
)


def test_hand_made_boxes():
    found = suppress(HAND, Nms(0.25, 0.45, 100))
    wanted = np.array(
        [
            [0, 40, 40, 60, 60, 0.9, 0],
            [0, 42, 40, 62, 60, 0.5, 1],
            [0, 140, 40, 160, 60, 0.45, 1],
            [0, 140, 40, 160, 60, 0.3, 0],
            [1, 8, 8, 12, 12, 0.4, 0],
        ],
        np.float32,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # and by ONNX's own definition of the operators, one image at a time
    reference = ReferenceEvaluator(nms_model(1, 5, 2, Nms())).run(None, {"predictions": HAND[:1]})[0]
    np.testing.assert_allclose(reference, wanted[:4], rtol=1e-6)


def test_most_boxes_counts_for_each_image():
    found = suppress(HAND, Nms(0.25, 0.45, 2))
    np.testing.assert_allclose(found[:, [0, 5]], [[0, 0.9], [0, 0.5], [1, 0.4]], rtol=1e-6)


def test_nothing_found_is_an_empty_table():
    assert suppress(HAND, Nms(0.95)).shape == (0, 7)
    assert suppress(HAND[1:], Nms(0.5)).shape == (0, 7)


@pytest.mark.parametrize("nms", [Nms(), Nms(0.001, 0.6, 300), Nms(0.1, 0.7, 7)])
def test_random_crowds_as_our_own_suppression(nms):
    rng = np.random.default_rng(0)
    places = rng.uniform(60, 580, (6, 2))
    centre = places[rng.integers(0, 6, (3, 150))] + rng.normal(0, 8, (3, 150, 2))
    parts = (centre, rng.uniform(40, 80, (3, 150, 2)), rng.random((3, 150, 4)))
    predictions = np.concatenate(parts, 2).astype(np.float32)
    found = suppress(predictions, nms)
    for image in range(3):
        wanted = non_max_suppression(predictions[image], nms.confidence, nms.iou, nms.most)
        assert len(wanted) > 3
        mine = found[found[:, 0] == image, 1:]
        # corners: float32 in one, float64 in the other, of numbers below 1000
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-4)


def test_the_whole_network_with_suppression(converted, picture):
    both = np.concatenate((picture.numpy(), picture.flip(3).numpy()))
    nms = Nms(0.2, 0.5, 20)
    plain = session(export_quantized(converted, layout_named("packed"), SIDE, Ends(dynamic_batch=True)))
    raw = plain.run(None, {"images": both})[0]
    model = export_quantized(converted, layout_named("packed"), SIDE, Ends(True, "float32", nms))
    running = session(model)
    assert [(o.name, o.shape) for o in running.get_outputs()] == [("detections", ["detections", 7])]
    found = running.run(None, {"images": both})[0]
    for image in range(2):
        wanted = non_max_suppression(raw[image], 0.2, 0.5, 20)
        assert len(wanted) > 3
        np.testing.assert_allclose(found[found[:, 0] == image, 1:], wanted, rtol=0, atol=1e-4)


def test_evaluation_understands_suppressed_files(converted, picture, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(
        export_quantized(converted, layout_named("int8"), SIDE, Ends(nms=Nms(0.2, 0.5, 20))).SerializeToString()
    )
    predictions = load_candidate(path, None).predict(picture.numpy())
    raw = run(export_quantized(converted, layout_named("int8"), SIDE), picture.numpy())
    wanted = non_max_suppression(raw[0], 0.2, 0.5, 20)
    np.testing.assert_allclose(non_max_suppression(predictions[0]), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [{"confidence": 1.5}, {"iou": -0.1}, {"most": 0}])
def test_meaningless_limits_are_refused(bad):
    with pytest.raises(InputError, match="must lie in"):
        Nms(**bad)
