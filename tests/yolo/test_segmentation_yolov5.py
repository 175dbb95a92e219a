"""Our definition of yolov5n-seg against YOLOv5's own, which runs in a process of its own: where DSCONVERT_YOLOV5 names
a tree of theirs (v7.0 or later)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HANGS, ROOT
from pt_writer import yolov5_bytes

from dsconvert.graph.run import run_float
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import decode
from dsconvert.yolo.lower import lower

HELP = ROOT / "tests/help"
TREE = os.environ.get("DSCONVERT_YOLOV5", "")
pytestmark = [pytest.mark.long, pytest.mark.skipif(not TREE, reason="DSCONVERT_YOLOV5 names no YOLOv5 tree")]
LOADED_BY_YOLOV5 = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import yolov5_segment
sys.meta_path.insert(0, yolov5_segment._StandIns())
sys.path.insert(0, sys.argv[2])
content = torch.load(sys.argv[3], weights_only=False)
torch.save(content["model"].float().eval()(torch.load(sys.argv[4])["image"])[:2], sys.argv[5])
"""


def run(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    run(HELP / "yolov5_segment.py", TREE, folder)
    return folder


def test_we_read_their_checkpoint_and_compute_what_they_do(theirs):
    wanted = torch.load(theirs / "io.pth")
    ours = load_checkpoint(theirs / "seg.pt")
    assert sum(p.numel() for p in ours.network.parameters()) == wanted["parameters"] == 1_991_549
    with torch.no_grad():
        raw = ours.network(wanted["image"])
    torch.testing.assert_close(raw[-1], wanted["prototypes"])
    fused = run_float(*lower(ours.network.fused()), wanted["image"])
    for maps in (raw, fused):
        torch.testing.assert_close(decode(maps, ours.head), wanted["boxes"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(maps[-1], wanted["prototypes"], rtol=1e-4, atol=1e-5)


def test_they_read_ours_and_compute_the_same(theirs, tmp_path):
    ours = load_checkpoint(theirs / "seg.pt")
    (tmp_path / "ours.pt").write_bytes(yolov5_bytes(ours.network, ours.head))
    (tmp_path / "load.py").write_text(LOADED_BY_YOLOV5)
    run(tmp_path / "load.py", HELP, TREE, tmp_path / "ours.pt", theirs / "io.pth", tmp_path / "o.pth")
    wanted = torch.load(theirs / "io.pth")
    boxes, prototypes = torch.load(tmp_path / "o.pth")
    torch.testing.assert_close(boxes, wanted["boxes"])
    torch.testing.assert_close(prototypes, wanted["prototypes"])
