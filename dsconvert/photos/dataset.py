"""Find the images of a folder, a text file of paths, or a split of a data.yaml. docs/datasets.md has the rules.

Whatever is left out or replaced is reported with `dsconvert.base.notes`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.base.errors import InputError, printable, shown
from dsconvert.base.notes import note
from dsconvert.base.smallyaml import load_plain
from dsconvert.base.textfile import NotText, read_lines, read_text

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SPLITS = ("train", "val", "test")
ALSO_VAL = ("validation", "valid")  # names that some data.yaml files use for val
# the largest files that are read: a list of two million images, a data.yaml of ten thousand classes
MAX_LIST_BYTES, MAX_LIST_LINES, MAX_LIST_LINE = 256 << 20, 2_000_000, 32_768
MOST_GONE = 100_000  # missing files in a list; each is looked for in several places
MAX_YAML_BYTES = 1 << 20
MOST_FILES = 3_000_000  # in a folder, images or not
MOST_CLASSES = 10_000
MAX_NAME = 200


@dataclass(frozen=True)
class DataYaml:
    """A data.yaml.

    names: of the classes; `named` is False if they are only counted.
    splits: what the file says about each split, as written.
    root: its `path`.
    key_points: its `kpt_shape`: key points of an object, and numbers of each.
    """

    path: Path
    names: tuple[str, ...]
    named: bool
    splits: Mapping[str, tuple[str, ...]]
    root: str
    key_points: tuple[int, int] | None = None

    def images(self, split: str, strict: bool = False) -> list[Path]:
        """Return the split's images in its order; none if it is not named.

        strict: whether a list that names missing files is refused.

        Raises InputError when something is missing, with every place that was looked at.
        """
        found: list[Path] = []
        for entry in self.splits.get(split, ()):
            where = self._found(entry, split)
            found += _image_paths(where, strict, [Path(), *self._roots()])
        return found

    @property
    def train(self) -> tuple[Path, ...]:
        """The images of train."""
        return tuple(self.images("train"))

    @property
    def val(self) -> tuple[Path, ...]:
        """The images of val."""
        return tuple(self.images("val"))

    def _roots(self) -> list[Path]:
        """Return the folders where relative paths may start (see docs/datasets.md).

        These are the file's folder, the working folder, and the folder above the file's, as YOLOv5's own files lie in
        its `data`. With a relative `path` these also include the `datasets` folders of ultralytics.
        """
        folder = self.path.parent
        starts = [folder, Path(), folder / ".."]
        if self.root and not os.path.isabs(self.root):
            starts += [Path("datasets"), Path("../datasets")]
        return [start / form for start in starts for form in _spellings(self.root or ".")]

    def _found(self, entry: str, split: str) -> Path:
        forms = [s for form in _spellings(entry) for s in (form, form.removeprefix("../"))]
        looked = [root / form for root in self._roots() for form in forms]
        for place in looked:
            if os.path.exists(place):
                return place
        raise InputError(
            f"There is no file or folder at {entry}, which {self.path} names as {split}; looked at {_listed(looked)}."
        )


@dataclass(frozen=True)
class Images:
    """The requested images, with the data.yaml and split that they come from, if any."""

    paths: list[Path]
    described: DataYaml | None = None
    split: str | None = None


def image_paths(source: Path, strict: bool = False) -> list[Path]:
    """Return the images of a folder (recursive, sorted, links followed), of a text file of paths, or the image itself.

    Missing files of a list are left out with a warning, or refused if `strict`. Raises InputError when there are none.
    """
    return _image_paths(source, strict, [Path()])


def calibration_images(source: Path, split: str | None = None, strict: bool = False) -> list[Path]:
    """Return the images to calibrate on, of a folder, a text file or a data.yaml (`split`; None: train, else val)."""
    return images_of(source, ("train", "val", "test"), split, strict).paths


def evaluation_images(source: Path, split: str | None = None, strict: bool = False) -> list[Path]:
    """Return the images to measure on, of a folder, a text file or a data.yaml (`split`; None: val, else test or
    train).
    """
    return images_of(source, ("val", "test", "train"), split, strict).paths


def images_of(source: Path, order: tuple[str, ...], split: str | None = None, strict: bool = False) -> Images:
    """Return the images of `source`, each once.

    order: the splits of a data.yaml to take, the first that it names, if `split` is None.

    A warning is given when the first of these is missing, or the same images are named for two purposes. Raises
    InputError when there are no images.
    """
    if not is_data_yaml(source):
        if split is not None:
            raise InputError(f"{source} is not a data.yaml, so it has no splits such as {split}.")
        return Images(_once(source, image_paths(source, strict)))
    data = read_data_yaml(source)
    if split is not None and not data.splits.get(split):
        raise InputError(f"{source} names no {split} images.")
    used = split or next((s for s in order if data.splits.get(s)), None)
    if used is None:
        raise InputError(f"{source} names neither {' nor '.join(order)} images.")
    if split is None:
        _say_fall_back(data, order[0], used)
    found = _once(source, data.images(used, strict))
    if not found:
        raise InputError(f"{source} names no {used} images.")
    return Images(found, data, used)


def is_data_yaml(source: Path) -> bool:
    """Return whether a source has a data.yaml's suffix."""
    return source.suffix.lower() in (".yaml", ".yml")


