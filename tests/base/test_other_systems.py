"""As on Windows and macOS: no /proc, no `resource`, no hard links, no sync of folders, all at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_network, write_pictures
from pt_writer import yolov5_bytes

# Python runs it when it starts, in every process that a command starts too.
HIDING = """
import builtins, io, os, sys
sys.modules["resource"] = None
for name in ("link", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
fsync, opened, io_opened = os.fsync, os.open, io.open
def of_files(path, flags, *rest, **more):
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, flags, *rest, **more)
def without_proc(path, *rest, **more):
    if isinstance(path, (str, os.PathLike)) and str(os.fspath(path)).startswith("/proc/"):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return io_opened(path, *rest, **more)
os.open, io.open, builtins.open = of_files, without_proc, without_proc
"""
UNBOUNDED = "Warning: This system cannot bound a process's memory"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "best.pt").write_bytes(yolov5_bytes(*tiny_network()))
    write_pictures(folder)
    (folder / "data.yaml").write_text("path: .\ntrain: images/val\nval: images/val\nnames: [cat, dog]\n")
    (folder / "hiding").mkdir()
    (folder / "hiding/sitecustomize.py").write_text(HIDING)
    return folder


# command -> what it writes, and how many warnings about bounds it gives: those that open an ONNX file give one
COMMANDS: dict[str, tuple[str, int]] = {
    "quantize best.pt --calib images --imgsz 64 --bits 4 --out q -q": ("q/model.safetensors", 0),
    "export q/model.safetensors --onnx --layout fused --out q.onnx": ("q.onnx", 0),
    "export best.pt --onnx --imgsz 64 --out f.onnx": ("f.onnx", 0),
    "info q.onnx": ("", 0),
    "eval best.pt q.onnx f.onnx --data data.yaml --imgsz 64": ("", 1),
    "detect q.onnx images --out seen": ("seen", 1),
    "compare f.onnx q.onnx images": ("", 1),
    "bench f.onnx q.onnx --runs 2 --threads 1": ("", 1),
    "finetune q/model.safetensors --data data.yaml --epochs 1 --out t": ("t/model.safetensors", 0),
    "quantize f.onnx --calib images --samples 2 --out g.onnx": ("g.onnx", 1),
    "report q/model.safetensors --data data.yaml --no-latency --against f.onnx --out r.html": ("r.html", 1),
}


@pytest.mark.long
def test_every_command_does_its_work(work):
    """One after the other, each on what those before it made."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(work / "hiding"), str(ROOT))),
        "OMP_NUM_THREADS": "1",
    }
    check = (
        "import os, sys; sys.exit(hasattr(os, 'link') or os.path.exists('/x') or sys.modules['resource'] is not None)"
    )
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)  # it is hidden
    for line, (made, warnings) in COMMANDS.items():
        command = [sys.executable, "-m", "dsconvert", *line.split()]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        assert "Traceback" not in done.stderr
        assert (work / made).exists()
        assert done.stderr.count(UNBOUNDED) == warnings, (line, done.stderr)
    command = [sys.executable, "-m", "dsconvert", "bench", "f.onnx", "--runs", "2", "--json"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    (row,) = json.loads(done.stdout)["models"]
    assert row["peak_bytes"] is None  # and no number is made up
