"""The same bytes from every run, whatever the hash seed of Python and the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT, write_work


def test_every_run_gives_the_same_bytes(tiny, tmp_path):
    write_work(tmp_path, tiny, 5)
    files = []
    # the order of Python's sets must not matter, nor who computes what
    for hash_seed, threads in (("1", "1"), ("2", "1"), ("2", "2")):
        out = f"run{hash_seed}{threads}"
        made = ["quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--threads", threads, "--out", out, "-q"]
        written = ["export", f"{out}/model.safetensors", "--onnx", "--layout", "fused", "--out", f"{out}/m.onnx"]
        both = f"from dsconvert.cli import main; main({made}); main({written})"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
        subprocess.run(
            [sys.executable, "-c", both], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300
        )
        files.append([(tmp_path / out / name).read_bytes() for name in ("model.safetensors", "m.onnx")])
    assert files[0] == files[1] == files[2]
