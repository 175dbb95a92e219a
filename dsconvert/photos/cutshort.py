"""Use image files whose end is missing, if the picture itself is complete, in whatever format.

The missing end is filled up in two different ways, and both files are decoded. If their pixels agree, no pixel depends
on the missing bytes.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsconvert.photos.tifflist import TIFFS, first_list, pieces

Image = NDArray[np.uint8]
FILLINGS = (bytes(64), b"\xa5" * 64)
PNG = b"\x89PNG\r\n\x1a\n"
STARTS = {
    b"\xff\xd8": "JPEG", PNG: "PNG", b"GIF8": "GIF", b"BM": "BMP",
    **dict.fromkeys(TIFFS, "TIFF"),
}  # fmt: skip
SOS, EOI, BYTES_AN_END = 0xDA, 0xD9, b"\xff\xd9"
BYTES_A_SCAN = b"\xff\xda"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frame headers
MOST_PARTS, MOST_BLOCKS = 100_000, 5_000_000  # of a file; a file with more is left to the decoder
MOST_RAW = 256 << 20  # bytes of a PNG's unpacked rows that are packed again
MARKER, FILL = re.compile(rb"\xff(?![\x00\xd0-\xd7])", re.DOTALL), re.compile(rb"\xff+")


def kind_of(data: bytes) -> str:
    """Return the name of the format; empty if it is not handled here."""
    if data.startswith(b"RIFF"):
        return "WebP" if data[8:12] == b"WEBP" else ""
    return next((name for start, name in STARTS.items() if data.startswith(start)), "")


def ends_early(data: bytes) -> bool:
    """Return whether a file is shorter than its own structure says; False for other formats."""
    kind = kind_of(data)
    if kind == "JPEG":
        return not walk_jpeg(data).ended
    if kind == "PNG":
        return not any(name == b"IEND" and whole for name, _, whole in _png_chunks(data))
    if kind == "GIF":
        return _gif_picture_end(data) is None or data[-1:] != b";"
    if kind == "WebP":
        return len(data) < 8 + struct.unpack_from("<I", data, 4)[0]
    if kind == "BMP":
        return len(data) < 6 or len(data) < struct.unpack_from("<I", data, 2)[0]
    return kind == "TIFF" and _tiff_end(data) > len(data)


def whole_picture(data: bytes, decode: Callable[[bytes], Image | None]) -> Image | None:
    """Return the picture of a file that ends early, or None if a part of it is missing."""
    kind = kind_of(data)
    if kind == "PNG":
        mended = _mended_png(data)
        return None if mended is None else decode(mended)
    if kind == "GIF":
        end = _gif_picture_end(data)
        return None if end is None else decode(data[:end] + b";")
    if kind == "JPEG":
        if not walk_jpeg(data).complete:
            return None
        filled = [data.rstrip(b"\xff") + filling + BYTES_AN_END for filling in FILLINGS]
    else:
        filled = [data + filling for filling in FILLINGS]
    first = decode(filled[0])
    if first is None:
        return None
    second = decode(filled[1])
    return first if second is not None and np.array_equal(first, second) else None


class Walked(NamedTuple):
    """The structure of a JPEG's first picture.

    ended: whether its end marker is there.
    complete: whether all scans have begun.
    scans: number of scans.
    pixels: of the picture.
    """

    ended: bool
    complete: bool
    scans: int
    pixels: int


def walk_jpeg(data: bytes) -> Walked:
    """Walk through the segments of a JPEG.

    Thumbnails are skipped, as they lie in segments with a length. What follows the end (a film, another picture) is
    ignored.
    """
    at, parts, scans, pixels = 2, 0, 0, 0
    known: dict[int, dict[int, int]] = {}  # by component and coefficient: bits that are still missing
    components: list[int] = []
    while at + 4 <= len(data):
        parts += 1
        if parts > MOST_PARTS:
            return Walked(True, True, data.count(BYTES_A_SCAN), pixels)
        if data[at] != 0xFF:
            at = _next_marker(data, at)
            continue
        if data[at + 1] == 0xFF and (fill := FILL.match(data, at)):
            at = fill.end() - 1
            continue
        marker = data[at + 1]
        if marker == EOI:
            return Walked(True, True, scans, pixels)
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if marker in FRAMES and len(body) > 5:
            pixels = max(pixels, math.prod(struct.unpack_from(">HH", body, 1)))
            components = list(body[6 : 6 + 3 * body[5] : 3])
            known = {c: {} for c in components}
        scans += marker == SOS
        if marker == SOS and body and len(body) >= 4 + 2 * body[0]:
            start, end, low = body[1 + 2 * body[0]], min(body[2 + 2 * body[0]], 63), body[3 + 2 * body[0]] & 15
            for c in body[1 : 1 + 2 * body[0] : 2]:
                known.setdefault(c, {}).update(dict.fromkeys(range(start, end + 1), low))
            at = _next_marker(data, at + 2 + length)
            continue
        at += 2 + length
    # without an end marker, every coefficient of every component must have all its bits
    complete = bool(components) and all(len(known[c]) == 64 and not any(known[c].values()) for c in components)
    return Walked(data[at : at + 2] == BYTES_AN_END, complete, scans, pixels)


def _next_marker(data: bytes, at: int) -> int:
    """Return where the scan at a place ends. Inside a scan, FF is followed by 00 or a restart marker D0 to D7."""
    found = MARKER.search(data, at)
    return found.start() if found else len(data)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yield kind, content and completeness of each chunk; of the last chunk as much as there is."""
    at = 8
    for _ in range(MOST_PARTS):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + 8 + length], at + 12 + length <= len(data)
        at += 12 + length
    yield b"IEND", b"", True


