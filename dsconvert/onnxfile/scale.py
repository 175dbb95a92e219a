"""Whether a float file sees anything in the calibration images: an input on the wrong scale gives no error, only worse
weights. What tells is that nothing is found, that everything is, or that all images give the same."""

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
CONFIDENT = 0.25  # the least score that YOLOv5's detect.py shows
SATURATED = 0.999  # a best score that every image reaches
CONSTANT = 0.005  # of the spread of an output: six real detectors have 0.08 and more on their scale
RAW = InputForm(scale=1)
IMAGENET = presets()["imagenet"].form
# what can be given in the place of a scale, and how it reads
_OTHERS = ((PLAIN, "as 0..1"), (RAW, "as 0..255"), (IMAGENET, "with ImageNet's mean and deviation"))


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
    run: Callable[[Array], list[Any]], images: Sequence[Image], wanted: ImageInput, form: InputForm,
    decode: str | None = None,
) -> str | None:  # fmt: skip
    """A sentence where the file's outputs look empty, saturated or constant, with another scale on which they do not.

    `run` gives the outputs for a batch; it may raise anything. The images are placed as the form says. `decode` is the
    rule that makes boxes of the outputs (None: what they are is seen by their numbers)."""
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
    return Sentence(f"{begun}; check that the images are like those it was trained on{scale}.")


def _family(run: Callable[[Array], list[Any]], image: Image, wanted: ImageInput, form: InputForm) -> str | None:
    """A sentence where the outputs are those of a family that wants another input than YOLOv5's, which is given: scores
    alone do not tell, as they only fall."""
    if form != PLAIN:
        return None
    try:
        outputs = [
            np.asarray(o)[:1] if wanted.batch > 1 else o for o in run(as_input([image] * wanted.batch, wanted, form))
        ]
        names = families_like(outputs, Size(wanted.height, wanted.width))
    except Exception:  # as `_response`
        return None
    if not names or any(presets()[name].form == PLAIN for name in names):
        return None
    ways = " or ".join(f"{{input}} {name}" for name in names)
    return Sentence(
        f"Its outputs are like those of a family whose input is another than YOLOv5's: give {ways}, if it is one."
    )


def _way(given: InputForm, other: InputForm) -> str:
    """Options that lead from one form to another, and a name that leads there too."""
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
    """The same numbers but for a rounding in what was typed."""
    return (
        (a.scale, a.bgr, len(a.mean), len(a.std)) == (b.scale, b.bgr, len(b.mean), len(b.std))
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
    run: Callable[[Array], list[Any]], images: Sequence[Image], wanted: ImageInput, form: InputForm,
    decode: str | None,
) -> Response | None:  # fmt: skip
    try:
        made = [run(as_input([image] * wanted.batch, wanted, form)) for image in images]
        if decode is not None and (found := _of_boxes(made, wanted, decode)) is not None:
            return found
    except Exception:  # a file that cannot run is refused elsewhere, and a scale that does not fit it is no advice
        return None
    return response(made, len({image.tobytes() for image in images}) == len(images) > 1)


def _of_boxes(made: Sequence[Sequence[Array]], wanted: ImageInput, decode: str) -> Response | None:
    """From the boxes that a rule makes of every image's outputs; None where it does not fit them."""
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
    many places: YOLOv5's rows (x, y, w, h, objectness, classes), YOLOv8's columns, rows of an end-to-end file (corners,
    score, class), FastestDet's map (objectness, box, classes), or maps between 0 and 1."""
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
    """Whether all are whole numbers, and some of them more than 1."""
    return bool((values == np.rint(values)).all() and values.min() >= 0 and values.max() > 1)


def _is_probability(values: Array) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)
