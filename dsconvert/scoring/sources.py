"""Find what `detect` looks at, from what the user named: images, videos and live sources."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dsconvert.base.errors import InputError
from dsconvert.photos.dataset import MOST_FILES, SUFFIXES, evaluation_images, files_below, image_paths, is_data_yaml

VIDEO_SUFFIXES = frozenset(
    {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
PROTOCOLS = ("rtsp", "rtsps", "rtmp", "http", "https")
MAX_CAMERA = 999


@dataclass(frozen=True)
class Sources:
    """Images, then videos, in order and without repetition; or one live source, a webcam's number or a stream's
    address.
    """

    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    live: str | None = None


def find_sources(given: Iterable[str]) -> Sources:
    """Find the sources that the user named.

    Each of `given` is an image, a video, a folder of both, a pattern such as `photos/*.jpg` or a text file of paths. It
    can also be a data.yaml (its images for evaluation), a webcam's number, or a stream's address. An existing file or
    folder takes precedence.

    Raises InputError for anything else, and for a live source beside others, as it may never end.
    """
    files: dict[str, Path] = {}
    live: list[str] = []
    for text in given:
        if is_live(text):
            live.append(text)
        else:
            files |= {os.path.abspath(path): path for path in _files(text)}
    if live and (len(live) > 1 or files):
        raise InputError(f"{live[0]} is live and may never end; look at it alone.")
    videos = tuple(p for p in files.values() if is_video(p))
    return Sources(tuple(p for p in files.values() if not is_video(p)), videos, live[0] if live else None)


def is_video(path: Path) -> bool:
    """Return whether a path has a video's suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_live(text: str) -> bool:
    """Return whether a text is a webcam's number or a stream's address. Raises InputError for any other address."""
    if "://" in text and not os.path.lexists(text):
        if text.partition("://")[0].lower() not in PROTOCOLS:
            raise InputError(f"{text} is not a stream that can be read; addresses start with {', '.join(PROTOCOLS)}.")
        return True
    if not text.isdecimal() or os.path.lexists(text):
        return False
    if len(text) > len(str(MAX_CAMERA)):
        raise InputError(f"{text} is neither a file nor the number of a webcam, 0 to {MAX_CAMERA}.")
    return True


def _files(text: str) -> list[Path]:
    path = Path(text)
    try:
        if path.is_dir():
            return _of_folder(path)
        if is_video(path) and path.is_file():
            return [path]
        if glob.has_magic(text) and not os.path.lexists(text):
            return _matching(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{text} cannot be read: {getattr(error, 'strerror', error)}.") from None
    return evaluation_images(path) if is_data_yaml(path) else image_paths(path)


def _of_folder(folder: Path) -> list[Path]:
    found = sorted(path for path in files_below(folder, SUFFIXES | VIDEO_SUFFIXES) if path.is_file())
    return found or image_paths(folder)  # raises the error for an empty folder


def _matching(pattern: str) -> list[Path]:
    found = []
    for seen, name in enumerate(glob.iglob(pattern, recursive=True), 1):
        if seen > MOST_FILES:
            raise InputError(f"{pattern} matches more than {MOST_FILES} files, which are not looked through.")
        path = Path(name)
        if path.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES and path.is_file():
            found.append(path)
    if not found:
        raise InputError(f"{pattern} matches no image and no video ({', '.join(sorted(SUFFIXES | VIDEO_SUFFIXES))}).")
    return sorted(found)
