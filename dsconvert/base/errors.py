"""The exceptions a user may cause; the command line turns each into one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from dsconvert.base.text import Sentence, in_words, printable

MOST = 2000  # characters of a message


def shown(value: object) -> str:
    """A value of a stranger's file in a message: numbers and short text as they are, of anything else only its kind,
    as the text of a few nested lists can be without end."""
    if isinstance(value, str) and len(value) <= 200:
        return repr(value)
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        return str(value)
    if isinstance(value, str):
        return "a long text"
    return f"a {type(value).__name__}" if type(value).__module__ == "builtins" else "another object"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, torch, ONNX Runtime or OpenCV say that there is no memory left."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def system_fault(error: BaseException) -> str | None:
    """One sentence when the machine, and neither the input nor dsconvert, is at fault: memory, disk, permissions."""
    if is_out_of_memory(error):
        return Sentence("There is not enough memory; fewer {samples} or a smaller {imgsz} need less.")
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename} cannot be used" if error.filename else "Reading or writing failed"
        return printable(f"{what}: {error.strerror}.")
    return None


# how torch, ONNX Runtime, OpenCV and C++ say it
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Failed to allocate memory", "bad_alloc", "bad allocation",
                  "Insufficient memory")  # fmt: skip


class InputError(ValueError):
    """Something given to dsconvert cannot be used; the message is one complete sentence for the user. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MOST))
        self.message = message

    @classmethod
    def naming(cls, template: str, *values: object) -> Self:
        """One whose message names parameters, see `text.Sentence`."""
        return cls(Sentence(template, *values))

    def said(self, words: Callable[[str], str]) -> str:
        """The message with another face's words for the parameters."""
        return printable(in_words(self.message, words), MOST)


class Unusable(InputError):
    """One image or video cannot be used, or what belongs to it cannot be written; the next one may be."""


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Raises InputError with that message for whatever is raised within, but for InputErrors: native libraries raise
    many kinds on malformed files."""
    try:
        yield
    except InputError:
        raise
    except Exception:
        raise InputError(message) from None


class CheckError(RuntimeError):
    """A file dsconvert made does not compute what it should, and so was not written; one sentence. Exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MOST))


class LimitMissed(Exception):
    """A measured value misses the limit that the user set for it (exit code 3); one complete sentence."""
