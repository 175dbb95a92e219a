"""What the accuracy page says beside mAP, and how it is written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from dsconvert.scoring.accuracy import Detections

sys.path.insert(0, str(ROOT / "benchmarks"))


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 6)


def test_boxes_lost_new_and_moved():
    """Three sure boxes in two images. A row keeps two of them, one of these a tenth surer, calls the third another
    class, and is unsure of a fourth."""
    from accuracy import beside, box_counts

    first = [boxes([0, 0, 9, 9, 0.8, 1], [20, 0, 29, 9, 0.5, 0]), boxes([0, 0, 9, 9, 0.3, 2], [5, 5, 30, 30, 0.1, 0])]
    second = [
        boxes([0, 0, 9, 9, 0.9, 1], [20, 0, 29, 9, 0.5, 1]),
        boxes([0, 0, 9, 9, 0.3, 2], [40, 40, 50, 50, 0.2, 2]),
    ]
    found = Detections([first, second], [np.zeros((0, 5))] * 2, [(64, 64)] * 2, 3)
    assert beside(box_counts(found, 0).sum(0)).tolist() == [0, 0, 0]
    counts = box_counts(found, 1)
    assert counts.tolist() == [[2, 2, 1, pytest.approx(0.1)], [1, 1, 1, 0]]
    assert beside(counts.sum(0)).tolist() == pytest.approx([1 / 3, 1 / 3, 0.05])
    # the first image drawn twice, and never: half of its boxes, none of the other's
    assert beside(np.array([[2.0, 0.0], [0.0, 2.0]]) @ counts).tolist() == [
        pytest.approx([1 / 2, 1 / 2, 0.1]), [0, 0, 0],
    ]  # fmt: skip


def found_on(images: int, drop: float) -> dict[str, object]:
    """What `accuracy.py` keeps of a set of images: float32, the default in two draws, a peer."""
    from accuracy_page import DEFAULT, SECOND

    def row(name: str, group: str, drop: float, size: int) -> dict[str, object]:
        rest = {"low": drop - 0.1, "high": drop + 0.2, "lost": 0.04, "new": 0.03, "moved": 0.02,
                "box intervals": [[0.03, 0.05], [0.02, 0.04], [0.01, 0.03]]}  # fmt: skip
        return {"name": name, "group": group, "map": 0.3 - drop / 100, "map50": 0.5, "drop": drop, "bytes": size,
                "weight bits": None, "smaller": None, **rest}  # fmt: skip

    rows = [
        row("float32", "main", 0.0, 7_500_000),
        row(DEFAULT, "main", drop, 1_100_000),
        row(DEFAULT + SECOND, "draws", drop + 0.2, 1_100_000),
        row("OpenVINO NNCF int8", "main", 0.6, 1_900_000),
    ]
    return {"command": "python benchmarks/accuracy.py", "date": "2026-11-30", "cpu": "some CPU", "threads": 2,
            "images": images, "imgsz": 640, "rounds": 1000, "rows": rows}  # fmt: skip


def test_the_page_has_every_set_with_its_draws_and_keeps_its_notes(tmp_path: Path):
    from accuracy_page import write_page

    page = tmp_path / "accuracy.md"
    page.write_text("# Accuracy\n\n<!-- notes -->\nwritten by hand\n<!-- notes -->\n\nold\n")
    write_page({"corn pests": found_on(500, 0.4), "a few": found_on(20, 1.0)}, page)
    text = page.read_text()
    assert "written by hand" in text
    assert "\nold\n" not in text
    assert text.index("## corn pests") < text.index("## a few")
    # the mean of both draws, 0.4 and 0.6 points
    assert "| dsconvert default (mixed, 4 bit size) | 0.40 | 0.60 | 0.50 | 4.0 % | 3.0 % | 0.020 |" in text
    assert (
        "| 0.2960 | 0.5000 | 0.40 | 0.30 to 0.60 | 4.0 % (3.0 to 5.0) | 3.0 % (2.0 to 4.0) | 0.020 (0.010 to 0.030) |"
        in text
    )
    assert text.count("cannot tell apart files") == 1  # of twenty images
    assert (tmp_path / "accuracy.svg").is_file()
