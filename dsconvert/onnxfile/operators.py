"""The operator of our own that files of layout fast need: where the library is that has it, and what is said where it
is not. The library is another wheel, dsconvert-ops (see `ops/` in the repository), and nothing else needs it."""

from __future__ import annotations

import functools
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime as ort

from dsconvert.base.errors import InputError

DOMAIN, LOOKUP = "dsconvert", "Lookup"  # bytes through a table of 256 bytes
TABLE = 256
MISSING = (
    "needs the operator library dsconvert-ops, which is not installed or cannot be loaded; in a checkout of dsconvert, "
    "pip install ./ops"
)

_HELD: list[ort.SessionOptions] = []  # while one has it, the library stays loaded, and keeps what it made for others


@functools.cache
def library() -> str | None:
    """The path of the library, None where it is not installed or ONNX Runtime cannot load it."""
    if find_spec("dsconvert_ops") is None:
        return None
    with suppress(Exception):  # made for another processor, say: whatever it is, there is no library then
        import dsconvert_ops

        path = str(dsconvert_ops.library())
        options = ort.SessionOptions()
        options.register_custom_ops_library(path)
        _HELD.append(options)
        return path
    return None


def with_operators(options: ort.SessionOptions) -> ort.SessionOptions:
    """The same options, with the library where there is one."""
    path = library()
    if path is not None:
        options.register_custom_ops_library(path)
    return options


def quiet_options() -> ort.SessionOptions:
    """Options with the library where there is one, and without a log: errors are raised anyway, and the log would print
    an untrusted file's names unescaped."""
    options = with_operators(ort.SessionOptions())
    options.log_severity_level = 4
    return options


def need_operators(what: str) -> None:
    """Raises InputError about `what`, which cannot be had without the library, where there is none."""
    if library() is None:
        raise InputError(f"{what} {MISSING}.")


def check_operators(model: bytes | Path, what: str) -> None:
    """Raises InputError about `what` where that file needs the library and there is none. A file that cannot be read is
    no concern of this."""
    if library() is not None:
        return
    made = onnx.ModelProto()
    with suppress(Exception):  # protobuf raises many kinds on malformed files
        made.ParseFromString(model if isinstance(model, bytes) else model.read_bytes())
    if any(entry.domain == DOMAIN for entry in made.opset_import):
        need_operators(what)
