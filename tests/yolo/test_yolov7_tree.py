"""YOLOv7's own models, in the tree that DSCONVERT_YOLOV7 names: docs/contributing.md says how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
from trees import Tree, noise, worst

from dsconvert.base.errors import InputError
from dsconvert.yolo.checkpoint import load_checkpoint

pytestmark = pytest.mark.long
TAKEN = ("yolov7", "yolov7-tiny", "yolov7x")
AUXILIARY = "yolov7-w6"


def test_the_trees_models_load_as_they_are(tmp_path):
    """Training yamls with random numbers (implicit layers and all three parts of RepConv too), saved as train.py does:
    the same maps in evaluation mode."""
    tree, image = Tree("DSCONVERT_YOLOV7", tmp_path), noise(1, 128)
    cfgs: list[Path] = [tree.path / f"cfg/training/{name}.yaml" for name in (*TAKEN, AUXILIARY)]
    tree.inside("build", image, tmp_path, cfgs)
    apart = {name: worst(tmp_path, name, image)[1] for name in TAKEN}
    assert max(apart.values()) < 1e-5, apart
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / f"{AUXILIARY}.pt")
