"""Images, labels and data.yaml files as YOLOv5 users have them, and the letterbox that squares an image."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.errors import InputError, printable, shown

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
PAD_VALUE = 114  # YOLOv5's grey
# The largest text files read: a list of a million images, a data.yaml of ten thousand classes, labels of one image.
MAX_LIST_BYTES, MAX_YAML_BYTES, MAX_LABEL_BYTES = 256 << 20, 1 << 20, 16 << 20
MAX_IMAGE_BYTES = 1 << 30
MOST_FILES = 3_000_000  # in a folder, images or not
MAX_NAME = 200
OUTSIDE = 0.01  # how far, as a share of the image, a label may reach beyond it by rounding

Image = NDArray[np.uint8]
Labels = NDArray[np.float64]


@dataclass(frozen=True)
class DataYaml:
    """A data.yaml: class names, and image files of the training and validation splits (empty when not given)."""

    names: tuple[str, ...]
    train: tuple[Path, ...]
    val: tuple[Path, ...]


@dataclass(frozen=True)
class Letterbox:
    """How an image was placed in its square: pixels * gain + pad."""

    gain: float
    pad_x: float
    pad_y: float


def image_paths(source: Path) -> list[Path]:
    """Images of a folder (recursive, sorted), of a text file of paths, or the one image given.

    Relative paths in a text file start at the file's folder. Raises InputError when nothing is there.
    """
    try:
        return _image_paths(source)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise InputError(f"{source} cannot be read: {error.strerror}.") from None


def _image_paths(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(p for p in _named_as_images(source) if p.is_file())
        if not found:
            raise InputError(f"The folder {source} holds no images ({', '.join(sorted(SUFFIXES))}).")
        return found
    if not source.exists():
        raise InputError(f"There is no file or folder at {source}.")
    if source.suffix.lower() in SUFFIXES and source.is_file():
        return [source]
    try:
        lines = [line.strip() for line in _read_text(source, MAX_LIST_BYTES).splitlines()]
    except (OSError, ValueError):
        raise InputError(f"{source} is neither a folder, an image, a data.yaml nor a text file of paths.") from None
    found = [source.parent / line for line in lines if line]
    if not found:
        raise InputError(f"{source} lists no images.")
    if missing := [p for p in found if not p.is_file()]:
        raise InputError(f"{source} lists {len(missing)} files that are not there, the first {missing[0]}.")
    return found


def _named_as_images(folder: Path) -> Iterator[Path]:
    """What is called an image in a folder and its subfolders, but not behind links to folders. Raises InputError for a
    folder of so many files that it is a disk: a data.yaml may name any."""
    seen = 0
    for top, _, names in os.walk(folder):  # several times as fast as Path.rglob
        seen += len(names)
        if seen > MOST_FILES:
            raise InputError(f"The folder {folder} holds more than {MOST_FILES} files, which are not looked through.")
        yield from (Path(top, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES)


def _read_text(path: Path, most: int) -> str:
    """A whole UTF-8 file. Raises OSError, or ValueError when it is too large, no text, or no ordinary file."""
    if path.exists() and not path.is_file():  # a device or a pipe may never end
        raise ValueError("not a file")
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError("too large")
    return data.decode("utf-8")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without merge keys (<<), which are copied out at once: 30 lines of them fill any memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `<<` where it is; the constructor then refuses it."""


def read_data_yaml(path: Path) -> DataYaml:
    """Read a YOLOv5 data.yaml; `path` inside it is relative to the file. Raises InputError when it is unusable."""
    try:
        data = yaml.load(_read_text(path, MAX_YAML_BYTES), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"There is no data file at {path}.") from None
    except Exception:  # impossible dates, endless nesting, wrong values under a tag: the loader raises many kinds
        raise InputError(f"{path} is not a readable YAML file.") from None
    if not isinstance(data, dict) or "names" not in data:
        raise InputError(f"{path} is not a YOLOv5 data.yaml: it has no names.")
    root = path.parent / _text(data.get("path") or ".", path)
    return DataYaml(_names(data, path), _split(data.get("train"), root, path), _split(data.get("val"), root, path))


