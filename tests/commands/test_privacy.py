"""Nothing is left on the machine, or sent from it, but what was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsconvert.convert.exporting import onnx_bytes
from dsconvert.export.weights.layouts import PACKED

DEMO = Path(__file__).parents[2] / "calib" / "demo" / "demo.pt"
RUN = """
import sys
from pathlib import Path
{first}
from dsconvert.scoring.candidates import load_candidate
load_candidate(Path(sys.argv[1]), 96).run_once()
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("model") / "demo.onnx"
    path.write_bytes(onnx_bytes(DEMO, PACKED, 96, check=False))
    return path


def left_at_home(model: Path, home: Path, first: str = "") -> list[str]:
    """Files below a fresh home directory after one frame in a fresh process."""
    home.mkdir()
    kept = {k: os.environ[k] for k in ("PATH", "PYTHONPATH", "LANG") if k in os.environ}
    environment = {**kept, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    program = [sys.executable, "-c", RUN.format(first=first), str(model)]
    subprocess.run(program, env=environment, check=True, capture_output=True)
    return [str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()]


def test_running_a_model_leaves_nothing_at_home(exported, tmp_path):
    assert left_at_home(exported, tmp_path / "home") == []


def test_onnx_runtime_by_itself_would(exported, tmp_path):
    """Else the test above could not fail, and what the documentation says were wrong."""
    left = left_at_home(exported, tmp_path / "home", "import onnxruntime")
    assert any("onnxruntime" in name.lower() for name in left)
