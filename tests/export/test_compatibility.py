"""docs/compatibility.md: what its tables say runs is run, what they say is refused is refused with that message.

The tables are read from the page. "yes" means: loads, and gives ONNX Runtime's numbers."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from built import HERE
from conftest import HANGS, ROOT, SIDE, convert, smooth_picture, tiny_network
from formats import fit_weight_real
from onnx.reference import ReferenceEvaluator
from onnx.version_converter import convert_version

from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, export_float, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.ir import display_name
from dsconvert.onnxfile.compact import compact
from dsconvert.onnxfile.operators import with_operators
from dsconvert.yolo.boxes import non_max_suppression
from dsconvert.yolo.lower import lower

PAGE = (ROOT / "docs/compatibility.md").read_text()
WEB = ROOT / "examples/browser/node_modules/onnxruntime-web"
SUPPRESSION = Nms(0.2, 0.45, 20)
OPTIONS = {
    "none": Ends(), "`--nms`": Ends(nms=SUPPRESSION), "`--uint8-input`": Ends(input_type="uint8"),
    "`--half-input`": Ends(input_type="float16"), "`--dynamic-batch`": Ends(dynamic_batch=True),
}  # fmt: skip
INTEGER = tuple(name for name in ("packed", "fused", "fast", "blocked", "int8") if name in HERE)
LAYOUTS = (*INTEGER, "openvino", "float", "float32")  # fast is among them where its library is
Files = dict[tuple[str, str], bytes]


def table(heading: str) -> dict[str, dict[str, str]]:
    """The table below a heading of the page: cells by row and column."""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def message(cell: str) -> str:
    """What the page quotes as the engine's message for a cell such as "no (2)"."""
    number = re.fullmatch(r"no \((\d)\)", cell)
    assert number, cell
    return re.search(rf"^{number[1]}\. .*?`([^`]+)`", PAGE, re.MULTILINE | re.DOTALL)[1]


@pytest.fixture(scope="module")
def files() -> Files:
    """The tiny network in every layout with every option, as `export` writes it."""
    network, head = tiny_network()
    graph, params = lower(network.fused())
    quantized = convert(*tiny_network(), smooth_picture())
    real = replace(quantized, activations={}, convs={
        name: c if c.weight.is_plain_int8 else replace(c, weight=fit_weight_real(c.weight.weight(), 4, 16))
        for name, c in quantized.convs.items()
    })  # fmt: skip
    made = {}
    for option, ends in OPTIONS.items():
        for layout in (*INTEGER, "openvino"):
            made[layout, option] = compact(export_quantized(quantized, layout_named(layout), SIDE, ends))
        made["float", option] = compact(export_quantized(real, layout_named("float"), SIDE, ends))
        made["float32", option] = export_float(graph, params, head, SIDE, ends)
    return {key: model.SerializeToString() for key, model in made.items()}


def fed(option: str) -> np.ndarray:
    """The picture as files with this option take it."""
    picture = smooth_picture().numpy()
    if option == "`--dynamic-batch`":
        return np.concatenate((picture, picture[..., ::-1]))
    kind = OPTIONS[option].input_type
    return np.rint(picture * 255).astype(np.uint8) if kind == "uint8" else picture.astype(kind)


def run_onnxruntime(file: bytes, image: np.ndarray) -> np.ndarray:
    options = with_operators(ort.SessionOptions())
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, {"images": image})[0]


def run_openvino(file: bytes, image: np.ndarray) -> np.ndarray:
    core = importlib.import_module("openvino").Core()
    # the second, too, for layout float: with VNNI, OpenVINO rounds the inputs of 4-bit weights to 8 bits
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    engine = core.compile_model(core.read_model(file), "CPU", exact)
    return next(iter(engine({"images": image}).values()))