def _mended_png(data: bytes) -> bytes | None:
    """Return the file with its picture packed again and an end, or None if pixels are missing."""
    before: list[bytes] = []
    packed: list[bytes] = []
    for kind, content, whole in _png_chunks(data):
        if kind == b"IDAT":
            packed.append(content)
        elif packed or not whole:
            break
        else:
            before.append(_png_chunk(kind, content))
    size = _png_bytes(data)
    if size is None or not packed:
        return None
    try:
        raw = zlib.decompressobj().decompress(b"".join(packed), size)
    except zlib.error:
        return None
    if len(raw) < size:
        return None
    return b"".join((PNG, *before, _png_chunk(b"IDAT", zlib.compress(raw, 1)), _png_chunk(b"IEND", b"")))


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_bytes(data: bytes) -> int | None:
    """Return the bytes of all unpacked rows, with the filter byte of each; None if this is no PNG, or too large."""
    if data[12:16] != b"IHDR" or len(data) < 29:
        return None
    width, height, depth, colour, _, _, passes = struct.unpack_from(">IIBBBBB", data, 16)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour)
    if samples is None:
        return None
    steps = [(0, 0, 1, 1)]
    if passes:  # Adam7: first column and row, and the steps to the next
        steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    sizes = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in steps]
    total = sum(h * (1 + -(-w * samples * depth // 8)) for w, h in sizes if w)
    return total if total <= MOST_RAW else None


def _gif_picture_end(data: bytes) -> int | None:
    """Return where the first picture ends, including the zero behind its blocks; None if its end is missing."""
    if len(data) < 13:
        return None
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    for _ in range(MOST_PARTS):
        if at >= len(data):
            return None
        if data[at] == 0x2C and at + 11 <= len(data):
            at += 10 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 0x80 else 0) + 1
            return _gif_blocks_end(data, at)
        end = _gif_blocks_end(data, at + 2) if data[at] == 0x21 else None
        if end is None:
            return None
        at = end
    return None


def _gif_blocks_end(data: bytes, at: int) -> int | None:
    for _ in range(MOST_BLOCKS):
        if at >= len(data):
            return None
        if not data[at]:
            return at + 1
        at += 1 + data[at]
    return None


def _tiff_end(data: bytes) -> int:
    """Return where the strips or tiles of the first picture end, or the list that names them if that is later."""
    said = first_list(data)
    return max([said.end, *(start + size for start, size in pieces(said.found))])
