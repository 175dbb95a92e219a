"""examples/cpp, compiled and run: needs cmake, a C++ compiler, and ONNX Runtime's header and library, which
DSCONVERT_ORT_HEADERS (the folder of onnxruntime_c_api.h) and DSCONVERT_ORT_LIB (libonnxruntime.so) name."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import ROOT, SIDE, convert, smooth_picture, tiny_network

from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, export_float, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.onnxfile.compact import compact
from dsconvert.yolo.lower import lower

HEADERS, LIB = (os.environ.get(f"DSCONVERT_ORT_{name}") for name in ("HEADERS", "LIB"))
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (HEADERS and LIB), reason="DSCONVERT_ORT_HEADERS or DSCONVERT_ORT_LIB is not set"),
]
INTEGER = ("packed", "fused", "blocked", "int8")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    settings = [f"-DORT_HEADERS={Path(str(HEADERS)).resolve()}", f"-DORT_LIB={Path(str(LIB)).resolve()}"]
    subprocess.run(["cmake", "-S", ROOT / "examples/cpp", "-B", folder, *settings], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return folder / "run_onnx"


def files() -> dict[str, bytes]:
    network, head = tiny_network()
    quantized = convert(*tiny_network(), smooth_picture())
    made = {layout: compact(export_quantized(quantized, layout_named(layout), SIDE, Ends())) for layout in INTEGER}
    made["float32"] = export_float(*lower(network.fused()), head, SIDE, Ends())
    made["nms"] = compact(export_quantized(quantized, layout_named("packed"), SIDE, Ends(nms=Nms(0.2, 0.45, 20))))
    return {name: model.SerializeToString() for name, model in made.items()}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


def test_it_gives_what_python_gives_to_the_last_bit(program, tmp_path):
    """But for floats that another version of the library may sum in another order."""
    planes = smooth_picture()[0].numpy()
    pixels = np.rint(planes * 255).astype(np.uint8).transpose(1, 2, 0)
    (tmp_path / "picture.ppm").write_bytes(f"P6\n{SIDE} {SIDE}\n255\n".encode() + pixels.tobytes())
    for name, file in files().items():
        (tmp_path / "model.onnx").write_bytes(file)
        done = run(program, tmp_path / "model.onnx", tmp_path / "picture.ppm", tmp_path / "boxes")
        assert done.returncode == 0, done.stderr
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        wanted = session.run(None, {"images": planes[None]})[0]
        assert done.stdout == " x ".join(map(str, wanted.shape)) + "\n"
        found = np.fromfile(tmp_path / "boxes", np.float32).reshape(wanted.shape)
        assert wanted.std() > 10
        if name in INTEGER:
            assert np.array_equal(found, wanted), (name, np.abs(found - wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_what_it_cannot_use_is_a_sentence(program, tmp_path):
    (tmp_path / "model.onnx").write_bytes(files()["packed"])
    (tmp_path / "small.ppm").write_bytes(b"P6\n2 1\n255\n" + bytes(6))
    done = run(program, tmp_path / "model.onnx", tmp_path / "small.ppm", tmp_path / "boxes")
    assert (done.returncode, done.stderr) == (1, f"run_onnx: the picture is 2 x 1, the model takes {SIDE} x {SIDE}\n")
    assert not (tmp_path / "boxes").exists()
    assert run(program, tmp_path / "no.onnx", tmp_path / "small.ppm", tmp_path / "boxes").returncode == 1
    assert run(program).returncode == 2
