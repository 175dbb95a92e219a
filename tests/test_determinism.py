"""The same bytes from two runs with the same number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT

from dsconvert.yolo.checkpoint import yolov5_bytes


@pytest.mark.parametrize("threads", ["1", "2"])
def test_two_runs_give_the_same_bytes(tiny, tmp_path, threads):
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(*tiny))
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = []
    for hash_seed in ("1", "2"):  # the order of Python's sets must not matter
        out = f"run{hash_seed}"
        made = ["quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--threads", threads, "--out", out, "-q"]
        written = ["export", f"{out}/model.safetensors", "--onnx", "--layout", "fused", "--out", f"{out}/m.onnx"]
        both = f"from dsconvert.cli import main; main({made}); main({written})"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
        subprocess.run(
            [sys.executable, "-c", both], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300
        )
        files.append([(tmp_path / out / name).read_bytes() for name in ("model.safetensors", "m.onnx")])
    # the command that made it is kept with the model, and names the folder
    assert files[0][0].replace(b"run1", b"run2") == files[1][0]
    assert files[0][1] == files[1][1]
