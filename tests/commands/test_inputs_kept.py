"""No command overwrites what it was given, with --force neither, under whatever name; nor a link, a pipe, a folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

import dsconvert
from dsconvert.base.errors import InputError
from dsconvert.model.file import model_bytes


@pytest.fixture
def place(work, converted, call):
    """best.pt, q.safetensors made of it, f.onnx, pictures; links of both kinds to all three."""
    made = {"source": "best.pt", "options": {"calib": "images/val"}}
    (work / "q.safetensors").write_bytes(model_bytes(replace(converted, provenance=made)))
    assert call("export", "best.pt", "--onnx", "--imgsz", "64", "--no-check", "--out", "f.onnx", cwd=work).code == 0
    for name in ("best.pt", "q.safetensors", "f.onnx"):
        (work / f"hard-{name}").hardlink_to(work / name)
        (work / f"soft-{name}").symlink_to(name)
    (work / "run").mkdir()
    (work / "run/model.safetensors").hardlink_to(work / "q.safetensors")
    (work / "run2").mkdir()
    (work / "run2/quantize.json").hardlink_to(work / "best.pt")
    return work


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


EXPORT, REPORT = ("export", "q.safetensors", "--onnx", "--no-check"), ("report", "q.safetensors", "--data", "images")
QUANTIZE = ("quantize", "best.pt", "--imgsz", "64", "--calib", "images/val")
ANY_ONNX = ("quantize", "f.onnx", "--calib", "images")
FINETUNE = ("finetune", "q.safetensors", "--data", "data.yaml")


@pytest.mark.parametrize(
    ("args", "outs"),
    [
        (EXPORT, ["q.safetensors", "hard-q.safetensors", "soft-q.safetensors", "./run/../q.safetensors", "best.pt"]),
        (("export", "best.pt", "--onnx", "--no-check"), ["best.pt", "hard-best.pt", "soft-best.pt"]),
        ((*REPORT, "--against", "f.onnx"), ["q.safetensors", "best.pt", "f.onnx", "hard-f.onnx", "soft-f.onnx"]),
        ((*REPORT, "--float", "best.pt"), ["hard-best.pt"]),
        (("report", "q.safetensors", "--data", "data.yaml"), ["data.yaml"]),
        (ANY_ONNX, ["f.onnx", "hard-f.onnx", "soft-f.onnx"]),
        (QUANTIZE, ["images/val", "run2"]),
        (FINETUNE, ["run"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_an_input_is_never_overwritten(place, call, args, outs, force):
    before = contents(place)
    for out in outs:
        done = call(*args, "--out", out, *force, cwd=place)
        assert (done.code, done.out) == (2, ""), (args, out)
        assert "is an input and would be overwritten" in done.err, (args, out)
        assert contents(place) == before


@pytest.mark.parametrize("args", [EXPORT, REPORT, (*ANY_ONNX, "--layout", "packed")])
def test_what_is_no_ordinary_file_is_not_replaced(place, call, args):
    os.mkfifo(place / "pipe.onnx")
    (place / "link.onnx").symlink_to("elsewhere")
    (place / "folder.onnx").mkdir()
    for out, words in (
        ("pipe.onnx", "not an ordinary file"),
        ("link.onnx", "it is a link"),
        ("folder.onnx", "a folder"),
    ):
        done = call(*args, "--out", out, "--force", cwd=place)
        assert (done.code, done.out) == (2, ""), out
        assert words in done.err, out
    assert (place / "pipe.onnx").is_fifo()
    assert os.readlink(place / "link.onnx") == "elsewhere"
    assert not (place / "elsewhere").exists()


def test_the_python_interface_keeps_a_checkpoint_too(place, monkeypatch):
    monkeypatch.chdir(place)
    before = contents(place)
    with pytest.raises(InputError, match="is an input"):
        dsconvert.load("best.pt").export("hard-best.pt", imgsz=64, check=False, force=True)
    assert contents(place) == before
