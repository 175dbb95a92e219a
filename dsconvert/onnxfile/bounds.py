"""Bound the memory and time that an ONNX file may take, in proportion to the file's and its image's size.

A file of some kilobytes from a stranger may ask for any amount of either. The bounds hold only inside `enforced`, which
the command line uses. A limit of memory is one of the whole process, and a program that uses dsconvert may need more.
"""

from __future__ import annotations

import contextvars
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dsconvert.base.errors import InputError, is_out_of_memory

resource: ModuleType | None = None
with suppress(ImportError):  # Windows does not have it
    import resource

T = TypeVar("T")
# Measured: loading yolov5n and yolov5x in float32 takes up to 2.4 times their size (and 40 MB for small files). Running
# them takes 5 to 15 times the size of their image, at 640 to 2560 pixels.
BASE_BYTES, SIZES, IMAGES = 768 << 20, 4, 16
# Engines start one thread for each CPU, and the stack of each thread counts at once as 8 MB.
THREAD_BYTES, MOST_CPUS = 10 << 20, 64
BASE_SECONDS, SECONDS_A_MB, SECONDS_AN_IMAGE_MB = 20.0, 1.0, 0.2
LOOK = 0.2  # seconds between two checks of a timed call
THREAD = "dsconvert-bounded"
_ENFORCED: ContextVar[bool] = ContextVar("enforced", default=False)
_WARN: ContextVar[list[Callable[[str], None]] | None] = ContextVar("warn", default=None)


class Beyond(InputError):
    """A file takes more memory or time than its bounds."""


@contextmanager
def enforced(warn: Callable[[str], None] = lambda sentence: None) -> Iterator[None]:
    """Enforce bounds inside the block. `warn` is called once if this system cannot bound memory."""
    token, waiting = _ENFORCED.set(True), _WARN.set([warn])
    try:
        yield
    finally:
        _ENFORCED.reset(token)
        _WARN.reset(waiting)


def are_enforced() -> bool:
    """Return whether this code runs inside `enforced`."""
    return _ENFORCED.get()


def _warn_if_unbounded() -> None:
    left = _WARN.get()
    if left and (resource is None or _data_pages() < 0):
        left.pop()(
            "This system cannot bound a process's memory, so an ONNX file may take any amount; open only files that "
            "you trust."
        )


def left_running() -> bool:
    """Return whether a call that took too long is still running; the process must then end by os._exit."""
    return any(t.name == THREAD and t.is_alive() for t in threading.enumerate())


@dataclass
class Bounds:
    """The bounds of one file.

    what: the file's name in messages.
    size: its bytes.
    spent: seconds that calls of `first` have taken.
    """

    what: str
    size: int
    spent: float = field(default=0.0, init=False)

    def most_bytes(self, image: int) -> int:
        """Return the bytes by which the process may grow in one call, for images of so many bytes."""
        threads = THREAD_BYTES * min(os.cpu_count() or 1, MOST_CPUS)
        return BASE_BYTES + threads + SIZES * self.size + IMAGES * image

    def most_seconds(self, image: int) -> float:
        """Return the seconds that loading and the first call may take together."""
        return BASE_SECONDS + (SECONDS_A_MB * self.size + SECONDS_AN_IMAGE_MB * image) / 1e6

    def first(self, call: Callable[[], T], image: int = 0) -> T:
        """Load the file or run it for the first time, within both bounds. Raises InputError beyond them."""
        if not _ENFORCED.get():
            return call()
        _warn_if_unbounded()
        most, began = self.most_seconds(image), time.perf_counter()
        try:
            return in_time(lambda: self._within(call, image, collect=True), most - self.spent)
        except TimeoutError:
            raise self._too_slow(most, "to load and run once") from None
        finally:
            self.spent += time.perf_counter() - began

    def again(self, call: Callable[[], T], image: int = 0) -> T:
        """Run a later call within both bounds, with the whole time for itself. Raises InputError beyond them."""
        if not _ENFORCED.get():
            return call()
        most = self.most_seconds(image)
        try:
            return in_time(lambda: self._within(call, image, collect=False), most)
        except TimeoutError:
            raise self._too_slow(most, "to run once") from None

    def later(self, call: Callable[[], T], image: int = 0) -> T:
        """Run a call within the bound of memory only. Raises InputError beyond it."""
        return self._within(call, image, collect=False) if _ENFORCED.get() else call()

    def timed(self, call: Callable[[], T], image: int = 0) -> T:
        """Run a call as `later` does, without delaying it, for measuring its time. `patiently` stops it if it takes too
        long.
        """
        if not _ENFORCED.get():
            return call()
        _RUNNING[:] = [(self, image, time.perf_counter())]
        try:
            return self._within(call, image, collect=False)
        finally:
            _RUNNING.clear()

    def _too_slow(self, most: float, to: str) -> Beyond:
        return Beyond(
            f"{self.what} takes over {most:.0f} s {to}, more than a network of its size should, so it was stopped."
        )

    def _within(self, call: Callable[[], T], image: int, collect: bool) -> T:
        most = self.most_bytes(image)
        try:
            with growth(most, collect):
                return call()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Beyond(
                f"{self.what} needs over {most / 1e6:.0f} MB of memory, more than a network of its size should or than "
                "this machine has."
            ) from None


