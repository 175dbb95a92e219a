"""Report what a user must know about images and labels while the work goes on: files left out, another split, other
names.

Code reports it with `note`, as a Python warning, so programs that call dsconvert see it like any other warning. The
command line prints it and adds it to its JSON.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dsconvert.base.text import printable

MOST = 2000  # characters of a sentence


class DataWarning(UserWarning):
    """Something about the images or labels that changes what is measured; one complete sentence."""


# show a sentence every time, not once for each place in the code, unless the user's own filters say otherwise
warnings.filterwarnings("always", category=DataWarning, append=True)
_heard: list[list[str]] = []  # one list for each caller of `heard`, the innermost last


def note(sentence: str) -> None:
    """Warn about something; quoted names cannot control a terminal."""
    warnings.warn(DataWarning(printable(sentence, MOST)), stacklevel=3)


@contextmanager
def heard(say: Callable[[str], None]) -> Iterator[list[str]]:
    """Hand each different sentence in the block to `say` once, and collect them in the yielded list."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=DataWarning)
        before = warnings.showwarning
        kept: list[str] = []

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, DataWarning):
                before(message, category, *rest, **more)
            elif str(message) not in kept:
                kept.append(str(message))
                say(str(message))

        warnings.showwarning = show
        _heard.append(kept)
        try:
            yield kept
        finally:
            _heard.pop()


@contextmanager
def unheard() -> Iterator[None]:
    """Report nothing inside the block, for files that are only looked at in passing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DataWarning)
        yield


def so_far() -> list[str]:
    """Return what the innermost `heard` has collected."""
    return list(_heard[-1]) if _heard else []
