"""Refuse image files that would block the machine, before they are decoded.

Decoders bound the size of a picture, but not the work. A small file may send them over the same bytes again and again,
or need more memory than the picture itself.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator

from dsconvert.photos.cutshort import BYTES_A_SCAN, kind_of, walk_jpeg
from dsconvert.photos.tifflist import MOST_PIECES, PACKING, first_list, pieces

# Each scan of a JPEG is decoded over the whole picture; a progressive one has ten. The second is scans times pixels.
MOST_SCANS, MOST_SCANNED = 500, 20 << 27
MANY_SCANS = "is a JPEG of more scans than any camera or program writes"
ON_EACH_OTHER = "is a TIFF whose parts overlap"
# Bytes that entries may share beyond four times the file's size. Strips and tiles may share many, as empty ones are
# often the same. Values may share few, as no program writes them so.
SHARED_PIECES, SHARED_VALUES = 256 << 20, 1 << 20
# what stands before EXIF data in each format, and at which distance; in unknown formats it may begin anywhere
EXIF = {"JPEG": ((b"\xff\xe1", (10,)),), "PNG": ((b"eXIf", (4,)),), "WebP": ((b"EXIF", (8, 14)),),
        "": ((b"II*\0", (0,)), (b"MM\0*", (0,))), "GIF": (), "BMP": (), "TIFF": ()}  # fmt: skip
MOST_ENTRIES = 200_000  # of all EXIF data in a file; cameras write some hundred
# pixels of formats that take up to five times the memory of a plain picture: animations, JPEG 2000, AVIF, Radiance
MOST_WIDE = 1 << 26
AREAS = (b"\xff\x4f\xff\x51", b"ispe")  # before width and height, with four bytes between: JPEG 2000, AVIF


def too_much(data: bytes) -> str | None:
    """Return why the file must not be decoded, as the end of a sentence about it; None for other files."""
    kind = kind_of(data)
    if kind == "JPEG":
        walked = walk_jpeg(data)
        if walked.scans > MOST_SCANS or (walked.scans > 20 and walked.scans * walked.pixels > MOST_SCANNED):
            return MANY_SCANS
    elif kind == "TIFF":
        return _overlaid(data)
    if _piled_up(data, kind):
        return "has overlapping EXIF data, or more than any camera writes"
    return "is larger than any image of its kind that dsconvert reads" if _wide(data, kind) > MOST_WIDE else None


def _overlaid(data: bytes) -> str | None:
    """Return why a TIFF must not be decoded: each strip may be the same megabyte, each value the same text."""
    said = first_list(data)
    parts, packing = pieces(said.found), {*said.found.get(PACKING, ())}
    held = [(at, max(0, min(size, len(data) - at))) for at, size in parts]
    if len(parts) > MOST_PIECES or sum(size for _, size in held) > 4 * len(data) + SHARED_PIECES:
        return ON_EACH_OTHER
    if said.outside > 4 * len(data) + SHARED_VALUES:
        return ON_EACH_OTHER
    if 6 in packing:
        return MANY_SCANS if data.count(BYTES_A_SCAN) > MOST_SCANS else None
    scans = sum(data.count(BYTES_A_SCAN, at, at + size) for at, size in held) if 7 in packing else 0
    return MANY_SCANS if scans > 4 * len(parts) + 16 else None


def _piled_up(data: bytes, kind: str) -> bool:
    """Return whether EXIF data name more bytes than there are, or have more entries than cameras write."""
    outside = entries = 0
    for at in _exif(data, kind):
        said = first_list(memoryview(data)[at:])
        outside, entries = outside + said.outside, entries + said.entries + 1
        if outside > 4 * len(data) + SHARED_VALUES or entries > MOST_ENTRIES:
            return True
    return False


def _exif(data: bytes, kind: str) -> Iterator[int]:
    """Yield where EXIF data begin."""
    for mark, ways in EXIF[kind]:
        for at in _places(data, mark):
            for begin in (at + way for way in ways):
                if data[begin : begin + 4] in (b"II*\0", b"MM\0*"):
                    yield begin


def _places(data: bytes, mark: bytes) -> Iterator[int]:
    """Yield where some bytes occur."""
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def _wide(data: bytes, kind: str) -> int:
    """Return the pixels of a picture in a format that takes much memory; 0 for other formats."""
    if kind == "PNG":
        return math.prod(struct.unpack_from(">II", data, 16)) if len(data) > 24 and b"acTL" in data else 0
    if kind == "WebP":
        return math.prod(1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27)) if b"ANIM" in data else 0
    if kind:
        return 0
    if data.startswith(b"#?"):
        sizes = re.search(rb"[-+][XY] +(\d{1,9}) +[-+][XY] +(\d{1,9})", data[: 1 << 16])
        return int(sizes[1]) * int(sizes[2]) if sizes else 0
    sides = (at + len(mark) + 4 for mark in AREAS for at in _places(data, mark))
    return max((math.prod(struct.unpack_from(">II", data, at)) for at in sides if at + 8 <= len(data)), default=0)
