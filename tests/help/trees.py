"""Running the scripts of somebody's YOLOv5 or YOLOv7 tree, which an environment variable names. Black boxes: they are
started, and what they write is compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torchvision_stub
from conftest import ROOT
from numpy.typing import NDArray

from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint


class Tree:
    """A tree, and the environment its scripts run in: nothing is installed, and nothing downloaded."""

    def __init__(self, variable: str, work: Path) -> None:
        if not os.environ.get(variable):
            pytest.skip(f"{variable} names no tree", allow_module_level=True)
        self.path, self.work = Path(os.environ[variable]).resolve(), work
        stub = torchvision_stub.write(work / "stub")
        paths = [self.path, ROOT, *([stub] if stub else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = work / "settings"
        settings.mkdir()
        # the font that they would download
        fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
        (settings / "Arial.ttf").write_bytes((fonts / "DejaVuSans.ttf").read_bytes())
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)), "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true",
            "YOLO_CONFIG_DIR": str(settings), "YOLOV5_CONFIG_DIR": str(settings), "WANDB_MODE": "disabled",
            # their older code unpickles what it wrote itself
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        }  # fmt: skip

    def run(self, script: str | Path, *arguments: object) -> str:
        """A script, in the tree's folder; what it printed, both streams."""
        done = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)], cwd=self.path, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def inside(self, job: str, image: torch.Tensor, out: Path, cfgs: list[Path]) -> str:
        """`in_yolo_tree.py`, see there."""
        torch.save(image, out / "image")
        return self.run(ROOT / "tests/help/in_yolo_tree.py", job, out / "image", out, *cfgs)


def noise(images: int, side: int) -> torch.Tensor:
    """On the 8-bit grid: (images, 3, side, side)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(images, 3, side, side, generator=generator).mul(255).round() / 255


def worst(out: Path, name: str, image: torch.Tensor) -> tuple[Checkpoint, float]:
    """A checkpoint that the tree wrote, and how far dsconvert's raw maps are from the tree's, as a share of each map's
    largest number."""
    return difference(out / f"{name}.pt", out, image)


def difference(path: Path, out: Path, image: torch.Tensor) -> tuple[Checkpoint, float]:
    """The same of a checkpoint elsewhere, whose maps are in OUT."""
    checkpoint, name = load_checkpoint(path), path.stem
    theirs = [m.permute(0, 1, 4, 2, 3).flatten(1, 2) for m in torch.load(out / f"{name}.maps.pt", weights_only=True)]
    ours = checkpoint.network(image)
    assert all(float(t.std()) > 0.1 for t in theirs)
    return checkpoint, max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def read_boxes(folder: Path, name: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    """labels/NAME.txt of --save-txt --save-conf as (n, 6): class, centre, width, height in pixels, score."""
    path = folder / "labels" / f"{name}.txt"
    rows = np.loadtxt(path, ndmin=2) if path.exists() else np.zeros((0, 6))
    return rows * [1, shape[1], shape[0], shape[1], shape[0], 1]


def unmatched(ours: NDArray[np.float64], theirs: NDArray[np.float64], pixels: float) -> int:
    """Boxes of either that have no box of the same class and score (to 10^-4), within so many pixels, in the other."""
    alike = np.abs(ours[:, None] - theirs) <= [0, pixels, pixels, pixels, pixels, 1e-4]
    both = alike.all(2)
    return int((~both.any(1)).sum() + (~both.any(0)).sum())
