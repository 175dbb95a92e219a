"""Whether a float file sees anything in the calibration images: an input on the wrong scale gives no error, only worse
weights. What tells is that nothing is found, that everything is, or that all images give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsconvert.base.text import Sentence
from dsconvert.onnxfile.images import Normalisation, as_input
from dsconvert.onnxfile.source import Array, ImageInput
from dsconvert.photos.images import Image

MOST_IMAGES = 8
CONFIDENT = 0.25  # the least score that YOLOv5's detect.py shows
SATURATED = 0.999  # a best score that every image reaches
CONSTANT = 0.005  # of the spread of an output: six real detectors have 0.08 and more on their scale
RAW = Normalisation((0.0,), (1 / 255,))
# what can be given in the place of 0..1, and how it reads
_OTHERS = (
    (None, "as 0..1", "leave out {mean} and {std}"),
    (RAW, "as 0..255", "give {mean} 0 {std} 0.003921569"),
    (Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "with ImageNet's mean and deviation",
     "give {mean} 0.485,0.456,0.406 {std} 0.229,0.224,0.225"),
)  # fmt: skip


@dataclass(frozen=True)
class Response:
    """What a file makes of some images. best and least: the largest and smallest of the images' best scores (None: no
    output looks like scores); variation: where there are no scores, how much outputs differ between images, as a share
    of their spread (None: too few images, or no output to compare); finite: no NaN and no infinite numbers."""

    best: float | None
    least: float | None
    variation: float | None
    finite: bool

    @property
    def fault(self) -> str | None:
        """What is wrong with it, None where nothing is."""
        if not self.finite:
            return "gives numbers that are infinite or none"
        if self.best is not None and self.best < CONFIDENT:
            return f"finds nothing above {CONFIDENT} (the best score is {self.best:.2f})"
        if self.least is not None and self.least >= SATURATED:
            return f"finds something with a score of {self.least:.2f} in every image, as if its scores were saturated"
        if self.variation is not None and self.variation < CONSTANT:
            return f"gives nearly the same for every image (outputs differ by {100 * self.variation:.1f} %)"
        return None


def warning(
    run: Callable[[Array], list[Any]], images: Sequence[Image], wanted: ImageInput, normal: Normalisation | None
) -> str | None:
    """A sentence where the file's outputs look empty, saturated or constant, with another scale on which they do not.

    `run` gives the outputs for a batch; it may raise anything."""
    some = images[:: max(1, len(images) // MOST_IMAGES)][:MOST_IMAGES]
    given = _response(run, some, wanted, normal)
    if given is None or given.fault is None:
        return None
    count = f"{len(some)} calibration image{'s' if len(some) > 1 else ''}"
    begun = f"On {count} the float network {given.fault}"
    for other, how, option in _OTHERS if wanted.type is not np.uint8 else ():
        found = None if _alike(other, normal) else _response(run, some, wanted, other)
        if found is not None and found.fault is None and _better(found, given):
            shows = f"its best score is {found.best:.2f}" if found.best is not None else "they differ"
            crops = "; it also crops images to their middle" if other is not None else ""
            return Sentence(f"{begun}; fed {how}, {shows}: {option}, if the network was trained so{crops}.")
    scale = "" if wanted.type is np.uint8 else ", and that its input is 0..1 ({mean} and {std} give another scale)"
    return Sentence(f"{begun}; check that the images are like those it was trained on{scale}.")


def _alike(a: Normalisation | None, b: Normalisation | None) -> bool:
    """The same but for a rounding in what was typed."""
    return a == b or (
        a is not None and b is not None and len(a.mean) == len(b.mean) and len(a.std) == len(b.std)
        and np.allclose(a.mean, b.mean, atol=1e-6) and np.allclose(a.std, b.std, rtol=1e-3)
    )  # fmt: skip


def _better(found: Response, given: Response) -> bool:
    """Whether another scale, on which nothing is at fault, shows clearly more."""
    if found.best is not None and given.best is not None:
        return found.best > 2 * given.best or given.best >= CONFIDENT
    if found.variation is not None and given.variation is not None:
        return found.variation > 2 * given.variation
    return True


def _response(
    run: Callable[[Array], list[Any]], images: Sequence[Image], wanted: ImageInput, normal: Normalisation | None
) -> Response | None:
    try:
        made = [run(as_input([image] * wanted.batch, wanted, normal)) for image in images]
    except Exception:  # a file that cannot run is refused elsewhere, and a scale that does not fit it is no advice
        return None
    return response(made, len({image.tobytes() for image in images}) == len(images) > 1)


def response(made: Sequence[Sequence[Any]], distinct: bool) -> Response:
    """From every image's outputs; `distinct`: the images are several, and none is another's copy."""
    scores: list[Array] = []
    variations: list[float] = []
    finite = True
    for outputs in zip(*made, strict=True):
        if any(not isinstance(o, np.ndarray) or o.dtype.kind != "f" or o.shape != outputs[0].shape for o in outputs):
            continue
        values = np.stack(outputs).astype(np.float64)
        if not np.isfinite(values).all():
            finite = False
            continue
        if distinct and (spread := float(values.std())) > 0:
            variations.append(float(values.std(0).mean()) / spread)
        if (found := _scores(values)) is not None:
            scores.append(found)
    best = np.max(scores, 0) if scores else None
    return Response(
        None if best is None else float(best.max()), None if best is None else float(best.min()),
        max(variations, default=None) if best is None else None, finite,
    )  # fmt: skip


def _scores(values: Array) -> Array | None:
    """The best score of every image (first dimension), where an output looks like boxes with scores, or class scores of
    many places: YOLOv5's rows (x, y, w, h, objectness, classes), YOLOv8's columns, or maps between 0 and 1."""
    if values.size == 0 or values.ndim < 3:
        return None
    rows = values.reshape(len(values), -1, values.shape[-1])
    if values.ndim == 4 and 6 <= values.shape[2] < values.shape[3]:
        turned = values[:, 0].transpose(0, 2, 1)
        if _is_probability(turned[..., 4:]) and turned[..., :4].max() > 2:
            return np.asarray(turned[..., 4:].max((1, 2)))
    if rows.shape[-1] >= 6 and _is_probability(rows[..., 4:]) and not _is_probability(rows[..., :4]):
        return np.asarray((rows[..., 4:5] * rows[..., 5:]).max((1, 2)))
    sums = rows.sum(-1)
    if rows.shape[1] > 1 and rows.shape[-1] >= 2 and _is_probability(rows) and not np.allclose(sums, 1, atol=1e-3):
        return np.asarray(rows.max((1, 2)))
    return None


def _is_probability(values: Array) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)
