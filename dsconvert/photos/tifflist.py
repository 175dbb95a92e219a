"""Read the first list of a TIFF file, or of EXIF data, which have the same form.

A list has numbered entries, with their values inside or somewhere else in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

BIG_TIFF = (b"II+\0", b"MM\0+")
TIFFS = (b"II*\0", b"MM\0*", *BIG_TIFF)
PACKING, WHERE = 259, ((273, 279), (324, 325))  # how pieces are packed; offsets of strips or tiles, and their bytes
READ = {PACKING, *(tag for pair in WHERE for tag in pair)}
# type -> bytes of a value
BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
MOST_ENTRIES = 1 << 16  # libtiff reads at most 4096
MOST_PIECES = 1 << 20  # 134 million pixels have half as many tiles of 16x16


class Listed(NamedTuple):
    """What a list says.

    found: the values of the entries in READ, by number.
    end: where the list ends, or the last value outside of it.
    entries: how many.
    outside: bytes of values outside of the list, counted as often as they are named.
    """

    found: dict[int, tuple[int, ...]]
    end: int
    entries: int
    outside: int


def first_list(data: bytes | memoryview) -> Listed:
    """Read the list of data that begin with one of TIFFS."""
    order, big = "<" if data[:2] == b"II" else ">", bytes(data[:4]) in BIG_TIFF
    place, number, entry = (struct.Struct(order + c) for c in (("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")))
    if len(data) < 2 * place.size:
        return Listed({}, 2 * place.size, 0, 0)
    (at,) = place.unpack_from(data, place.size)
    first = at + number.size
    if first > len(data):
        return Listed({}, first, 0, 0)
    (count,) = number.unpack_from(data, at)
    there = min(count, MOST_ENTRIES, (len(data) - first) // entry.size)
    found: dict[int, tuple[int, ...]] = {}
    end, outside = (0 if there == count else first + entry.size * count), 0
    for where in range(first, first + entry.size * there, entry.size):
        tag, kind, values, _ = entry.unpack_from(data, where)
        start, size = where + entry.size - place.size, BYTES.get(kind, 0) * values
        if size > place.size:
            (start,) = place.unpack_from(data, start)
            end = max(end, start + size)
            outside += max(0, min(size, len(data) - start))
        letter = {3: "H", 4: "I", 16: "Q"}.get(kind)
        if tag in READ and tag not in found and letter is not None and start + size <= len(data):
            read = min(values, MOST_PIECES + 1)  # of repeated entries the first counts, as in libtiff
            found[tag] = struct.unpack_from(f"{order}{read}{letter}", data, start)
    return Listed(found, end, there, outside)


def pieces(found: Mapping[int, tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return where each strip or tile begins, and its bytes."""
    pairs = [(found.get(offsets, ()), found.get(sizes, ())) for offsets, sizes in WHERE]
    return [piece for offsets, sizes in pairs for piece in zip(offsets, sizes, strict=False)]
