"""Count the parts of an ONNX file in its bytes, before any of them becomes an object.

A part of two bytes becomes an object of some hundred bytes, and a node that ONNX Runtime loads one of a kilobyte.

The bytes are a protobuf: fields, each with a number and a kind. Some fields are messages, which consist of fields
again. The numbers are those of `onnx.proto`. Any other field counts as one part, however long it is.
"""

from __future__ import annotations

import mmap
from pathlib import Path

MOST_PARTS, MOST_NODES, MOST_DEPTH = 1_000_000, 100_000, 100
VARINT, EIGHT, LONG, FOUR = 0, 1, 2, 5  # kinds of fields

# message -> its fields that are messages, by number, with their kind
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 14: "entries", 15: "sparse"},
    "function": {7: "node", 11: "attribute", 12: "value"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 14: "type", 15: "type", 22: "sparse",
                  23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
    "entries": {},
    "value": {2: "type"},
    "type": {1: "shaped", 4: "inner", 5: "inner", 8: "shaped", 9: "inner"},
    "inner": {1: "type", 2: "type"},
    "shaped": {2: "entries"},
}  # fmt: skip


class Malformed(ValueError):
    """The bytes are not a protobuf, or are cut short."""


class TooMany(ValueError):
    """A protobuf has more parts than any network; the message continues a sentence that begins with the file's name."""


def check_parts(path: Path) -> None:
    """Raise TooMany for a file with too many parts, Malformed for other bytes, and OSError if it cannot be read."""
    with path.open("rb") as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise Malformed("empty") from None
        with data:
            _count(data)


def _count(data: mmap.mmap) -> None:
    parts = nodes = 0
    waiting = [("model", 0, len(data), 0)]
    while waiting:
        kind, at, end, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise TooMany("has graphs within graphs, deeper than in any network")
        messages, is_graph = _MESSAGES[kind], kind in ("graph", "function")
        while at < end:
            tag, at = _varint(data, at, end)
            number, form = tag >> 3, tag & 7
            parts += 1
            if form == LONG:
                length, at = _varint(data, at, end)
                if at + length > end:
                    raise Malformed("cut")
                inner = messages.get(number)
                if inner:
                    nodes += is_graph and inner == "node"
                    waiting.append((inner, at, at + length, depth + 1))
                at += length
            elif form == VARINT:
                _, at = _varint(data, at, end)
            elif form in (EIGHT, FOUR):
                at += 8 if form == EIGHT else 4
            else:
                raise Malformed("kind")
            if parts > MOST_PARTS or nodes > MOST_NODES:
                what = f"{MOST_NODES} nodes" if nodes > MOST_NODES else f"{MOST_PARTS} parts"
                raise TooMany(f"has more than {what}, more than any network")
        if at != end:
            raise Malformed("cut")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Return a number of variable length, and the index behind it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise Malformed("cut")
