"""The Python API's `detect` and `compare`, for photographs without labels.

    found = dsconvert.detect("small/best.onnx", "photos/")
    for photo in found:
        print(photo.path, [(o.name, o.score) for o in photo.objects])
    dsconvert.compare("best.pt", "small/best.onnx", "photos/")

Models are values or files, as in `dsconvert.evaluate`. The commands of the same names run the same functions
(`scoring.photos`).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsconvert.api.checked import check_split
from dsconvert.api.models import File, FloatModel, QuantizedModel, as_file
from dsconvert.base.errors import InputError
from dsconvert.base.size import SizeLike
from dsconvert.onnxfile.presets import perhaps_named
from dsconvert.photos.images import Image, read_image
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.detect import DetectOptions, Found, class_name, class_numbers, draw
from dsconvert.scoring.masks import PlacedMask
from dsconvert.scoring.photos import Skipped, compare_files, detect_files, left_out, photo_paths

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DetectedObject:
    """One object: its class, its score in 0..1, and the corners of its box in pixels of the photograph."""

    name: str
    class_number: int
    score: float
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class DetectedPhoto:
    """A photograph and the objects in it, by falling score. `pandas.DataFrame(photo.objects)` works.

    masks: of a segmentation model's objects (`inside`, bool, starting at pixel `left`, `top`); else None.
    """

    path: Path
    width: int
    height: int
    objects: tuple[DetectedObject, ...] = field(repr=False)
    boxes: Found = field(repr=False, compare=False)
    names: tuple[str, ...] = field(repr=False)
    masks: tuple[PlacedMask, ...] | None = field(default=None, repr=False, compare=False)

    def draw(self, *, line_thickness: int = 3, labels: bool = True, scores: bool = True) -> Image:
        """Return the photograph with its boxes, RGB uint8 (height, width, 3); the file is read again."""
        return draw(read_image(self.path), self.boxes, self.names, line_thickness, labels, scores, self.masks)


class Detections(tuple[DetectedPhoto, ...]):
    """Photographs in the order in which they were read; it prints as a line for each."""

    __slots__ = ()

    def __repr__(self) -> str:
        lines = []
        for photo in self:
            kinds: dict[str, int] = {}
            for found in photo.objects:
                kinds[found.name] = kinds.get(found.name, 0) + 1
            lines.append(f"{photo.path}: {', '.join(f'{n} {name}' for name, n in kinds.items()) or 'nothing'}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ComparedPhoto:
    """How many objects in a photograph both models find, only the first, and only the second."""

    path: Path
    matched: int
    only_first: int
    only_second: int


@dataclass(frozen=True)
class Comparison:
    """How far two models find the same objects.

    Two boxes match if they have the same class and an IoU of at least 0.5.

    matched, only_first, only_second: numbers of objects.
    agreement: share of all objects that match.
    mean_iou: of matching boxes.
    mean_confidence_shift, largest_confidence_shift: the second model's score minus the first's.
    map50_95: the second model measured against the first's objects.
    mean_best_score_first, mean_best_score_second: mean over photographs of the best score.
    confident_boxes_first, confident_boxes_second: boxes that score above 0.25.
    photos: one entry for each.

    A figure is None if it cannot be computed, because nothing matches or the first model finds nothing.
    """

    matched: int
    only_first: int
    only_second: int
    agreement: float
    mean_iou: float | None
    mean_confidence_shift: float | None
    largest_confidence_shift: float | None
    map50_95: float | None
    mean_best_score_first: float
    mean_best_score_second: float
    confident_boxes_first: int
    confident_boxes_second: int
    photos: tuple[ComparedPhoto, ...] = field(repr=False)


def detect(
    model: FloatModel | QuantizedModel | File,
    images: File | Sequence[File],
    *,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    max_det: int = 1000,
    classes: Sequence[int | str] | None = None,
    agnostic_nms: bool = False,
    imgsz: SizeLike | None = None,
    input: str | None = None,
    progress: Progress | None = None,
) -> Detections:
    """Find the objects in photographs, with the defaults of YOLOv5's detect.py.

    model: a value or a file.
    images: a photograph, a folder, a text file of paths, or several of these.
    conf_thres: least score.
    iou_thres: largest overlap with a better object of the same class.
    max_det: most objects in a photograph.
    classes: only these, by number or name; None: all.
    agnostic_nms: whether objects of different classes suppress each other too.
    imgsz: pixels of the model's input, a square's side or (height, width); None: what the model was made for.
    input: the family of an ONNX file, such as "yolox", or "FILE.yaml:NAME"; None: YOLOv5's input, and outputs
        recognised by their shapes.
    progress: called as progress(stage, done, total).

    Photographs that cannot be read are left out with a warning. Raises InputError when none can be read.
    """
    given = [images] if isinstance(images, (str, Path)) else list(images)
    paths = photo_paths(map(Path, given))
    if not paths:
        raise InputError("There are no images to look at.")
    DetectOptions(conf_thres, iou_thres, max_det)  # checked before anything is loaded
    skipped: list[Skipped] = []
    with tempfile.TemporaryDirectory() as folder:
        candidate = load_candidate(as_file(model, Path(folder)), imgsz, preset=perhaps_named(input)).named
        wanted = class_numbers([str(c) for c in classes or ()], candidate.names)
        options = DetectOptions(conf_thres, iou_thres, max_det, wanted, agnostic_nms)
        if candidate.limits and (kept := options.beyond(candidate.limits)):
            _warn(f"{candidate.path} suppresses boxes itself, and keeps only boxes within {kept}.")
        found = detect_files(candidate, paths, options, skipped, progress or _silent)
        photos = Detections([_photo(path, image, boxes, candidate.names, masks) for path, image, boxes, masks in found])
    if skipped:
        _warn(left_out(skipped))
    return photos


def compare(
    first: FloatModel | QuantizedModel | File,
    second: FloatModel | QuantizedModel | File,
    images: File,
    *,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    imgsz: SizeLike | None = None,
    samples: int | None = None,
    split: str | None = None,
    strict: bool = False,
    input: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure how far two models find the same objects in photographs without labels.

    first, second: values or files.
    images: a photograph, a folder, a text file of paths or a data.yaml; labels are not read.
    conf_thres: least score of an object.
    iou_thres: largest overlap with a better object of the same class.
    imgsz: pixels of the models' input, a square's side or (height, width); None: what they were made for.
    samples: most images used.
    split: of a data.yaml; None: val, else test or train.
    strict: refuse a list that names missing files, instead of a warning.
    input: the family of ONNX files, as in `detect`.
    progress: called as progress(stage, done, total).

    Raises InputError when neither model finds anything.
    """
    if samples is not None and samples < 1:
        raise InputError("samples must be at least 1.")
    check_split(split)
    options = DetectOptions(conf_thres, iou_thres)
    with tempfile.TemporaryDirectory() as folder:
        a_file, b_file = (as_file(m, Path(folder, str(i))) for i, m in enumerate((first, second)))
        found = compare_files(
            a_file,
            b_file,
            Path(images),
            options,
            imgsz,
            samples,
            progress or _silent,
            split,
            strict,
            perhaps_named(input),
        )
    if found.names_differ:
        _warn("The models name their classes differently; class numbers are compared.")
    if found.skipped:
        _warn(left_out(found.skipped))
    if found.agreement is None:
        raise InputError.naming(
            "{} gives no boxes that can be read; give {input} if it belongs to a known family.", found.first.path
        )
    a, s = found.agreement, found.agreement.scores
    if shifted := s.warning(str(found.first.path), str(found.second.path)):
        _warn(shifted[0].upper() + shifted[1:])
    photos = tuple(
        ComparedPhoto(p, i.matched, i.only_first, i.only_second) for p, i in zip(found.read, a.images, strict=True)
    )
    return Comparison(
        a.matched, a.only_first, a.only_second, a.share, a.mean_iou, a.mean_shift, a.largest_shift, a.map50_95,
        s.first_best, s.second_best, s.first_boxes, s.second_boxes, photos,
    )  # fmt: skip


def _photo(
    path: Path, image: Image, boxes: Found, names: tuple[str, ...], masks: tuple[PlacedMask, ...] | None
) -> DetectedPhoto:
    objects = tuple(
        DetectedObject(class_name(int(number), names), int(number), score, *corners)
        for *corners, score, number in boxes.tolist()
    )
    return DetectedPhoto(path, image.shape[1], image.shape[0], objects, boxes, names, masks)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)  # points at the caller of `detect` or `compare`


def _silent(stage: str, done: int, total: int) -> None:
    """Ignore progress."""
