"""Files whose batch size, height and width are open."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from test_segmentation import segment  # noqa: F401 (a fixture)

from dsconvert.base.errors import InputError
from dsconvert.export.check import check_export, check_images, float_reference, reference_of
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import PLAIN, Ends, export_float, export_quantized
from dsconvert.export.weights.layouts import LAYOUTS, layout_named
from dsconvert.graph.run import run_float
from dsconvert.yolo.decode import decode
from dsconvert.yolo.lower import lower

OPEN = Ends(open_size=True)
SIZES = [(64, 64), (32, 96), (40, 8)]


def run(data: bytes, images: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(data).run(None, {"images": images})


@pytest.mark.parametrize(
    "layout", [name for name, v in LAYOUTS.items() if not (v.real or v.quick) and v.rounds_between]
)
def test_one_file_is_every_fixed_one(converted, layout):
    """Layouts that are written alike for every size: the same operators stand before the decoding."""
    data = export_quantized(converted, layout_named(layout), 64, OPEN).SerializeToString()
    rng = np.random.default_rng(0)
    for size in SIZES:
        fixed = export_quantized(converted, layout_named(layout), size).SerializeToString()
        images = rng.random((2, 3, *size), np.float32)
        (found,) = run(data, images)
        for i in range(2):
            np.testing.assert_allclose(found[i : i + 1], run(fixed, images[i : i + 1])[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "layout", [name for name, v in LAYOUTS.items() if not (v.real or v.fused) and v.rounds_between]
)
def test_it_computes_the_models_integers_at_every_size(converted, layout, size):
    data = export_quantized(converted, layout_named(layout), 64, OPEN).SerializeToString()
    check_export(data, reference_of(converted, layout_named(layout)), OPEN, check_images(size))


@pytest.mark.parametrize("ends", [Ends(input_type="uint8", nms=Nms(0.001), open_size=True),
                                  Ends(input_type="float16", open_size=True)])  # fmt: skip
def test_with_other_ends(converted, ends):
    packed = layout_named("packed")
    data = export_quantized(converted, packed, 64, ends).SerializeToString()
    check_export(data, reference_of(converted, packed), ends, check_images((32, 96)))


def test_the_float_network(tiny):
    network, head = tiny
    graph, params = lower(network.fused())
    data = export_float(graph, params, head, 64, OPEN).SerializeToString()
    image = torch.rand(1, 3, 32, 96, generator=torch.Generator().manual_seed(0))
    wanted = decode(run_float(graph, params, image), head).numpy()
    np.testing.assert_allclose(run(data, image.numpy())[0], wanted, rtol=1e-3, atol=1e-3)
    check_export(data, float_reference(graph, params, head), OPEN, check_images((32, 96)))


def test_masks_and_prototypes(segment):  # noqa: F811
    network, head = segment
    graph, params = lower(network.fused())
    data = export_float(graph, params, head, 64, OPEN).SerializeToString()
    assert [o.shape for o in ort.InferenceSession(data).get_outputs()] == [
        ["batch", "boxes", 5 + head.nc + head.nm], ["batch", head.nm, "mask_height", "mask_width"],
    ]  # fmt: skip
    check_export(data, float_reference(graph, params, head), OPEN, check_images((32, 96)))


@pytest.mark.parametrize("layout", ["fused", "openvino"])
def test_some_layouts_need_a_size(converted, layout):
    with pytest.raises(InputError, match=f"layout {layout} needs one image size; leave out dynamic"):
        export_quantized(converted, layout_named(layout), 64, OPEN)
    assert export_quantized(converted, layout_named(layout), 64, PLAIN)


def test_openvino_runs_the_float_network_at_every_size(tiny):
    core = pytest.importorskip("openvino").Core()
    network, head = tiny
    graph, params = lower(network.fused())
    data = export_float(graph, params, head, 64, OPEN).SerializeToString()
    engine = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in SIZES:
        images = np.random.default_rng(0).random((2, 3, *size), np.float32)
        np.testing.assert_allclose(engine([images])[0], run(data, images)[0], rtol=1e-3, atol=1e-3)


def test_it_is_measured_at_the_size_that_is_asked_for(work, call):
    done = call("export", "best.pt", "--dynamic", "--imgsz", "64", "--out", "open.onnx", cwd=work)
    assert done.code == 0, done.err
    for size in (("64",), ("32", "96")):
        done = call("compare", "best.pt", "open.onnx", "images", "--imgsz", *size, "--conf-thres", "0.01", "--json",
                    cwd=work)  # fmt: skip
        assert done.code == 0, done.err
        assert json.loads(done.out)["agreement"] == 1
    done = call("bench", "open.onnx", "--imgsz", "32", "96", "--runs", "2", "--threads", "1", "--quiet", cwd=work)
    assert done.code == 0, done.err