def run_opencv(file: bytes, image: np.ndarray, **engine: int) -> np.ndarray:
    net = cv2.dnn.readNetFromONNX(np.frombuffer(file, np.uint8), **engine)
    net.setInput(image)
    return net.forward()


def run_reference(file: bytes, image: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(onnx.load_from_string(file)).run(None, {"images": image})[0]


ENGINES = {"OpenVINO": run_openvino, "OpenCV DNN": run_opencv, "onnx's reference evaluator": run_reference}


@pytest.fixture(scope="module")
def wanted(files) -> dict[tuple[str, str], np.ndarray]:
    """ONNX Runtime's output of every file."""
    return {(layout, option): run_onnxruntime(file, fed(option)) for (layout, option), file in files.items()}


def check_same(found: np.ndarray, expected: np.ndarray) -> None:
    """A tie rounded the other way moves single numbers a little; a wrong weight moves all of them."""
    assert found.shape == expected.shape
    assert expected.std() > 10
    assert np.abs(found - expected).mean() < 0.01


def expects(engine: str, layout: str, option: str) -> str:
    """The cell that decides whether a file runs: the layout's "no", else the option's."""
    by_layout = table("Layouts")[engine][layout]
    return by_layout if by_layout != "yes" else table("Options")[engine].get(option, "yes")


def test_onnx_runtime(wanted):
    """All layouts of integers are one model, options change nothing, and NMS is our own."""
    assert {*table("Layouts")["ONNX Runtime"].values(), *table("Options")["ONNX Runtime"].values()} <= {
        "yes", "`tests/export/test_compatibility.py::test_onnx_runtime`",
    }  # fmt: skip
    for layout in LAYOUTS:
        plain = wanted[layout, "none"]
        assert np.array_equal(plain, wanted["packed", "none"]) == (layout in INTEGER)
        kept = non_max_suppression(plain[0], SUPPRESSION.confidence, SUPPRESSION.iou, SUPPRESSION.most)
        np.testing.assert_allclose(wanted[layout, "`--nms`"][:, 1:], kept, atol=1e-4)
        both = wanted[layout, "`--dynamic-batch`"]
        np.testing.assert_allclose(both[:1], plain, atol=1e-4)
        assert np.abs(both[1] - both[0]).max() > 1
        for option in ("`--uint8-input`", "`--half-input`"):
            # a half is the image to 11 bits, of which an integer image takes 8
            tolerance = 0.1 if "float" in layout and "half" in option else 1e-4
            np.testing.assert_allclose(wanted[layout, option], plain, atol=tolerance)


def check_engine(engine: str, files: Files, wanted: dict) -> None:
    """Every file does in the engine what the page says."""
    for (layout, option), file in files.items():
        cell = expects(engine, layout, option)
        if cell == "yes":
            check_same(ENGINES[engine](file, fed(option)), wanted[layout, option])
        else:
            with pytest.raises(Exception, match=re.escape(message(cell))):
                ENGINES[engine](file, fed(option))


@pytest.mark.long
def test_openvino(files, wanted):
    pytest.importorskip("openvino")
    check_engine("OpenVINO", files, wanted)


@pytest.mark.skipif(cv2.__version__ < "5", reason="the page is about OpenCV 5; this is an older one")
def test_opencv(files, wanted):
    check_engine("OpenCV DNN", files, wanted)
    for engine in (cv2.dnn.ENGINE_CLASSIC, cv2.dnn.ENGINE_NEW):
        check_same(run_opencv(files["int8", "none"], fed("none"), engine=engine), wanted["int8", "none"])


def test_the_reference_evaluator(files, wanted):
    check_engine("onnx's reference evaluator", files, wanted)
    newer = convert_version(onnx.load_from_string(files["int8", "none"]), 21)  # as the page says
    check_same(run_reference(newer.SerializeToString(), fed("none")), wanted["int8", "none"])


@pytest.mark.long
@pytest.mark.skipif(
    not (WEB.is_dir() and shutil.which("node")), reason="needs node, and npm install in examples/browser"
)
def test_onnxruntime_web(files, wanted, tmp_path):
    jobs: list[dict[str, Any]] = []
    for number, ((_, option), file) in enumerate(files.items()):
        model, image, output = (tmp_path / f"{number}.{suffix}" for suffix in ("onnx", "in", "out"))
        model.write_bytes(file)
        image.write_bytes(fed(option).tobytes())
        jobs.append({"model": str(model), "input": str(image), "output": str(output), "shape": fed(option).shape,
                     "type": OPTIONS[option].input_type})  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = ["node", str(ROOT / "tests/help/run_web.cjs"), str(WEB), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    for (layout, option), job, result in zip(files, jobs, json.loads(done.stdout), strict=True):
        cell = expects("onnxruntime-web", layout, option)
        if cell == "yes":
            assert "message" not in result, (layout, option, result)
            found = np.frombuffer(Path(job["output"]).read_bytes(), np.float32).reshape(result["dims"])
            check_same(found, wanted[layout, option])
        else:
            assert message(cell) in result["message"]


def test_a_no_names_the_engines_message():
    noes = {cell for name in ("Layouts", "Options") for row in table(name).values() for cell in row.values()}
    noes = {cell for cell in noes if cell != "yes" and not cell.startswith("`tests/")}
    assert noes
    assert all(len(message(cell)) > 10 for cell in noes)
    assert set(table("Layouts")) == set(table("Options")) == {"ONNX Runtime", "onnxruntime-web", *ENGINES}
    for row in table("Layouts").values():
        assert set(row) == {*LAYOUTS, "fast", "proved by"}
    for row in table("Options").values():
        assert set(row) == {*OPTIONS, "proved by"} - {"none"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_is_what_yolov5_reads(files, layout):
    """By YOLOv5's detect.py and val.py: the first input gets (n, 3, h, w) floats in 0..1, the first output is
    (n, boxes, 5 + nc), int(stride) and a dictionary or list of names come from the metadata."""
    options = with_operators(ort.SessionOptions())
    session = ort.InferenceSession(files[layout, "none"], options, providers=["CPUExecutionProvider"])
    (entry,), (out,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape) == ("images", "tensor(float)", [1, 3, SIDE, SIDE])
    boxes = 3 * ((SIDE // 4) ** 2 + (SIDE // 8) ** 2)
    assert (out.name, out.type, out.shape) == ("output0", "tensor(float)", [1, boxes, 5 + 2])
    meta = session.get_modelmeta().custom_metadata_map
    assert int(meta["stride"]) == 8
    assert ast.literal_eval(meta["names"]) == {0: "cat", 1: "dog"}
    found = session.run([out.name], {entry.name: fed("none")})[0]
    assert ((found[..., 4:] >= 0) & (found[..., 4:] <= 1)).all()  # scores are probabilities, no further sigmoid
    assert found[..., :4].max() > SIDE / 2  # boxes are pixels of the input, not shares


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_that_netron_shows(files, layout):
    """Every convolution and its weights carry the names of YOLOv5's modules."""
    graph = onnx.load_from_string(files[layout, "none"]).graph
    convs = {n.name for n in graph.node if "Conv" in n.op_type}
    network = tiny_network()[0]
    expected = {display_name(n) for n in lower(network.fused())[0].nodes if n.op == "conv"}
    assert "model.2.m.0.cv1" in expected
    # Detect's convolutions are split into boxes and scores in a converted model
    assert {n for n in convs if not n.startswith("model.8.")} == {n for n in expected if not n.startswith("model.8.")}
    tensors = {t.name for t in graph.initializer}
    parts = {"float32": ("weight",), "int8": ("weight", "cds"), "float": ("vqk", "alpha")}.get(
        layout, ("vqk", "kds", "cds")
    )
    assert {f"model.2.m.0.cv1.{part}" for part in parts} <= tensors
