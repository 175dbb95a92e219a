"""Curves of precision against recall for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsconvert.scoring.coco import Array, all_areas

RECALLS = 101  # COCO's recall levels: 0, 0.01, .., 1


@dataclass(frozen=True)
class ClassCurve:
    """One class: average precision over IoU 0.50..0.95 and at 0.50, and the precision at IoU 0.50 for each recall
    level.
    """

    ap50_95: float
    ap50: float
    precision: tuple[float, ...]


def class_curves(tables: dict[str, Any]) -> dict[int, ClassCurve]:
    """Return the curve of every class that has objects, by class number, from the tables of `coco.coco_tables`."""
    precision = all_areas(tables)
    present = np.nonzero(precision[0, 0] > -1)[0]
    return {
        tables["classes"][i]: ClassCurve(
            float(precision[:, :, i].mean()), float(precision[0, :, i].mean()), tuple(precision[0, :, i].tolist())
        )
        for i in present
    }


def mean_curve(curves: dict[int, ClassCurve]) -> ClassCurve:
    """Return the mean over classes. Raises ValueError when there is none."""
    if not curves:
        raise ValueError("there is no class")
    every = list(curves.values())
    mean = np.mean([c.precision for c in every], 0)
    return ClassCurve(
        float(np.mean([c.ap50_95 for c in every])), float(np.mean([c.ap50 for c in every])), tuple(mean.tolist())
    )


def object_counts(truths: Sequence[Array]) -> dict[int, int]:
    """Return the number of objects by class number; the first column of truths (m, 5) is the class."""
    kinds = np.concatenate([t[:, 0] for t in truths]).astype(int) if truths else np.zeros(0, int)
    return {int(k): int(n) for k, n in zip(*np.unique(kinds, return_counts=True), strict=True)}
