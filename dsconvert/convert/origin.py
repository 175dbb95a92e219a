"""What a model says it was made from: files that are opened only where its owner would look for them.

A model file may come from a stranger, and name any path of this machine. Without being asked, dsconvert opens such a
path only below the model's own folder or the working directory, links followed, and the same holds for each image that
a list or a data.yaml there names. A checkpoint elsewhere is opened where it has the digest that the model names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsconvert.base.errors import InputError, printable
from dsconvert.base.text import Sentence
from dsconvert.photos.dataset import SPLITS, image_paths, is_data_yaml, read_data_yaml

MOST_HASHED = 4 << 30  # bytes: no checkpoint is as large


def is_near(path: Path, model: Path) -> bool:
    """Whether it lies below the folder of the model file, or below the working directory."""
    try:
        found = path.resolve()
        return any(found.is_relative_to(place) for place in (model.parent.resolve(), Path.cwd().resolve()))
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
        return False


def known_images(provenance: Mapping[str, Any], model: Path) -> Path:
    """The images that the model was calibrated on, as they were given. Raises InputError, asking for others, when none
    are known, or they are not to be opened."""
    options = provenance.get("options")
    calib = options.get("calib") if isinstance(options, Mapping) else None
    if not isinstance(calib, str) or not calib:
        raise InputError.naming("Which images? Give {data} data.yaml, or a folder of images to measure agreement.")
    path = Path(calib)
    if not is_near(path, model):
        raise _refused(model, "its images", calib, Sentence("give {data}"))
    if not all(is_near(image, model) for image in _every_image(path)):
        raise InputError.naming(
            "{}, which {} names, lists images elsewhere; give {data} to use it.", printable(calib), model
        )
    return path


def known_source(provenance: Mapping[str, Any], model: Path, ask: str) -> Path:
    """The checkpoint that the model was made from. Raises InputError, which ends in what it asks for, when it is not
    known, gone, or not to be opened."""
    source = provenance.get("source")
    if not isinstance(source, str):
        raise InputError.naming("The checkpoint that {} was converted from is not known; {}.", model, ask)
    if not is_near(Path(source), model) and not _is_the_one(Path(source), provenance.get("source_sha256")):
        raise _refused(model, "the checkpoint that it was converted from", source, ask)
    if not os.path.isfile(source):  # which takes what is no name for a file that is not there
        raise InputError.naming(
            "The checkpoint that {} was converted from is not at {} any more; {}.", model, printable(source), ask
        )
    return Path(source)


def _is_the_one(path: Path, digest: object) -> bool:
    """Whether it is an ordinary file with the very content that the model names: who knows that learns nothing from
    its being opened. So a checkpoint of one's own may lie anywhere."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_HASHED:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest
    except (OSError, ValueError):
        return False


def _refused(model: Path, what: str, path: str, ask: str) -> InputError:
    return InputError.naming(
        "{} names {} at {}, neither below its own folder nor below the working directory, so it was not opened; {}.",
        model, what, printable(path, 200), ask,
    )  # fmt: skip


def _every_image(source: Path) -> list[Path]:
    if not is_data_yaml(source):
        return image_paths(source)
    data, found = read_data_yaml(source), list[Path]()
    for split in SPLITS:
        with suppress(InputError):  # a split that is not there has nothing to open
            found += data.images(split)
    return found
