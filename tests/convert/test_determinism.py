"""The same bytes from two runs with the same number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import HANGS, QUICKLY, ROOT, write_work
from fuzz_damage import resealed


@pytest.mark.parametrize("threads", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_two_runs_give_the_same_bytes(tiny, tmp_path, threads):
    write_work(tmp_path, tiny, 5)
    files = []
    for hash_seed in ("1", "2"):  # the order of Python's sets must not matter
        out = f"run{hash_seed}"
        made = ["quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--threads", threads, "--out", out, "-q"]
        written = ["export", f"{out}/model.safetensors", "--onnx", "--layout", "fused", "--out", f"{out}/m.onnx"]
        both = f"{QUICKLY}; from dsconvert.commands.cli import main; main({made}); main({written})"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
        subprocess.run(
            [sys.executable, "-c", both], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=HANGS
        )
        files.append([(tmp_path / out / name).read_bytes() for name in ("model.safetensors", "m.onnx")])
    # the command that made it is kept with the model, and names the folder
    assert resealed(files[0][0].replace(b"run1", b"run2"), "dsconvert") == files[1][0]
    assert files[0][1] == files[1][1]
