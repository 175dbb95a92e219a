"""What `make demo` does: a detector that works, and still works converted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, HANGS

pytestmark = pytest.mark.long


def dsconvert(*args: str | Path, cwd: Path) -> dict:
    command = [sys.executable, "-m", "dsconvert", *map(str, args), "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_demo_detects_and_loses_little(tmp_path):
    dsconvert("quantize", DEMO / "demo.pt", "--calib", DEMO / "images/calib", "--imgsz", "320", cwd=tmp_path)
    dsconvert("export", "--onnx", "--out", "packed.onnx", cwd=tmp_path)
    rows = dsconvert("eval", DEMO / "demo.pt", "packed.onnx", "--data", DEMO / "data.yaml", cwd=tmp_path)["models"]
    assert rows[0]["map50_95"] > 0.6
    assert rows[1]["map50_95"] > rows[0]["map50_95"] - 0.04  # measured 2.0 points
    assert rows[1]["images"] == 100
    assert rows[1]["size_bytes"] < 0.3 * rows[0]["size_bytes"]  # against the float16 checkpoint
