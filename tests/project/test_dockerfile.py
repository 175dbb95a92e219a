"""The Dockerfile's own lines, run in a chroot: the image converts a checkpoint as an ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import DEMO, ROOT
from image import build, instructions, sent

import dsconvert

BASE = os.environ.get("DSCONVERT_DEBIAN", "")


def test_instructions_are_read_with_their_continued_lines():
    text = "# a\nFROM x AS y\nRUN one \\\n # why\n && two \\\n   three\nCMD []\n"
    found = [(name, " ".join(rest.split())) for name, rest in instructions(text)]
    assert found == [("FROM", "x AS y"), ("RUN", "one && two three"), ("CMD", "[]")]
    assert next(name for name, _ in instructions((ROOT / "Dockerfile").read_text())) == "FROM"


@pytest.mark.long
@pytest.mark.skipif(not BASE, reason="DSCONVERT_DEBIAN names no Debian tree with python3.11 (debootstrap makes one)")
def test_the_image_converts_a_checkpoint(tmp_path):
    """Minutes: it installs PyTorch."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    context = [ROOT / name for name in sent((ROOT / ".dockerignore").read_text(), listed)]
    image = build(ROOT / "Dockerfile", context, Path(BASE), tmp_path)
    assert not (image.tree / "src").exists()
    assert image.run(*image.entry, "--version").stdout.split()[-1] == dsconvert.__version__
    assert image.run("/usr/bin/id", "-un").stdout == "dsconvert\n"
    photos = image.tree / "work" / "photos"
    photos.mkdir()
    for path in sorted((DEMO / "images").rglob("*.jpg"))[:4]:
        shutil.copy(path, photos)
    shutil.copy(DEMO / "demo.pt", image.tree / "work" / "best.pt")
    (image.tree / "work").chmod(0o777)
    image.user = "4321:4321"  # as by --user
    image.run(*image.entry, "quantize", "best.pt", "--calib", "photos", "--imgsz", "160", "--out", "made")
    image.run(*image.entry, "export", "made/model.safetensors", "--onnx", "--out", "best.onnx")
    image.run(*image.entry, "report", "made/model.safetensors", "--data", "photos", "--out", "report.html")
    for name in ("made/model.safetensors", "best.onnx", "report.html"):
        assert (image.tree / "work" / name).stat().st_uid == 4321