def _say_fall_back(data: DataYaml, wanted: str, used: str) -> None:
    if used != wanted and wanted == "val":
        learned = ", which the model was trained on, so figures come out too good" if used == "train" else ""
        note(f"{data.path} names no val images; measured on its {used} images{learned}.")
    elif used != wanted:
        note(
            f"{data.path} names no {wanted} images; its {used} images are used, so measure on others: "
            f"figures on {used} come out too good."
        )
    elif set(data.splits.get("train", ())) & set(data.splits.get("val", ())):
        note(f"{data.path} names the same images as train and as val, so figures on val come out too good.")


def _once(source: Path, found: list[Path]) -> list[Path]:
    """Return each image once, with a warning about repeated ones."""
    kept = list({os.path.normpath(path): path for path in found}.values())
    if len(kept) < len(found):
        note(f"{source} names {len(found) - len(kept)} images more than once; each counts once.")
    return kept


# --- data.yaml ---------------------------------------------------------------------------------------------------


def read_data_yaml(path: Path) -> DataYaml:
    """Read a YOLOv5 data.yaml, without looking at its images. Raises InputError when it is not usable."""
    if not os.path.exists(path):
        raise InputError(f"There is no data file at {path}.")
    try:
        data = load_plain(read_text(path, MAX_YAML_BYTES))
    except NotText as error:
        raise InputError(f"{path} is not a readable YAML file: it {error}.") from None
    except Exception:  # the loader raises many kinds, for endless nesting and all kinds of tags
        raise InputError(f"{path} is not a readable YAML file.") from None
    if not isinstance(data, dict) or not ("names" in data or "nc" in data):
        raise InputError(f"{path} is not a YOLOv5 data.yaml: it has no names.")
    names = _names(data, path)
    splits = {split: _entries(data.get(split), path) for split in SPLITS}
    for name in ALSO_VAL:
        splits["val"] = splits["val"] or _entries(data.get(name), path)
    return DataYaml(path, names, "names" in data, splits, _text(data.get("path") or "", path), _key_points(data, path))


def _names(data: dict[str, Any], path: Path) -> tuple[str, ...]:
    nc = data.get("nc")
    count = int(nc) if isinstance(nc, str) and re.fullmatch(r"[0-9]{1,6}", nc) else None
    if "names" not in data:
        if count is None or not 0 < count <= MOST_CLASSES:
            raise InputError(f"{path} is not a YOLOv5 data.yaml: it has no names, and nc is {shown(nc)}.")
        return tuple(f"class{i}" for i in range(count))
    names = data["names"]
    if isinstance(names, dict):
        by_number = {str(key): name for key, name in names.items()}
        if not all(str(i) in by_number for i in range(len(names))):
            raise InputError(f"The class numbers in {path} are not 0, 1, 2, and so on.")
        names = [by_number[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(f"The names in {path} are not a list or a mapping.")
    if nc is not None and count != len(names):
        raise InputError(f"{path} says nc {shown(nc) if count is None else count} but names {len(names)} classes.")
    return tuple(printable(_text(name, path), MAX_NAME) for name in names)


def _text(value: Any, path: Path) -> str:
    """Return a name or a path. A list is refused: with aliases, a few lines can stand for endless text."""
    if value is None or isinstance(value, str):
        return str(value)
    raise InputError(f"{path} has {shown(value)} where a name or a path belongs.")


def _entries(entry: Any, path: Path) -> tuple[str, ...]:
    entries = entry if isinstance(entry, list) else [entry]
    return tuple(_text(e, path).strip() for e in entries if e is not None and e != "")


def _key_points(data: dict[str, Any], path: Path) -> tuple[int, int] | None:
    shape = data.get("kpt_shape")
    if shape is None:
        return None
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(v, str) and v.strip().isdecimal() for v in shape):
        count, each = int(shape[0][:6]), int(shape[1][:6])
        if 0 < count <= 1000 and each in (2, 3):
            return count, each
    raise InputError(f"The kpt_shape in {path} is not two numbers such as [17, 3]: key points, and 2 or 3 for each.")


# --- paths -------------------------------------------------------------------------------------------------------


def _image_paths(source: Path, strict: bool, starts: Sequence[Path]) -> list[Path]:
    """Find images as `image_paths` does; relative paths of a list start at its folder, or else at one of `starts`."""
    if os.path.isdir(source):
        found = sorted(p for p in files_below(source, SUFFIXES) if os.path.isfile(p))
        if not found:
            raise InputError(f"The folder {source} holds no images ({', '.join(sorted(SUFFIXES))}).")
        return found
    if not os.path.exists(source):
        raise InputError(f"There is no file or folder at {source}.")
    if source.suffix.lower() in SUFFIXES and os.path.isfile(source):
        return [source]
    try:
        return _from_list(source, strict, [source.parent, *starts])
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}.") from None
    except NotText as error:
        what = f"{source} is neither a folder, an image, a data.yaml nor a text file of paths"
        raise InputError(f"{what}: it {error}.") from None


