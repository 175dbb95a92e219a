"""Find the files that a model names as its origin, and open them only where its owner would look for them.

A model file may come from a stranger and name any path of this machine. Unless asked to, dsconvert opens such a path
only below the model's own folder or the working directory, links followed. The same holds for every image that a list
or a data.yaml there names. A checkpoint elsewhere is opened only if it has the digest that the model names.
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

MOST_HASHED = 4 << 30  # bytes: every checkpoint is smaller


def is_near(path: Path, model: Path) -> bool:
    """Return whether a path lies below the model file's folder or below the working directory."""
    try:
        found = path.resolve()
        return any(found.is_relative_to(place) for place in (model.parent.resolve(), Path.cwd().resolve()))
    except (OSError, ValueError, RuntimeError):  # too long a path, a NUL in it, or links in a circle
        return False


def known_images(provenance: Mapping[str, Any], model: Path) -> Path:
    """Return the path of the images that the model was calibrated on, as it was given.

    Raises InputError, asking for images, when the path is unknown or must not be opened.
    """
    options = provenance.get("options")
    calib = options.get("calib") if isinstance(options, Mapping) else None
    if not isinstance(calib, str) or not calib:
        raise InputError.naming("The model names no images; give {data} data.yaml, or a folder of images.")
    path = Path(calib)
    if not is_near(path, model):
        raise _refused(model, "its images", calib, Sentence("give {data}"))
    if not all(is_near(image, model) for image in _every_image(path)):
        raise InputError.naming(
            "{}, which {} names, lists images elsewhere; give {data} to use it.", printable(calib), model
        )
    return path


def known_source(provenance: Mapping[str, Any], model: Path, ask: str) -> Path:
    """Return the checkpoint that the model was made from.

    ask: what the user shall do; ends the error message.

    Raises InputError when the checkpoint is unknown, gone, or must not be opened.
    """
    source = provenance.get("source")
    if not isinstance(source, str):
        raise InputError.naming("The checkpoint that {} was converted from is not known; {}.", model, ask)
    if not is_near(Path(source), model) and not _is_the_one(Path(source), provenance.get("source_sha256")):
        raise _refused(model, "the checkpoint that it was converted from", source, ask)
    if not os.path.isfile(source):  # unlike Path.is_file, this accepts text that cannot be a file's name
        raise InputError.naming(
            "The checkpoint that {} was converted from is not at {} any more; {}.", model, printable(source), ask
        )
    return Path(source)


def _is_the_one(path: Path, digest: object) -> bool:
    """Return whether a path is an ordinary file with exactly the content that the model names.

    A person who knows this digest has the content already, so opening the file reveals nothing. So a user's own
    checkpoint may lie anywhere.
    """
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