def made_of(predict: object, call: Callable[[], T], photo: int) -> T:
    """Return `call()` on what a predictor gave for a photograph of so many bytes.

    If the predictor comes from a stranger's file, the call runs within the file's bounds.
    """
    bounds = getattr(predict, "bounds", None)
    return bounds.later(call, photo) if isinstance(bounds, Bounds) else call()


_RUNNING: list[tuple[Bounds, int, float]] = []  # the timed call, if any: its bounds, its image's bytes, and its start


def patiently(call: Callable[[], T]) -> T:
    """Run a call that contains many `Bounds.timed` in a thread, and watch these from outside.

    Nothing is done between the timed calls, so their times stay undisturbed. Raises InputError when one takes too long.
    """
    if not _ENFORCED.get():
        return call()
    context = contextvars.copy_context()

    def overdue() -> Beyond | None:
        for bounds, image, began in _RUNNING[:]:
            most = bounds.most_seconds(image)
            if time.perf_counter() - began > most:
                return bounds._too_slow(most, "to run once")
        return None

    return _in_thread(lambda: context.run(call), LOOK, overdue)


@contextmanager
def growth(most: int, collect: bool = True) -> Iterator[None]:
    """Let this process's data grow by at most so many bytes inside the block; a larger request fails as out of memory.

    It does nothing where the system does not tell the present amount, or knows no such limit.

    collect: whether to collect garbage first. Garbage counts as data, but its memory can be used again. Collecting
        takes a tenth of a second, too long for every image.
    """
    if collect:
        gc.collect()
    pages = _data_pages()
    if pages < 0 or resource is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = pages * resource.getpagesize() + most
    lower = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *lower]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_pages() -> int:
    """Return the process's pages of memory, or -1 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5])
    except (OSError, ValueError, IndexError):
        return -1


def in_time(call: Callable[[], T], seconds: float) -> T:
    """Run a call in a thread and return or raise what it does. Raises TimeoutError when it takes longer.

    Native code cannot be stopped, so the thread goes on then.
    """
    return _in_thread(call, max(seconds, 0.0), TimeoutError)


def _in_thread(call: Callable[[], T], every: float, overdue: Callable[[], Exception | None]) -> T:
    """Run a call in a thread, and ask `overdue` every so many seconds whether to stop waiting.

    overdue: returns the error to raise, or None to go on.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    while not done.wait(every):  # `join` would be wrong here: once interrupted, it takes the thread for ended
        if error := overdue():
            raise error
    if raised:
        raise raised[0]
    return returned[0]
