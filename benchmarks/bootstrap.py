"""Paired bootstrap of mAP over images, without matching the boxes again for every draw.

pycocotools matches every image once. A draw of images with repetition is then a weight an image, and average
precision over weighted detections takes two cumulative sums.
"""

from __future__ import annotations

import contextlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dsconvert.scoring.accuracy import Detections
from dsconvert.scoring.coco import ground_truth, results

RECALLS = np.linspace(0, 1, 101)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ClassMatches:
    """One class's detections over all images, by falling score: the image of each, whether it is a match at each of
    the IoU thresholds (thresholds, n), and how many objects every image has."""

    images: NDArray[np.int64]
    hits: NDArray[np.bool_]
    objects: NDArray[np.int64]


def match(found: Detections, predictor: int) -> list[ClassMatches]:
    """The classes that have objects, with what one predictor found of them (COCO's rules: 100 detections an image)."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth(found.truths, found.shapes, found.nc)
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results(found.found[predictor])), "bbox")
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [[0, 1e10]], ["all"], [100]
        run.evaluate()
    count = len(found.truths)
    made = []
    for first in range(0, len(run.evalImgs), count):
        scores, images, hits, objects = [], [], [], np.zeros(count, np.int64)
        for image, result in enumerate(run.evalImgs[first : first + count]):
            if result is None:
                continue
            objects[image] = len(result["gtIds"])
            scores.append(np.array(result["dtScores"]))
            images.append(np.full(len(scores[-1]), image))
            hits.append(np.array(result["dtMatches"]).reshape(len(run.params.iouThrs), -1) > 0)
        if objects.any():
            order = np.argsort(-np.concatenate(scores), kind="mergesort")
            made.append(ClassMatches(np.concatenate(images)[order], np.concatenate(hits, 1)[:, order], objects))
    return made


def mean_ap(classes: list[ClassMatches], weights: Array) -> float:
    """mAP50-95 where image i counts `weights[i]` times; classes without an object in the draw are left out."""
    total = [average_precision(c, weights) for c in classes if (c.objects @ weights) > 0]
    return float(np.mean(total))


def average_precision(c: ClassMatches, weights: Array) -> float:
    """Precision at 101 recalls, each the best at that recall or beyond, over all thresholds (COCO's definition)."""
    w = weights[c.images]
    kept = w > 0
    w, hits = w[kept], c.hits[:, kept]
    if not len(w):
        return 0.0
    right, seen = (hits * w).cumsum(1), w.cumsum()
    precision = np.maximum.accumulate((right / seen)[:, ::-1], 1)[:, ::-1]
    recall = right / (c.objects @ weights)
    values = []
    for p, r in zip(precision, recall, strict=True):
        at = np.searchsorted(r, RECALLS)  # the same float64 quotients as pycocotools compares
        values.append(np.where(at < len(p), p[np.minimum(at, len(p) - 1)], 0).mean())
    return float(np.mean(values))


def image_draws(count: int, rounds: int, seed: int = 0) -> list[Array]:
    """How often each of `count` images comes, in every round that draws as many with repetition."""
    rng = np.random.default_rng(seed)
    return [np.bincount(rng.integers(0, count, count), minlength=count).astype(float) for _ in range(rounds)]


def bootstrap(found: Detections, draws: list[Array]) -> Array:
    """(rounds, predictors) mAP50-95 over the images drawn in each round, the same for every predictor."""
    matched = [match(found, i) for i in range(len(found.found))]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return np.array(list(pool.map(partial(_resampled, draws), matched))).T


def _resampled(draws: list[Array], classes: list[ClassMatches]) -> list[float]:
    return [mean_ap(classes, draw) for draw in draws]
