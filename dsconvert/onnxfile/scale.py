"""Warn if a float file sees nothing in the calibration images.

An input on the wrong scale gives no error, only worse weights. It shows in that nothing is found, everything is found,
or all images give the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsconvert.base.size import Size
from dsconvert.base.text import Sentence
from dsconvert.onnxfile.decoding import boxes_of, families_like
from dsconvert.onnxfile.images import as_input
from dsconvert.onnxfile.presets import presets
from dsconvert.onnxfile.rules import Unfit
from dsconvert.onnxfile.source import Array, ImageInput
from dsconvert.photos.form import PLAIN, InputForm
from dsconvert.photos.images import Image

MOST_IMAGES = 8
CONFIDENT = 0.25  # least score that YOLOv5's detect.py shows
SATURATED = 0.999  # the best score of every image reaches this when scores are saturated
CONSTANT = 0.005  # of an output's spread; six real detectors have 0.08 and more with the right scale
RAW = InputForm(scale=1)
IMAGENET = presets()["imagenet"].form
# other inputs to try, and their names in the warning
_OTHERS = ((PLAIN, "as 0..1"), (RAW, "as 0..255"), (IMAGENET, "with ImageNet's mean and deviation"))


@dataclass(frozen=True)
class Response:
    """What a file gives for some images.

    best, least: the largest and the smallest of the images' best scores; None if no output looks like scores.
    variation: without scores, how much outputs differ between images, as a share of their spread; None if there are too
        few images or no output to compare.
    finite: whether there is no NaN and no infinite number.
    """

    best: float | None
    least: float | None
    variation: float | None
    finite: bool

    @property
    def fault(self) -> str | None:
        """What is wrong with the response, or None."""
        if not self.finite:
            return "gives NaN or infinite numbers"
        if self.best is not None and self.best < CONFIDENT:
            return f"finds nothing above {CONFIDENT} (the best score is {self.best:.2f})"
        if self.least is not None and self.least >= SATURATED:
            return f"finds something with a score of {self.least:.2f} in every image, as if its scores were saturated"
        if self.variation is not None and self.variation < CONSTANT:
            return f"gives nearly the same for every image (outputs differ by {100 * self.variation:.1f} %)"
        return None


def warning(
    run: Callable[[Array], list[Any]], images: Sequence[Image], wanted: ImageInput, form: InputForm,
    decode: str | None = None,
) -> str | None:  # fmt: skip
    """Return a warning if the file's outputs look empty, saturated or constant, with a scale on which they do not.

    run: returns the outputs for a batch; it may raise anything.
    images: placed as the form says.
    wanted: the file's input.
    form: how images become numbers.
    decode: rule that turns the outputs into boxes; None: scores are recognised by their values.
    """
    some = images[:: max(1, len(images) // MOST_IMAGES)][:MOST_IMAGES]
    given = _response(run, some, wanted, form, decode)
    if given is None or given.fault is None:
        return None if given is None or decode is not None else _family(run, some[0], wanted, form)
    count = f"{len(some)} calibration image{'s' if len(some) > 1 else ''}"
    begun = f"On {count} the float network {given.fault}"
    for numbers, how in _OTHERS if wanted.type is not np.uint8 else ():
        other = replace(numbers, bgr=form.bgr, fit=form.fit, pad=form.pad)
        found = None if _alike(other, form) else _response(run, some, wanted, other, decode)
        if found is not None and found.fault is None and _better(found, given):
            shows = f"its best score is {found.best:.2f}" if found.best is not None else "they differ"
            return Sentence(f"{begun}; fed {how}, {shows}: {_way(form, other)}, if the network was trained so.")
    scale = "" if wanted.type is np.uint8 else f", and that {_shown(form)} is its input ({{input}} names others)"
    return Sentence(f"{begun}; check that the images look like its training images{scale}.")


def _family(run: Callable[[Array], list[Any]], image: Image, wanted: ImageInput, form: InputForm) -> str | None:
    """Return a warning if the outputs belong to a family with another input than YOLOv5's, which is being used.

    Scores alone do not show it, as the wrong input only lowers them.
    """
    if form != PLAIN:
        return None
    try:
        outputs = [
            np.asarray(o)[:1] if wanted.batch > 1 else o for o in run(as_input([image] * wanted.batch, wanted, form))
        ]
        names = families_like(outputs, Size(wanted.height, wanted.width))
    except Exception:  # see `_response`
        return None
    if not names or any(presets()[name].form == PLAIN for name in names):
        return None
    ways = " or ".join(f"{{input}} {name}" for name in names)
    return Sentence(
        f"Its outputs look like another family's, which needs another input than YOLOv5's; give {ways} if it is one."
    )


def _way(given: InputForm, other: InputForm) -> str:
    """Return the options that lead from one form to another, and a preset that leads there too."""
    parts = [f"{{scale}} {other.scale}"] if other.scale != given.scale else []
    if other.is_normalised or given.is_normalised:
        mean, std = (",".join(f"{v:g}" for v in values) for values in (other.mean, other.std))
        parts += [f"{{mean}} {mean} {{std}} {std} {{fit}} {other.fit}"]
    alike = [name for name, preset in presets().items() if _alike(replace(other, bgr=preset.form.bgr), preset.form)]
    best = next((name for name in alike if presets()[name].form.fit == other.fit), alike[0])
    return f"give {' '.join(parts)} (or {{input}} {best})"


def _shown(form: InputForm) -> str:
    scale = "0..1" if form.scale == 255 else "0..255"
    return f"{scale} less a mean, by a deviation," if form.is_normalised else scale


def _alike(a: InputForm, b: InputForm) -> bool:
    """Return whether two forms give the same numbers, up to rounding of typed values."""
    return (
        (a.scale, a.bgr, len(a.mean), len(a.std)) == (b.scale, b.bgr, len(b.mean), len(b.std))
        and np.allclose(a.mean, b.mean, atol=1e-6) and np.allclose(a.std, b.std, rtol=1e-3)
    )  # fmt: skip


def _better(found: Response, given: Response) -> bool:
    """Return whether another scale, on which nothing is wrong, gives clearly more."""
    if found.best is not None and given.best is not None:
        return found.best > 2 * given.best or given.best >= CONFIDENT
    if found.variation is not None and given.variation is not None:
        return found.variation > 2 * given.variation
    return True


def _response(
    run: Callable[[Array], list[Any]], images: Sequence[Image], wanted: ImageInput, form: InputForm,
    decode: str | None,
) -> Response | None:  # fmt: skip
    try:
        made = [run(as_input([image] * wanted.batch, wanted, form)) for image in images]
        if decode is not None and (found := _of_boxes(made, wanted, decode)) is not None:
            return found
    except Exception:  # a file that cannot run is refused elsewhere, and a scale that it cannot take is no advice
        return None
    return response(made, len({image.tobytes() for image in images}) == len(images) > 1)


def _of_boxes(made: Sequence[Sequence[Array]], wanted: ImageInput, decode: str) -> Response | None:
    """Return the response from the boxes that a rule finds; None if the rule does not fit."""
    if not all(np.isfinite(o).all() for outputs in made for o in outputs):
        return None
    single = [[o[:1] if wanted.batch > 1 else o for o in outputs] for outputs in made]
    try:
        rows = [boxes_of(decode, outputs, Size(wanted.height, wanted.width), 0) for outputs in single]
    except Unfit:
        return None
    best = [float((r[:, 4:5] * r[:, 5:]).max(initial=0)) for r in rows]
    return Response(max(best), min(best), None, True)


def response(made: Sequence[Sequence[Any]], distinct: bool) -> Response:
    """Return the response from every image's outputs.

    distinct: whether there are several images, all different.
    """
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
    """Return the best score of every image (first dimension), if an output looks like boxes with scores or like class
    scores.

    Recognised are YOLOv5's rows, YOLOv8's columns, rows of corners, score and class, FastestDet's map, and maps of
    values in 0..1.
    """
    if values.size == 0 or values.ndim < 3:
        return None
    rows = values.reshape(len(values), -1, values.shape[-1])
    if values.ndim == 4 and 5 <= values.shape[2] < values.shape[3]:
        turned = values[:, 0].transpose(0, 2, 1)
        if _is_probability(turned[..., 4:]) and turned[..., :4].max() > 2:
            return np.asarray(turned[..., 4:].max((1, 2)))
    if values.ndim == 5 and values.shape[2] >= 6:
        objectness, classes = values[:, :, :1], values[:, :, 5:]
        if _is_probability(objectness) and _is_probability(classes) and not _is_probability(values[:, :, 1:5]):
            return np.asarray((objectness * classes).max((1, 2, 3, 4)))
    if rows.shape[-1] == 6 and _is_probability(rows[..., 4]) and _are_classes(rows[..., 5]):
        return np.asarray(rows[..., 4].max(1))
    if rows.shape[-1] >= 6 and _is_probability(rows[..., 4:]) and not _is_probability(rows[..., :4]):
        return np.asarray((rows[..., 4:5] * rows[..., 5:]).max((1, 2)))
    sums = rows.sum(-1)
    if rows.shape[1] > 1 and rows.shape[-1] >= 2 and _is_probability(rows) and not np.allclose(sums, 1, atol=1e-3):
        return np.asarray(rows.max((1, 2)))
    return None


def _are_classes(values: Array) -> bool:
    """Return whether all values are whole numbers, some of them above 1."""
    return bool((values == np.rint(values)).all() and values.min() >= 0 and values.max() > 1)


def _is_probability(values: Array) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)
