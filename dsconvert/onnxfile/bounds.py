"""How much memory and time a stranger's ONNX file may take: in proportion to its own size, and to its image's.

A file of some kilobytes may ask for any amount of either. Bounds hold in processes that ask for them, as the command
line does (`enforced`): a limit of memory is the whole process's, and a program that uses dsconvert may need more.
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
with suppress(ImportError):  # Windows has none
    import resource

T = TypeVar("T")
# Measured: yolov5n and yolov5x in float32 take up to 2.4 times their size to load (small ones 40 MB more than nothing),
# and 5 to 15 times their image to run, at 640 to 2560 pixels.
BASE_BYTES, SIZES, IMAGES = 768 << 20, 4, 16
# Stacks of threads, 8 MB each, count as soon as they are there, and engines start one for each CPU.
THREAD_BYTES, MOST_CPUS = 10 << 20, 64
BASE_SECONDS, SECONDS_A_MB, SECONDS_AN_IMAGE_MB = 20.0, 1.0, 0.2
LOOK = 0.2  # seconds between two looks at what is timed
THREAD = "dsconvert-bounded"
_ENFORCED: ContextVar[bool] = ContextVar("enforced", default=False)
_WARN: ContextVar[list[Callable[[str], None]] | None] = ContextVar("warn", default=None)


class Beyond(InputError):
    """A file takes more than its bounds."""


@contextmanager
def enforced(warn: Callable[[str], None] = lambda sentence: None) -> Iterator[None]:
    """Bounds hold within. `warn` is told, once, where this system can bound no memory."""
    token, waiting = _ENFORCED.set(True), _WARN.set([warn])
    try:
        yield
    finally:
        _ENFORCED.reset(token)
        _WARN.reset(waiting)


def are_enforced() -> bool:
    """Whether this is within `enforced`."""
    return _ENFORCED.get()


def _warn_if_unbounded() -> None:
    left = _WARN.get()
    if left and (resource is None or _data_pages() < 0):
        left.pop()(
            "This system cannot bound a process's memory, so an ONNX file may take any amount; open only files that "
            "you trust."
        )


def left_running() -> bool:
    """Whether something that took too long runs still: the process cannot end in the usual way then."""
    return any(t.name == THREAD and t.is_alive() for t in threading.enumerate())


@dataclass
class Bounds:
    """Of a file of so many bytes, called `what` in messages; `spent` are the seconds that it took in `first`."""

    what: str
    size: int
    spent: float = field(default=0.0, init=False)

    def most_bytes(self, image: int) -> int:
        """What the process may gain in one call, given images of so many bytes."""
        threads = THREAD_BYTES * min(os.cpu_count() or 1, MOST_CPUS)
        return BASE_BYTES + threads + SIZES * self.size + IMAGES * image

    def most_seconds(self, image: int) -> float:
        """For loading and the first call together."""
        return BASE_SECONDS + (SECONDS_A_MB * self.size + SECONDS_AN_IMAGE_MB * image) / 1e6

    def first(self, call: Callable[[], T], image: int = 0) -> T:
        """Loading, or the first call, within both bounds. Raises InputError beyond them."""
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
        """A later call within both bounds, that of time alone. Raises InputError beyond them."""
        if not _ENFORCED.get():
            return call()
        most = self.most_seconds(image)
        try:
            return in_time(lambda: self._within(call, image, collect=False), most)
        except TimeoutError:
            raise self._too_slow(most, "to run once") from None

    def later(self, call: Callable[[], T], image: int = 0) -> T:
        """A call within the bound of memory. Raises InputError beyond it."""
        return self._within(call, image, collect=False) if _ENFORCED.get() else call()

    def timed(self, call: Callable[[], T], image: int = 0) -> T:
        """The same for a call whose time is measured: `patiently` ends what takes too long."""
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
                "there are."
            ) from None


def made_of(predict: object, call: Callable[[], T], photo: int) -> T:
    """What is made of what a predictor said of a photograph of so many bytes, within the bounds of the stranger's file
    that it is from, if it is from one."""
    bounds = getattr(predict, "bounds", None)
    return bounds.later(call, photo) if isinstance(bounds, Bounds) else call()


_RUNNING: list[tuple[Bounds, int, float]] = []  # at most one: what is timed, its image's bytes, when it began


def patiently(call: Callable[[], T]) -> T:
    """What the call returns or raises, many of `Bounds.timed` within it: in a thread of its own, so that nothing is
    done between them. Raises InputError when one of them takes too long."""
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
    """This process's data may grow by so many bytes within: what asks for more is told that there are none. Nothing
    where the system does not say how much data there is, or knows no such limit.

    What Python has not collected yet counts as data, and is room once it is collected: so it is collected first, which
    takes a tenth of a second, too long before every image."""
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
    """How many pages of memory the process has, -1 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5])
    except (OSError, ValueError, IndexError):
        return -1


def in_time(call: Callable[[], T], seconds: float) -> T:
    """What the call returns or raises, in a thread of its own. Raises TimeoutError when it takes longer; native code
    cannot be stopped, so the thread then goes on."""
    return _in_thread(call, max(seconds, 0.0), TimeoutError)


def _in_thread(call: Callable[[], T], every: float, overdue: Callable[[], Exception | None]) -> T:
    """The call in a thread of its own; `every` so many seconds `overdue` says whether to wait for it no longer."""
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
    while not done.wait(every):  # an interrupted `join` would take the thread for one that has ended
        if error := overdue():
            raise error
    if raised:
        raise raised[0]
    return returned[0]