def _from_list(source: Path, strict: bool, starts: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    gone, first_gone, last = 0, "", ""
    for line in read_lines(source, MAX_LIST_BYTES, MAX_LIST_LINES, MAX_LIST_LINE):
        if not (written := line.strip()):
            continue
        if written == last and found:
            found.append(found[-1])
            continue
        places = (os.path.join(start, form) for form in _spellings(written) for start in starts)
        place = next((p for p in places if os.path.isfile(p)), None)
        if place is not None:
            found.append(Path(place))
            last = written
        else:
            gone, first_gone = gone + 1, first_gone or written
        if gone > MOST_GONE:
            raise InputError(f"{source} lists more than {MOST_GONE} files that are not there, the first {first_gone}.")
    if not found and not gone:
        raise InputError(f"{source} lists no images.")
    if gone:
        looked = _listed(start / form for start in starts for form in _spellings(first_gone))
        if strict or not found:
            raise InputError(
                f"{source} lists {gone} files that are not there, the first {first_gone}; looked at {looked}."
            )
        note(f"{gone} of {gone + len(found)} files that {source} lists are not there and are left out; the first, "
             f"{first_gone}, was looked for at {looked}.")  # fmt: skip
    return found


def files_below(top: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Yield the files with one of `suffixes` in a folder and its subfolders, also behind links to folders.

    Each real folder is entered once, so links in circles end. As in YOLOv5, names that begin with a dot are skipped.
    Raises InputError for a folder with so many files that it is a whole disk, as a data.yaml may name any folder.
    """
    seen = 0
    entered: set[tuple[int, int] | None] = set()
    closed: list[str] = []
    waiting = [str(top)]
    while waiting:  # real folders come first: of an image's two names, the one without a link is kept
        links: list[str] = []
        for start in waiting:
            if _identity(start) in entered:
                continue
            for folder, below, names in os.walk(start, onerror=lambda error: closed.append(str(error.filename))):
                seen += len(names)
                if seen > MOST_FILES:
                    raise InputError(
                        f"The folder {top} holds more than {MOST_FILES} files, which are not looked through."
                    )
                if (where := _identity(folder)) in entered:
                    below.clear()
                    continue
                entered.add(where)
                below[:] = sorted(name for name in below if not name.startswith("."))
                links += [p for name in below if os.path.islink(p := os.path.join(folder, name))]
                for name in names:
                    if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("."):
                        yield Path(folder, name)
        waiting = links
    if closed:
        note(f"{len(closed)} folders could not be entered and are left out; the first: {closed[0]}.")


def _identity(folder: str) -> tuple[int, int] | None:
    """Return what identifies a folder under any name; None if it is gone."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _spellings(written: str) -> list[str]:
    """Return a path as written and, if it has backslashes, as Windows reads it."""
    return [written, written.replace("\\", "/")] if "\\" in written else [written]


def _listed(places: Iterable[Path]) -> str:
    """Return different places, in order, as a sentence names them."""
    made = list(dict.fromkeys(os.path.abspath(str(place).replace("\0", "?")) for place in places))
    return made[0] if len(made) == 1 else f"{', '.join(made[:-1])} and {made[-1]}"
