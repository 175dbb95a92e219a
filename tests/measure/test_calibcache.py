"""The calibration cache: the same bytes with it as without, and no second look at the images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.model.file import model_bytes
from dsconvert.yolo.checkpoint import load_checkpoint


@pytest.fixture
def looks():
    """Grows with each look at the images."""
    return []


@pytest.fixture
def run(folder, looks):
    """What makes the model's bytes."""

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("importance", total):
            looks.append(total)

    def made(cache, **options):
        wanted = QuantizeOptions(calib=folder / "images", **{"imgsz": 32, **options})
        checkpoint = load_checkpoint(folder / "best.pt")
        return model_bytes(quantize(checkpoint, wanted, progress=progress, cache=cache).model)

    return made


def test_a_second_run_does_not_look_again_and_ends_in_the_same_bytes(folder, run, looks):
    kept = folder / "kept"
    plain = run(None)
    assert run(kept) == plain
    assert len(looks) == 2
    assert run(kept) == plain
    assert len(looks) == 2
    # a budget changes the widths, not what is known of them
    smaller = run(kept, target_bytes=32_000)
    assert len(looks) == 2
    assert smaller == run(None, target_bytes=32_000) != plain


@pytest.mark.usefixtures("small")
def test_whatever_else_changes_is_calibrated_for_itself(folder, run, looks):
    kept = folder / "kept"
    run(kept)
    for other in ({"seed": 1}, {"activations": "float"}, {"bits": 4}, {"imgsz": 64}, {"block_size": 8}):
        run(kept, **other)
    assert len(looks) == 6
    cv2.imwrite(str(folder / "images/0.png"), np.zeros((64, 64, 3), np.uint8))
    run(kept)
    assert len(looks) == 7
    assert len(list(kept.iterdir())) == 7


@pytest.mark.usefixtures("small")
def test_a_damaged_file_is_made_again(folder, run, looks):
    kept = folder / "kept"
    whole = run(kept)
    (path,) = kept.iterdir()
    good = path.read_bytes()
    for bad in (b"", good[: len(good) // 2], good.replace(b'"own"', b'"owm"').replace(b'\\"own\\"', b'\\"owm\\"')):
        path.write_bytes(bad)
        assert run(kept) == whole
        assert path.read_bytes() == good
    assert len(looks) == 4
