"""Read text files from strangers, within bounds, in any usual encoding.

UTF-8 may have a byte order mark; UTF-16 and UTF-32 need one. Bytes that are not UTF-8 are read as Windows-1252, which
contains Latin-1. Pipes and devices, which may never end, are refused.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterator
from pathlib import Path

MARKS = (  # UTF-32's mark begins with UTF-16's, so it comes first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip
AS_WINDOWS = "dsconvert-windows"


class NotText(ValueError):
    """A file is too large, not text, or not an ordinary file; the message continues a sentence that begins with its
    name.
    """


def _as_windows(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    bad = bytes(error.object[error.start : error.end])
    return "".join(_WINDOWS[byte] for byte in bad), error.end


# five bytes are undefined in Windows-1252; they get Latin-1's control characters
_WINDOWS = [bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(256)]
codecs.register_error(AS_WINDOWS, _as_windows)


def read_text(path: Path, most: int) -> str:
    """Return a whole file of at most `most` bytes. Raises OSError, or NotText."""
    _check_ordinary(path)
    if not path.stat().st_size:  # files of the system have no size, and reading some of them blocks
        return ""
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise NotText(f"is longer than {_size(most)}")
    return decoded(data)


def decoded(data: bytes) -> str:
    """Return the text of these bytes. Raises NotText."""
    encoding, errors = _encoding(data[:4])
    try:
        text = data.decode(encoding, errors)
    except UnicodeError:
        raise NotText("is not text") from None
    if _is_strange(text, encoding):
        raise NotText("is not text")
    return text


def read_lines(path: Path, most: int, most_lines: int, longest: int) -> Iterator[str]:
    """Yield the lines of a file of at most `most` bytes, without their ends. Raises OSError, or NotText."""
    _check_ordinary(path)
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        if not size:
            return
        if size > most:
            raise NotText(f"is longer than {_size(most)}")
        encoding, errors = _encoding(raw.read(4))
        raw.seek(0)
        stream = io.TextIOWrapper(raw, encoding, errors)
        try:
            for number in range(most_lines + 1):
                line = stream.readline(longest + 2)
                if not line:
                    return
                if number == most_lines:
                    raise NotText(f"has more than {most_lines} lines")
                if _is_strange(line, encoding):
                    raise NotText("is not text")
                if len(line) > longest + 1:
                    raise NotText(f"has a line of more than {longest} characters")
                yield line.removesuffix("\n")
        except UnicodeError:
            raise NotText("is not text") from None


def _is_strange(text: str, encoding: str) -> bool:
    """Return whether text holds what no text does.

    Any bytes make some characters of UTF-16, but no path or label is without ASCII.
    """
    return "\0" in text or (not encoding.startswith("utf-8") and not any(c.isascii() for c in text))


def _encoding(start: bytes) -> tuple[str, str]:
    found = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
    return found, "strict" if found in ("utf-16", "utf-32") else AS_WINDOWS


def _check_ordinary(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise NotText("is a folder" if os.path.isdir(path) else "is a pipe or a device, not an ordinary file")


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} kB"
