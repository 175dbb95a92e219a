"""What the accuracy page says beside mAP."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import ROOT

from dsconvert.evaluate.accuracy import Detections

sys.path.insert(0, str(ROOT / "benchmarks"))


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 6)


def test_boxes_lost_new_and_moved():
    """Three sure boxes in two images. A row keeps two of them, one of these a tenth surer, calls the third another
    class, and is unsure of a fourth."""
    from accuracy import beside

    first = [boxes([0, 0, 9, 9, 0.8, 1], [20, 0, 29, 9, 0.5, 0]), boxes([0, 0, 9, 9, 0.3, 2], [5, 5, 30, 30, 0.1, 0])]
    second = [
        boxes([0, 0, 9, 9, 0.9, 1], [20, 0, 29, 9, 0.5, 1]),
        boxes([0, 0, 9, 9, 0.3, 2], [40, 40, 50, 50, 0.2, 2]),
    ]
    found = Detections([first, second], [np.zeros((0, 5))] * 2, [(64, 64)] * 2, 3)
    assert beside(found, 0) == (0, 0, 0)
    assert beside(found, 1) == (pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(0.05))
