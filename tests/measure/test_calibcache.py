"""The calibration cache: the same bytes with it as without, and no second look at the images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import write_work

from dsconvert.convert import quantize as pipeline
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.model.file import model_bytes
from dsconvert.yolo.checkpoint import load_checkpoint


@pytest.fixture
def folder(tiny, tmp_path):
    """best.pt and three pictures."""
    return write_work(tmp_path, tiny, 3)


def run(folder, cache, **options):
    wanted = QuantizeOptions(calib=folder / "images", **{"imgsz": 32, **options})
    return model_bytes(quantize(load_checkpoint(folder / "best.pt"), wanted, cache=cache).model)


@pytest.fixture
def looks(monkeypatch):
    """How often images were looked at."""
    counted: list[int] = []
    original = pipeline.calibrate
    monkeypatch.setattr(pipeline, "calibrate", lambda *given: counted.append(1) or original(*given))
    return counted


def test_a_second_run_does_not_look_again_and_ends_in_the_same_bytes(folder, looks):
    kept = folder / "kept"
    plain = run(folder, None)
    assert run(folder, kept) == plain
    assert len(looks) == 2
    assert run(folder, kept) == plain
    assert len(looks) == 2
    # a budget changes the widths, not what is known of them
    smaller = run(folder, kept, target_bytes=32_000)
    assert len(looks) == 2
    assert smaller == run(folder, None, target_bytes=32_000) != plain


def test_whatever_else_changes_is_calibrated_for_itself(folder, looks):
    kept = folder / "kept"
    run(folder, kept)
    for other in ({"seed": 1}, {"activations": "float"}, {"bits": 4}, {"imgsz": 64}, {"block_size": 8}):
        run(folder, kept, **other)
    assert len(looks) == 6
    cv2.imwrite(str(folder / "images/0.png"), np.zeros((64, 64, 3), np.uint8))
    run(folder, kept)
    assert len(looks) == 7
    assert len(list(kept.iterdir())) == 7


def test_a_damaged_file_is_made_again(folder, looks):
    kept = folder / "kept"
    whole = run(folder, kept)
    (path,) = kept.iterdir()
    good = path.read_bytes()
    for bad in (b"", good[: len(good) // 2], good.replace(b'"own"', b'"owm"').replace(b'\\"own\\"', b'\\"owm\\"')):
        path.write_bytes(bad)
        assert run(folder, kept) == whole
        assert path.read_bytes() == good
    assert len(looks) == 4