def _names(data: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = data["names"]
    if isinstance(names, dict):
        if not all(i in names for i in range(len(names))):
            raise InputError(f"The class numbers in {path} are not 0, 1, 2, and so on.")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(f"The names in {path} are not a list or a mapping.")
    if "nc" in data and data["nc"] != len(names):
        raise InputError(f"{path} says nc {shown(data['nc'])} but names {len(names)} classes.")
    return tuple(printable(_text(name, path), MAX_NAME) for name in names)


def _text(value: Any, path: Path) -> str:
    """A name or a path. A list is none: by aliases a few lines can stand for a text without end."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, float, datetime.date)):
        return str(value)
    if isinstance(value, int) and abs(value) < 1 << 64:
        return str(value)
    raise InputError(f"{path} has {shown(value)} where a name or a path belongs.")


def _split(entry: Any, root: Path, path: Path) -> tuple[Path, ...]:
    entries = entry if isinstance(entry, list) else [] if entry is None else [entry]
    return tuple(p for e in entries for p in image_paths(root / _text(e, path)))


def calibration_images(source: Path) -> list[Path]:
    """Images to calibrate on: of a folder, a text file, or a data.yaml (its train split, else val)."""
    return _images(source, ("train", "val"))


def evaluation_images(source: Path) -> list[Path]:
    """Images to measure on: of a folder, a text file, or a data.yaml (its val split, else train)."""
    return _images(source, ("val", "train"))


def _images(source: Path, splits: tuple[str, str]) -> list[Path]:
    if source.suffix.lower() not in (".yaml", ".yml"):
        return image_paths(source)
    data = read_data_yaml(source)
    found: tuple[Path, ...] = getattr(data, splits[0]) or getattr(data, splits[1])
    if not found:
        raise InputError(f"{source} names neither {splits[0]} nor {splits[1]} images.")
    return list(found)


def label_path(image: Path) -> Path:
    """YOLOv5's rule: the last `images` folder of the path becomes `labels`, the suffix .txt."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_labels(path: Path, nc: int) -> Labels:
    """(n, 5): class, centre x, centre y, width, height in 0..1; polygons become their boxes; no file, no objects.

    Raises InputError naming file and line where a row is malformed or its class is not 0..nc-1.
    """
    return as_boxes(label_rows(path, nc))


def as_boxes(rows: Sequence[list[float]]) -> Labels:
    """Labels as `label_rows` gives them, as `read_labels` does."""
    return np.array([_as_box(row) for row in rows]).reshape(-1, 5)


def _as_box(row: list[float]) -> list[float]:
    if len(row) <= 6 or not len(row) % 2:
        return row
    points = np.array(row[1:]).reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    return [row[0], *((low + high) / 2), *(high - low)]


def label_rows(path: Path, nc: int) -> list[list[float]]:
    """The labels as they stand: class, then centre x, centre y, width, height or a polygon's corners x, y, x, y, ...,
    in 0..1. Errors as `read_labels`."""
    if not path.is_file():
        return []
    try:
        lines = _read_text(path, MAX_LABEL_BYTES).splitlines()
    except (OSError, ValueError):
        raise InputError(f"{path} is not a readable label file.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = [float(v) for v in line.split()]
        except ValueError:
            row = []
        values = _as_box(row)
        if len(values) != 5 or not np.isfinite(values).all():
            raise InputError(f"{path}, line {number}: a label is a class and four numbers.")
        if values[0] != int(values[0]) or not 0 <= values[0] < nc:
            raise InputError(f"{path}, line {number}: class {values[0]:g} is not one of the model's {nc}.")
        if min(values[1:]) < -OUTSIDE or max(values[1:]) > 1 + OUTSIDE:
            raise InputError(f"{path}, line {number}: a label's numbers are shares of the image, from 0 to 1.")
        rows.append(row)
    return rows


def in_pixels(labels: Labels, h: int, w: int) -> NDArray[np.float64]:
    """class, cx, cy, w, h in 0..1 -> class, x1, y1, x2, y2 in pixels of an image of that height and width."""
    centre, half = labels[:, 1:3], labels[:, 3:5] / 2
    return np.concatenate((labels[:, :1], (centre - half) * (w, h), (centre + half) * (w, h)), 1)


def none_readable(reasons: Sequence[str], what: str = "images") -> InputError:
    """What to raise when no image could be read: why each could not."""
    return InputError(f"None of the {len(reasons)} {what} could be read; the first: {reasons[0]}")


def read_image(path: Path) -> Image:
    """RGB uint8 (h, w, 3), turned as its EXIF data say; the first picture of an animation. Raises InputError when it
    cannot be decoded, is cut short, or says it is larger than OpenCV is allowed to read (see `dsconvert.__init__`)."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise InputError(f"{path} is larger than any image dsconvert reads.")
        data = np.fromfile(path, np.uint8)
    except OSError:
        raise InputError(f"{path} cannot be read.") from None
    if _cut_short(data.tobytes()):
        raise InputError(f"{path} is a JPEG file that ends too early.")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (cv2.error, MemoryError):
        raise InputError(f"{path} is not an image that can be decoded, or too large.") from None
    if image is None:
        raise InputError(f"{path} is not an image that can be decoded.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, image).astype(np.uint8, copy=False)


def _cut_short(data: bytes) -> bool:
    """True for a JPEG without an end after its last scan: OpenCV would make up the rest. Neither marker can occur in a
    scan, and a thumbnail lies before it."""
    return data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def letterbox(image: Image, side: int) -> tuple[Image, Letterbox]:
    """Scale to fit a square of `side` pixels keeping the aspect ratio (bilinear), pad the rest with grey, centred."""
    gain = min(side / image.shape[0], side / image.shape[1])
    square, left, top = on_grey(scaled(image, gain), side, side)
    return square, Letterbox(gain, left, top)


def scaled(image: Image, gain: float) -> Image:
    """The image made larger by `gain` (bilinear), at least one pixel each way."""
    h, w = image.shape[:2]
    size = max(1, round(w * gain)), max(1, round(h * gain))
    if size == (w, h):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def on_grey(image: Image, height: int, width: int) -> tuple[Image, int, int]:
    """The image in the middle of a grey one of that size, which it must not exceed; its left and top there."""
    h, w = image.shape[:2]
    left, top = round((width - w) / 2 - 0.1), round((height - h) / 2 - 0.1)
    made = np.full((height, width, 3), PAD_VALUE, np.uint8)
    made[top : top + h, left : left + w] = image
    return made, left, top


def to_tensor(images: Sequence[Image]) -> Tensor:
    """Squares (side, side, 3) uint8 -> batch (n, 3, side, side) float32, 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the paths, evenly spaced over the whole list."""
    if count >= len(paths):
        return list(paths)
    return [paths[i * len(paths) // count] for i in range(count)]


def calibration_batches(paths: Sequence[Path], side: int, size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Letterboxed batches of up to `size` images and, with each, why files before it had to be skipped, one sentence
    each."""
    squares: list[Image] = []
    skipped: list[str] = []
    for path in paths:
        try:
            squares.append(letterbox(read_image(path), side)[0])
        except InputError as error:
            skipped.append(str(error))
        if len(squares) == size:
            yield to_tensor(squares), skipped
            squares, skipped = [], []
    if squares or skipped:
        yield (to_tensor(squares) if squares else torch.empty(0, 3, side, side)), skipped
