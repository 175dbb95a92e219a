"""The Python API: what a notebook does, and that it gives what the command line gives."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import HANGS, ROOT, tiny_network
from pt_writer import yolov5_bytes

import dsconvert
from dsconvert.api import models as api
from dsconvert.convert import quantize as pipeline
from dsconvert.convert.options import QuantizeOptions
from dsconvert.model.file import model_bytes


@pytest.fixture
def work(tiny, tmp_path, monkeypatch):
    """best.pt, two labelled pictures, data.yaml, in the current folder."""
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(*tiny))
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for i in range(2):
        picture = cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (100, 80))
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), picture)
        (tmp_path / f"labels/{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("path: .\nval: images\nnames: [cat, dog]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def q(tmp_path_factory):
    """A conversion that changes nothing in the current folder."""
    folder = tmp_path_factory.mktemp("q")
    (folder / "best.pt").write_bytes(yolov5_bytes(*tiny_network()))
    cv2.imwrite(str(folder / "0.png"), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return dsconvert.quantize(folder / "best.pt", folder / "0.png", imgsz=64, bits=4)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_dsconvert_is_cheap_and_offers_everything():
    heavy = "{'torch', 'onnx', 'onnxruntime', 'cv2', 'numpy'} & set(sys.modules)"
    assert python(f"import sys, dsconvert; dir(dsconvert); dsconvert.__version__; print({heavy})") == "set()\n"
    assert set(dsconvert.__all__) <= set(dir(dsconvert))
    for name in dsconvert.__all__:
        assert getattr(dsconvert, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dsconvert.nothing


@pytest.mark.parametrize("before", ["pass", "import dsconvert.scoring.coco"])
def test_evaluate_is_callable_whatever_was_imported_before(before):
    code = f"import dsconvert\n{before}\ntry: dsconvert.evaluate([], 'x')\nexcept dsconvert.InputError as e: print(e)"
    assert python(code) == "There is no model to evaluate.\n"


def test_a_notebook_from_checkpoint_to_comparison(work):
    m = dsconvert.load("best.pt")
    assert m.names == ("cat", "dog")
    before = {name: value.clone() for name, value in m.checkpoint.network.state_dict().items()}
    stages = []
    q = dsconvert.quantize(m, "images", imgsz=64, bits=4, progress=lambda stage, done, total: stages.append(stage))
    assert {"images", "importance", "fit"} <= set(stages)
    after = m.checkpoint.network.state_dict()  # BatchNorm not folded: m can be quantized again
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    saved = q.save("out")
    assert q.export("x.onnx") == Path("x.onnx")
    m.export("float.onnx", imgsz=64)
    rows = dsconvert.evaluate([m, q, saved, "x.onnx", "float.onnx"], "data.yaml")
    assert [r.images for r in rows] == [2] * 5
    assert rows[1].size_bytes == rows[2].size_bytes == saved.stat().st_size
    assert rows[0].size_bytes == (work / "best.pt").stat().st_size
    assert rows[1].map50_95 == rows[2].map50_95  # one model, in memory and on disk
    assert rows[1].ap50_95.keys() == {0, 1}
    lines = repr(rows).splitlines()
    assert len(lines) == 6
    assert len(set(map(len, lines))) == 1
    assert "best.pt (converted)" in lines[2]
    assert [p.name for p in work.iterdir() if p.suffix == ".safetensors"] == []  # nothing left behind


def test_it_is_the_pipeline_and_notes_how_it_was_called(work, q, monkeypatch):
    calls = []
    monkeypatch.setattr(pipeline, "quantize", lambda *args: (calls.append(args), q.result)[1])
    made = dsconvert.quantize("best.pt", "images", imgsz=64, bits=3, block_size=8, target_map_drop=None)
    checkpoint, options, command, _ = calls[0]
    assert made.model is q.model
    assert checkpoint.path == Path("best.pt")
    assert options == QuantizeOptions(calib=Path("images"), imgsz=64, bits=3, block_size=8)
    assert command == "dsconvert.quantize('best.pt', images='images', block_size=8, bits=3, imgsz=64)"
    dsconvert.quantize("best.pt", target_size=9000)
    assert calls[1][1] == QuantizeOptions(target_bytes=9000)


def test_a_saved_model_comes_back(q, tmp_path):
    loaded = dsconvert.load(q.save(tmp_path))
    assert model_bytes(loaded.model) == model_bytes(q.model)
    assert (loaded.names, loaded.imgsz, loaded.weight_bits) == (("cat", "dog"), 64, q.weight_bits)
    assert [row["bits"] for row in loaded.layers] == [row["bits"] for row in q.layers]
    assert all("sqnr_db" in row for row in q.layers)
    assert json.loads((tmp_path / "quantize.json").read_text())["layers"] == q.layers
    assert repr(loaded) == repr(q) == f"QuantizedModel('best.pt', 2 classes, {q.weight_bits:.2f} bits)"


def test_every_option_of_the_pipeline_is_a_keyword():
    keywords = {"calib": "images", "target_bytes": "target_size", "target_drop": "target_map_drop"}
    expected = {keywords.get(f.name, f.name) for f in fields(QuantizeOptions)} | {"model", "progress"}
    given = inspect.signature(dsconvert.quantize).parameters
    assert set(given) == expected
    for f in fields(QuantizeOptions):
        assert given[keywords.get(f.name, f.name)].default == f.default


def test_export_writes_what_was_asked_for(work, q):
    sizes = {layout: q.export(f"{layout}.onnx", layout).stat().st_size for layout in ("packed", "blocked", "int8")}
    assert len(set(sizes.values())) == 3
    q.export("ends.onnx", input_type="uint8", nms=True, conf_thres=0.1, dynamic_batch=True)
    graph = onnx.load("ends.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert graph.output[0].name == "detections"
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    saved = q.save("out")
    again = dsconvert.load(saved).export("again.onnx")
    assert again.read_bytes() == (work / "packed.onnx").read_bytes()


def test_nothing_is_overwritten_without_force(work, q):
    q.save("out")
    q.export("x.onnx")
    before = (work / "x.onnx").read_bytes()
    with pytest.raises(dsconvert.InputError, match="force=True"):
        q.save("out")
    with pytest.raises(dsconvert.InputError, match=r"x\.onnx already exists; give force=True"):
        q.export("x.onnx", "int8")
    with pytest.raises(dsconvert.InputError, match="already exists"):
        dsconvert.load("best.pt").export("x.onnx", imgsz=64)
    assert (work / "x.onnx").read_bytes() == before
    q.save("out", force=True)
    q.export("x.onnx", "int8", force=True)
    assert (work / "x.onnx").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 9}, "bits 9 is not a number from 2 to 8"),
        ({"bits": 4.0}, "bits 4.0 is not a whole number"),
        ({"bits": 4, "target_size": 9000}, "bits, target_size and target_map_drop each decide"),
        ({"target_map_drop": -1}, "target_map_drop needs a number above 0, and images"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"imgsz": 65}, "imgsz 65 must be a multiple"),
        ({"scope": "most"}, "scope most is not one of"),
        ({"activations": "int4"}, "activations 'int4' is not one of int8, float"),
        ({"images": "nowhere"}, "no file or folder at nowhere"),
        ({"target_size": "1MB"}, "target_size '1MB' is not a whole number"),
    ],
)
def test_bad_options_are_one_sentence_in_the_words_of_this_api(work, options, said):
    with pytest.raises(dsconvert.InputError, match=said) as caught:
        dsconvert.quantize("best.pt", **{"images": "images", "imgsz": 64, **options})
    assert "--" not in str(caught.value)


def test_other_bad_input(work, q):
    (work / "x.onnx").write_bytes(b"")
    for call, said in [
        (lambda: dsconvert.load("none.pt"), "none.pt"),
        (lambda: dsconvert.load("x.onnx"), "is an ONNX file"),
        (lambda: dsconvert.quantize(q, "images"), "converted already"),
        (lambda: q.export("y.onnx", "tight"), "'tight' is not a layout; there are packed"),
        (lambda: q.export("y.onnx", input_type="int4"), "'int4' is not an input type"),
        (lambda: q.export("y.onnx", conf_thres=0.1), "work only with nms=True"),
        (lambda: q.export("y.onnx", nms=True, conf_thres=2.0), "conf_thres must lie in 0..1"),
        (lambda: dsconvert.load(q.save("out")).save("other"), "saved already"),
        (lambda: dsconvert.evaluate([q], "data.yaml", samples=0), "samples must be at least 1"),
        (
            lambda: dsconvert.evaluate(["x.txt"], "data.yaml"),
            "no file at x.txt; give a .pt, .safetensors or .onnx file",
        ),
    ]:
        with pytest.raises(dsconvert.InputError, match=said):
            call()
    assert not (work / "y.onnx").exists()
    assert api.evaluate.__doc__
