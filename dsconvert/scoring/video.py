"""Read frames of videos, webcams and streams, and write videos of drawn frames, with OpenCV's FFmpeg."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError, Unusable
from dsconvert.base.files import written_whole
from dsconvert.onnxfile.bounds import Bounds
from dsconvert.photos.images import Image

FPS = 30.0  # frames a second if a source does not tell
MAX_FPS = 600.0
MAX_PIXELS = 1 << 27  # of a frame, as for an image (see `dsconvert.__init__`)
MISSING = 0.05  # share of the announced frames that may be missing; some files derive their number from the duration
# A playlist may pose as a video and name other files and addresses. So only containers of pictures are allowed.
FILE_ONLY = (
    "protocol_whitelist;file|format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,asf,gif,mpeg,mpegts,mpegvideo"
)
STREAM_ONLY = "protocol_whitelist;rtsp,rtsps,rtmp,rtp,rtcp,srtp,udp,tcp,tls,http,https,httpproxy,crypto"
OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"  # the only way to give OpenCV these options
SECONDS_TO_ANSWER = 10
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Clip:
    """An open video: frames a second, the number of frames that it announces (0: none), and the frames, RGB."""

    fps: float
    count: int
    frames: Iterator[Image]


@contextlib.contextmanager
def opened(source: Path | str, stride: int = 1) -> Iterator[Clip]:
    """Open a video file (Path), a webcam's number or a stream's address, and yield the last of every `stride` frames.

    Raises Unusable when it cannot be read, or its frames are larger than an image may be.
    """
    what = f"{source} " if isinstance(source, Path) else f"The {live_name(source)} "
    bounds = Bounds(what.strip(), 0)
    with _of_the_source():
        capture = bounds.first(lambda: capture_of(source))
    try:
        if not capture.isOpened():
            kind = "cannot be opened." if isinstance(source, str) else "is not a video that can be read."
            raise Unusable(what + kind)
        width, height = (capture.get(p) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if not 0 <= width * height <= MAX_PIXELS:
            raise Unusable(f"{what}has frames of {width:.0f}x{height:.0f} pixels, larger than any image read.")
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        yield Clip(
            (fps if 0 < fps <= MAX_FPS else FPS) / stride,
            int(count) // stride if isinstance(source, Path) and 0 < count < 1 << 31 else 0,
            _frames(capture, stride, bounds, int(3 * width * height)),
        )
    finally:
        capture.release()


def _frames(capture: cv2.VideoCapture, stride: int, bounds: Bounds, size: int) -> Iterator[Image]:
    def read() -> Image | None:
        for _ in range(stride):
            if not capture.grab():
                return None
        done, image = capture.retrieve()
        return as_rgb(image) if done else None

    def next_one() -> Image | None:
        with _of_the_source():
            return bounds.later(read, size)

    while (image := next_one()) is not None:
        yield image


def as_rgb(image: NDArray[Any]) -> Image:
    """Turn a frame from OpenCV, BGR or grey, into RGB."""
    code = cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB
    return cv2.cvtColor(image, code).astype(np.uint8, copy=False)


@contextlib.contextmanager
def _of_the_source() -> Iterator[None]:
    """Turn an exceeded bound into an error of this source alone."""
    try:
        yield
    except InputError as error:
        raise Unusable(str(error)) from None


def capture_of(source: Path | str) -> cv2.VideoCapture:
    """Return OpenCV's reader, which may have failed to open. For a file, nothing but that file is read."""
    if isinstance(source, str) and source.isdecimal():
        return cv2.VideoCapture(int(source))
    # FFmpeg takes an absolute path for a file, never for an address
    name = os.path.abspath(source) if isinstance(source, Path) else source
    if isinstance(source, Path) and not source.is_file():
        return cv2.VideoCapture()
    seconds = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 1000 * SECONDS_TO_ANSWER, cv2.CAP_PROP_READ_TIMEOUT_MSEC,
               1000 * SECONDS_TO_ANSWER]  # fmt: skip
    with _OPENING, _environment(OPTIONS, FILE_ONLY if isinstance(source, Path) else STREAM_ONLY):
        return cv2.VideoCapture(name, cv2.CAP_FFMPEG, [] if isinstance(source, Path) else seconds)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the block, unless the user has set it."""
    before = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def live_name(source: str) -> str:
    """Return `webcam 0`, or `stream` and its address without user name, password and query, which may be secret."""
    if source.isdecimal():
        return f"webcam {source}"
    parts = urlsplit(source)
    return f"stream {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def live_stem(source: str) -> str:
    """Return a name for its files: the webcam's number, or the stream's host and path."""
    named = source if source.isdecimal() else live_name(source).partition("://")[2]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", named).strip("._-")[:60] or "stream"


@contextlib.contextmanager
def film(path: Path, force: bool, fps: float) -> Iterator[Callable[[Image], None]]:
    """Yield a function that adds RGB frames to an MP4 file; the file is complete and in place at the end of the block.

    All frames get the size of the first. Raises InputError when OpenCV cannot write the file.
    """
    with written_whole(path, force, ".part.mp4") as temporary:
        made = _Film(temporary, path, fps)
        try:
            yield made.add
        finally:
            made.release()
        made.check()


class _Film:
    """A video that is being written, with MPEG-4 (mp4v), which OpenCV's FFmpeg has everywhere."""

    def __init__(self, path: Path, shown: Path, fps: float) -> None:
        # MPEG-4 counts time in fractions of at most 1/65535 s
        self.path, self.shown, self.fps = path, shown, round(fps, 3 if fps < 65 else 2)
        self.size, self.count = (0, 0), 0
        self.writer: cv2.VideoWriter | None = None

    def add(self, image: Image) -> None:
        """Add a frame."""
        if self.writer is None:
            # The codec takes even numbers of pixels, and no fewer than these.
            self.size = max(16, image.shape[1] // 2 * 2), max(16, image.shape[0] // 2 * 2)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.path.absolute()), cv2.CAP_FFMPEG, code, self.fps, self.size)
        if not self.writer.isOpened():
            raise Unusable(f"{self.shown} cannot be written: OpenCV makes no video of {self.size[0]}x{self.size[1]}.")
        if image.shape[1::-1] != self.size:
            image = cv2.resize(image, self.size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        self.writer.write(np.ascontiguousarray(image[..., ::-1]))
        self.count += 1

    def release(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.release()

    def check(self) -> None:
        """Raise InputError if frames are missing: OpenCV does not report a full disk."""
        written = capture_of(self.path)
        there = int(written.get(cv2.CAP_PROP_FRAME_COUNT)) if written.isOpened() else 0
        written.release()
        if there < self.count:
            raise InputError(f"{self.shown} cannot be written: {there} of {self.count} frames are in it.")
