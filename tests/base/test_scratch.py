"""Temporary files of the commands: where they are, what is said when they do not fit, and that they go."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT, SIDE, convert, smooth_picture, tiny_network
from onnx import TensorProto, helper, numpy_helper

from dsconvert.base.size import Size
from dsconvert.convert import onnx_lockstep as lockstep
from dsconvert.export.ort import fused
from dsconvert.model.file import model_bytes


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def network(tmp_path) -> Path:
    """Two convolutions of 8 channels, images of 64 pixels: values of 131 kB an image."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3)}
    stored = [numpy_helper.from_array(rng.normal(0, 0.2, s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["images", "w0"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["y"], pads=[1] * 4),
    ]
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, c, 64, 64)) for n, c in (("images", 3), ("y", 8)))
    graph = helper.make_graph(nodes, "two", [next(ends)], [next(ends)], stored)
    path = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def elsewhere(monkeypatch, tmp_path) -> None:
    """The system's folder for temporary files cannot be used at all."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))


@pytest.mark.parametrize(
    "options",
    [
        ("--out", "results/a.onnx"),
        *(pytest.param(o, marks=pytest.mark.long) for o in (("--out", "results"), ("--cache", "results"), ())),
    ],
)
def test_values_wait_beside_the_result_or_in_the_cache(network, photos, call, tmp_path, monkeypatch, options):
    elsewhere(monkeypatch, tmp_path)
    (tmp_path / "results").mkdir()
    places, run = [], lockstep._fit

    def watched(*args):
        places.append(args[5][0].folder.parent.parent)
        return run(*args)

    monkeypatch.setattr(lockstep, "_fit", watched)
    answer = call("quantize", network, "--activations", "float", "--calib", photos, *options, cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert places == [tmp_path / "results" if options else tmp_path]
    assert [p for p in tmp_path.rglob("*") if p.name.startswith(".dsconvert")] == []


def test_a_disk_without_room_for_values_is_one_sentence_that_says_how_much(
    network, photos, call, tmp_path, monkeypatch
):
    saved, save = [], np.save

    def full(path, array, **options):
        saved.append(array.nbytes)
        if len(saved) > 20:  # as numpy says it, which has no number
            raise OSError(f"{array.size} requested and 0 written")
        save(path, array, **options)

    monkeypatch.setattr(np, "save", full)
    answer = call(
        "quantize", network, "--activations", "float", "--calib", photos, "--out", tmp_path / "a.onnx", cwd=tmp_path
    )
    assert answer.code == 2
    # 6 images of 3 channels and 6 values of 8, for each of the two networks
    least = 6 * 2 * (3 + 8) * 64 * 64 * 4
    assert answer.err.splitlines()[-1] == (
        f"Error: {tmp_path} has no room for temporary files (it is full): at least {least / 1e6:.1f} MB are needed; "
        "give --out on a larger disk."
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "two.onnx"]


@pytest.mark.long
def test_values_are_read_where_files_cannot_be_mapped(network, photos, call, tmp_path, monkeypatch):
    load = np.load

    def unmapped(path, mmap_mode=None, **options):
        if mmap_mode is not None:
            raise OSError(errno.ENODEV, "No such device")
        return load(path, **options)

    call("quantize", network, "--activations", "float", "--calib", photos, "--out", tmp_path / "a.onnx", cwd=tmp_path)
    monkeypatch.setattr(np, "load", unmapped)
    call("quantize", network, "--activations", "float", "--calib", photos, "--out", tmp_path / "b.onnx", cwd=tmp_path)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_values_of_peoples_photos_do_not_stay_behind(network, photos, tmp_path, number):
    """Stopped as soon as there are any; the fit is slowed down so that it is in the middle of it."""
    script = (
        "import sys, time; from dsconvert.convert import onnx as convert; from dsconvert.commands.cli import main\n"
        "layer = convert.GPTQ.layer\n"
        "convert.GPTQ.layer = lambda *given: (time.sleep(60), layer(*given))[1]\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "results"
    out.mkdir()
    line = [sys.executable, "-c", script, "quantize", str(network), "--calib", str(photos), "--out", str(out)]
    line += ["--activations", "float"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, env=environment) as run:
        while run.poll() is None and not list(out.glob(".dsconvert-*/quantized/*-5.npy")):
            time.sleep(0.05)
        run.send_signal(number)
        _, err = run.communicate()
    assert b"Traceback" not in err
    assert run.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM), err
    assert list(out.iterdir()) == []


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "m.safetensors"
    path.write_bytes(model_bytes(replace(convert(*tiny_network(), smooth_picture()), imgsz=Size.of(SIDE))))
    return path


def test_layout_fused_needs_nothing_of_the_systems_folder(model, call, tmp_path, monkeypatch):
    elsewhere(monkeypatch, tmp_path)
    (tmp_path / "out").mkdir()
    answer = call("export", model, "--onnx", "--layout", "fused", "--out", tmp_path / "out/f.onnx", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["f.onnx"]


def test_layout_fused_without_room_is_one_sentence(model, call, tmp_path, monkeypatch):
    session = ort.InferenceSession

    def full(data, options=None, **others):
        if getattr(options, "optimized_model_filepath", ""):
            raise RuntimeError("ModelProto serialization failed.")
        return session(data, options, **others)

    monkeypatch.setattr(ort, "InferenceSession", full)
    usage = fused.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fused.shutil, "disk_usage", lambda folder: usage._replace(free=4096))
    answer = call("export", model, "--onnx", "--layout", "fused", cwd=tmp_path)
    assert answer.code == 2
    assert answer.err.startswith(f"Error: {tmp_path} has no room for temporary files (it is full): at least ")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("command", ["quantize", "onnx", "export", "report", "finetune"])
def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    model, network, photos, call, tmp_path, monkeypatch, command
):
    """Whatever `os.access` says of it."""
    from dsconvert.base import files
    from dsconvert.commands import finetune
    from dsconvert.commands import quantize_onnx as command_file
    from dsconvert.convert import exporting
    from dsconvert.convert import quantize as pipeline
    from dsconvert.report import gather

    for module, name in (
        (pipeline, "quantize"), (command_file, "quantize_onnx"), (exporting, "onnx_bytes"), (gather, "gather"),
        (finetune, "finetune"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work was begun"))

    def refuse(folder):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "_probe", refuse)
    given = {
        "quantize": ("quantize", ROOT / "calib/demo/demo.pt", "--calib", photos, "--out", tmp_path / "q"),
        "onnx": ("quantize", network, "--activations", "float", "--calib", photos, "--out", tmp_path / "q"),
        "export": ("export", model, "--onnx"),
        "report": ("report", model),
        "finetune": ("finetune", model, "--data", ROOT / "calib/demo/data.yaml", "--out", tmp_path / "q"),
    }
    answer = call(*given[command], cwd=tmp_path)
    assert answer.code == 2
    assert answer.err.splitlines()[-1].endswith("cannot be written: Read-only file system.")
    assert len(list(tmp_path.iterdir())) == 3
