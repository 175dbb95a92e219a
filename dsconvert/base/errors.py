"""The exceptions that a user may cause; the command line turns each into one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from dsconvert.base.text import Sentence, in_words, printable

MOST = 2000  # characters of a message


def shown(value: object) -> str:
    """Return a value of a stranger's file for a message.

    Numbers and short text are shown as they are, anything else only by its kind: a few nested lists can have endless
    text.
    """
    if isinstance(value, str) and len(value) <= 200:
        return repr(value)
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        return str(value)
    if isinstance(value, str):
        return "a long text"
    return f"a {type(value).__name__}" if type(value).__module__ == "builtins" else "another object"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this error is how Python, torch, ONNX Runtime or OpenCV report that memory is exhausted."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def system_fault(error: BaseException) -> str | None:
    """Return a sentence if the machine is at fault (memory, disk, permissions) and neither the input nor dsconvert."""
    if is_out_of_memory(error):
        return Sentence("There is not enough memory; use fewer {samples} or a smaller {imgsz}.")
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename} cannot be used" if error.filename else "Reading or writing failed"
        return printable(f"{what}: {error.strerror}.")
    return None


# how torch, ONNX Runtime, OpenCV and C++ report it
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Failed to allocate memory", "bad_alloc", "bad allocation",
                  "Insufficient memory")  # fmt: skip


class InputError(ValueError):
    """Something given to dsconvert cannot be used (exit code 2).

    The message is one complete sentence for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MOST))
        self.message = message

    @classmethod
    def naming(cls, template: str, *values: object) -> Self:
        """Return an error whose message names parameters (see `text.Sentence`)."""
        return cls(Sentence(template, *values))

    def said(self, words: Callable[[str], str]) -> str:
        """Return the message with other words for the parameters, such as command line options."""
        return printable(in_words(self.message, words), MOST)


class Unusable(InputError):
    """One image or video cannot be used, or its results cannot be written; the next one may be fine."""


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Raise InputError with that message for any other exception in the block: native libraries raise many kinds."""
    try:
        yield
    except InputError:
        raise
    except Exception:
        raise InputError(message) from None


class CheckError(RuntimeError):
    """A file that dsconvert made does not compute what it should, and so was not written (exit code 1)."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MOST))


class LimitMissed(Exception):
    """A measured value misses the limit that the user set (exit code 3); the message is one complete sentence."""
