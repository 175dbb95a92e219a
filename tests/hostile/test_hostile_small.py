"""A small file must not hold the machine: 30 seconds of the processor and 2 GiB at most, and refused in a sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, write_pictures
from pt_writer import yolov5_bytes
from small import KINDS, Small, holes
from watched import MOST_BYTES, MOST_SECONDS

from dsconvert.base import filekinds
from dsconvert.base.children import environment
from dsconvert.base.errors import InputError
from dsconvert.model.file import load_model, model_bytes
from dsconvert.onnxfile.bounds import growth


def measure(folder: Path, lines: list[list[str]]) -> list[dict]:
    command = [sys.executable, str(Path(__file__).with_name("rows.py"))]
    done = subprocess.run(command, input=json.dumps(lines), cwd=folder, capture_output=True, text=True, timeout=HANGS)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(lines), f"died ({done.returncode}) in {lines[len(found)]}: {done.stderr[-2000:]}"
    return found


def wrong(small: Small, row: dict) -> list[str]:
    """What is wrong with what a command did."""
    found = []
    if row["peak"] > MOST_BYTES:
        found.append(f"memory {row['peak'] / 1e9:.2f} GB")
    if row["seconds"] > MOST_SECONDS:
        found.append(f"{row['seconds']:.0f} s")
    errors = [line for line in row["err"].splitlines() if not line.startswith("Warning: ")]
    if small.words is None:
        return found + ([] if row["code"] == 0 else [f"ended with {row['code']}: {errors[-1:]}"])
    if row["code"] != 2:
        found.append(f"ended with {row['code']}")
    if len(errors) != 1 or not re.fullmatch(r"Error: .*\.", errors[0]) or not errors[0].isprintable():
        found.append(f"not one sentence: {row['err'][-500:]}")
    elif not re.search(small.words, errors[0]):
        found.append(f"in other words: {errors[0]}")
    return found


SLOW = ("many", "shaped", "pictured")  # more than ten seconds each


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.long) if kind.__name__ in SLOW else kind for kind in KINDS],
    ids=lambda kind: kind.__name__,
)
def test_a_small_file_does_not_hold_the_machine(kind, tmp_path, tiny, converted):
    write_pictures(tmp_path)
    (tmp_path / "fine.pt").write_bytes(yolov5_bytes(*tiny))
    (tmp_path / "model.safetensors").write_bytes(model_bytes(converted))
    files = [(small, line) for small in kind() for line in small.commands]
    for small in {small.name: small for small, _ in files}.values():
        small.write(tmp_path / small.name)
    rows = measure(tmp_path, [[word.replace("{}", small.name) for word in line] for small, line in files])
    found = []
    for (small, line), row in zip(files, rows, strict=True):
        said = row["err"].strip().rpartition("\n")[2]
        print(f"{small.name} {line[0]}: {row['seconds']:.1f} s, {row['peak'] / 1e6:.0f} MB, {row['code']} {said}")
        found += [f"{small.name} {line[0]}: {what}" for what in wrong(small, row)]
    assert not found, "\n".join(found)


def test_the_trial_imports_nothing_heavy_and_nothing_of_the_folder(tmp_path):
    """It starts once for every file, and where a stranger's files lie."""
    for name in ("json", "numpy", "onnxruntime", "dsconvert"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder ran')")
    (tmp_path / "x.onnx").write_bytes(b"")
    probe = (
        "import os, sys, dsconvert.onnxfile.trial as t; t._main('x.onnx', 'onnxruntime', '1', '0', '0', '20');"
        "sys.stdout.write(str('torch' in sys.modules))"
    )
    line = [sys.executable, "-c", probe]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout) == (0, "False"), done.stderr


@pytest.mark.parametrize("name", ["sparse-one.safetensors", "sparse-other.safetensors"])
def test_names_and_sizes_come_first(tmp_path, monkeypatch, name):
    """On disks that do not say what a file holds, too."""
    monkeypatch.setattr(filekinds, "LEAST_SPARSE", 1 << 60)
    small = next(s for s in holes() if s.name == name)
    small.write(tmp_path / name)
    with growth(256 << 20), pytest.raises(InputError, match="more weights than any network has"):
        load_model(tmp_path / name)
