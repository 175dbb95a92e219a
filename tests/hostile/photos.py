"""Images whose parts lie on each other, go in circles, or claim more than they are: the words of their refusal, or the
sides they are read with (either first, as EXIF data may turn them)."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from case import Case
from pictures import NOT_ONE, TOO_LARGE, bmp, chunk, noise, png, saved
from PIL import Image, features

SIDES = (24, 16)
TURNED = 0x0112  # EXIF's number for how a picture lies
EXIF, OVERLAID, LARGE = "has overlapping EXIF data", "is a TIFF whose parts overlap", "of its kind"
SHORT, LONG, TEXT, LONG8 = 3, 4, 2, 16
Entry = tuple[int, int, int, int]  # number, type, how many values, the value or where they are


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def listed(entries: Sequence[Entry], after: int = 0, order: str = "<") -> bytes:
    """A TIFF's list, and where the next one is."""
    parts = [struct.pack(order + "H", len(entries))]
    for number, kind, count, value in entries:  # a short stands at the left of its four bytes
        last = struct.pack(order + "HH", value, 0) if kind == SHORT else struct.pack(order + "I", value)
        parts += [struct.pack(order + "HHI", number, kind, count), last]
    return b"".join(parts) + struct.pack(order + "I", after)


def exif(entries: Sequence[Entry], behind: bytes = b"", after: int = 0, order: str = "<") -> bytes:
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "I", 8) + listed(entries, after, order) + behind


def jpeg(*segments: bytes) -> bytes:
    data = saved(noise(*SIDES), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def with_exif(body: bytes) -> bytes:
    return jpeg(segment(0xE1, b"Exif\0\0" + body))


def png_with(*chunks: bytes) -> bytes:
    data = saved(noise(*SIDES), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def tiff(more: Sequence[Entry] = (), after: int = 0, size: int = 0) -> bytes:
    """Grey, of one strip right behind its list; filled up to a size."""
    start, pixels = 8 + 2 + 12 * (9 + len(more)) + 4, bytes(SIDES[0] * SIDES[1])
    own = [(256, LONG, 1, SIDES[0]), (257, LONG, 1, SIDES[1]), (258, SHORT, 1, 8), (259, SHORT, 1, 1),
           (262, SHORT, 1, 1), (273, LONG, 1, start), (277, SHORT, 1, 1), (278, LONG, 1, SIDES[1]),
           (279, LONG, 1, len(pixels))]  # fmt: skip
    return (b"II*\0" + struct.pack("<I", 8) + listed(sorted([*own, *more]), after) + pixels).ljust(size, b"\0")


def strips(count: int, data: bytes, packing: int, big: bool = False) -> bytes:
    """A TIFF 8 pixels wide, each row of which is a strip; all strips are the same bytes."""
    head, entry, word, kind = (16, 20, "Q", LONG8) if big else (8, 12, "I", LONG)
    offsets = head + (8 if big else 2) + entry * 9 + struct.calcsize(word)
    sizes = offsets + struct.calcsize(word) * count
    where = sizes + struct.calcsize(word) * count
    own = [(256, 4, 1, 8), (257, 4, 1, count), (258, 4, 1, 8), (259, 4, 1, packing), (262, 4, 1, 1),
           (273, kind, count, offsets), (277, 4, 1, 1), (278, 4, 1, 1), (279, kind, count, sizes)]  # fmt: skip
    table = b"".join(struct.pack(f"<HH{word}{word}", *e) for e in own)
    start = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 9) if big else b"II*\0" + struct.pack("<IH", 8, 9)
    lists = struct.pack(f"<{count}{word}", *[where] * count) + struct.pack(f"<{count}{word}", *[len(data)] * count)
    return start + table + bytes(struct.calcsize(word)) + lists + data


def piled(kind: int, size: int, count: int = 65_535) -> bytes:
    """EXIF data of so many entries of the same bytes."""
    return exif([(0x010E, kind, size, 8)] * count, bytes(size))


def refused() -> Iterator[Case]:
    """Small files of these kinds took minutes, or up to 11 GB."""
    small = exif([(0x010E + i % 3, TEXT, 60_000, 8) for i in range(5000)])
    yield Case("EXIF texts that are the list itself", with_exif(small[:65_000]), EXIF)
    yield Case("500 segments of them", jpeg(*[segment(0xE1, b"Exif\0\0" + small)] * 500), EXIF)
    yield Case("the same under another name", jpeg(segment(0xE1, b"exif\0\0" + small)), EXIF)
    yield Case("the other order of bytes", with_exif(exif([(0x010E, TEXT, 60_000, 8)] * 5000, order=">")), EXIF)
    yield Case("EXIF fractions", with_exif(exif([(0x013E, 5, 7000, 8)] * 5000)), EXIF)
    yield Case("PNG's EXIF", png_with(chunk(b"eXIf", piled(TEXT, 5 << 20))), EXIF)
    yield Case("WebP's EXIF", saved(noise(*SIDES), "WEBP", exif=piled(TEXT, 16 << 20)), EXIF)
    if features.check("avif"):
        yield Case("AVIF's EXIF", saved(noise(*SIDES), "AVIF", exif=piled(TEXT, 16 << 20)), EXIF)
    yield Case("200000 lists of EXIF", png_with(chunk(b"eXIf", exif([(TURNED, SHORT, 1, 6)])) * 200_000), EXIF)
    yield Case("TIFF, 65535 lists of strips", exif([(273, LONG, 196_000, 8)] * 65_535), f"{NOT_ONE}|{OVERLAID}")
    for count, size in ((4000, 4 << 20), (400, 16 << 20)):
        values = [(40_000 + i, TEXT, size, 100_000) for i in range(count)]
        yield Case(f"TIFF, {count} texts of {size} bytes", tiff(values, size=100_000 + size), OVERLAID)
    one = saved(Image.new("L", (8, 8), 90), "JPEG")
    long = one[:2] + segment(0xFE, bytes(65_000)) * 16 + one[2:]
    for name, count, data, packing in (
        ("plain", 100_000, bytes(1 << 20), 1), ("deflated", 100_000, zlib.compress(bytes(8)).ljust(1 << 20, b"\0"), 8),
        ("JPEG", 20_000, long, 7), ("more", 1_100_000, bytes(8), 1),
    ):  # fmt: skip
        yield Case(f"TIFF, strips that are the same, {name}", strips(count, data, packing), OVERLAID)
    yield Case("BigTIFF, strips that are the same", strips(100_000, bytes(1 << 20), 1, big=True), OVERLAID)
    for at in (0, 4):
        yield Case(f"TIFF, list at {at}", b"II*\0" + struct.pack("<I", at) + bytes(100), NOT_ONE)
    yield from large()


def large() -> Iterator[Case]:
    """What takes more memory than a plain picture of as many pixels."""
    frames = [noise(64, 64), noise(64, 64)]
    moving = bytearray(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    struct.pack_into(">II", moving, 16, 11_000, 12_000)
    moving[29:33] = struct.pack(">I", zlib.crc32(moving[12:29]))
    yield Case("PNG that moves", bytes(moving), LARGE)
    moving = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    for at, side in ((24, 11_000), (27, 12_000)):
        moving[at : at + 3] = (side - 1).to_bytes(3, "little")
    yield Case("WebP that moves", bytes(moving), LARGE)
    yield Case("Radiance", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 12000 +X 11000\n" + bytes(1000), LARGE)
    for kind, mark, supported in (("JPEG2000", b"\xff\x4f\xff\x51", "jpg_2000"), ("AVIF", b"ispe", "avif")):
        if features.check(supported):
            data = bytearray(saved(noise(*SIDES), kind))
            struct.pack_into(">II", data, data.index(mark) + 8, 11_000, 12_000)
            yield Case(kind, bytes(data), LARGE)
    for name, sides in {"2^31-1 x 1": (2**31 - 1, 1), "1 x -2^31": (1, -(2**31)), "0": (0, 0)}.items():
        yield Case(f"BMP {name}", bmp(*sides), f"{NOT_ONE}|{TOO_LARGE}")
    for sides in ((65_535, 65_535), (0, 0), (4, 4)):
        yield Case(f"GIF on {sides}", canvas(*sides), f"{NOT_ONE}|{TOO_LARGE}")
    yield Case("PPM", b"P6 2000000000 2000000000 255\n" + bytes(100), f"{NOT_ONE}|{TOO_LARGE}")


def canvas(width: int, height: int) -> bytes:
    """A GIF whose one frame is 8 pixels wide and high."""
    data = bytearray(saved(Image.new("P", (8, 8), 3), "GIF"))
    struct.pack_into("<HH", data, 6, width, height)
    return bytes(data)


def read() -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    """Odd ones that are pictures nevertheless, and their sides."""
    for kind in (0, 1, 2, 4, 5, 7, 9, 11, 12, 99):
        yield f"turned by type {kind}", with_exif(exif([(TURNED, kind, 1, 6)])), SIDES
    for value in (0, 9, 65_535):
        yield f"turned by {value}", with_exif(exif([(TURNED, SHORT, 1, value)])), SIDES
    yield "turned by 2^32 values", with_exif(exif([(TURNED, SHORT, 0xFFFFFFFF, 6)])), SIDES
    yield "turned from far away", with_exif(exif([(TURNED, 5, 1, 0xFFFFFFF0)])), SIDES
    circles = [(0x8769, LONG, 1, 8), (0x8825, LONG, 1, 8), (0xA005, LONG, 1, 8), (330, LONG, 1, 8)]
    yield "EXIF in circles", with_exif(exif(circles, after=8)), SIDES
    yield "EXIF of 65535 entries", with_exif(b"II*\0\x08\0\0\0\xff\xff" + exif([(TURNED, SHORT, 1, 6)] * 5000)), SIDES
    for at in (0, 4, 0xFFFFFFFF):
        yield f"EXIF at {at}", with_exif(b"II*\0" + struct.pack("<I", at) + bytes(20)), SIDES
    for body in (b"", b"II*", b"II*\0\x08\0\0\0", bytes(65_000)):
        yield f"EXIF of {len(body)} bytes", with_exif(body), SIDES
    jfif, profile, adobe = b"JFIF\0\1\1\0\0\1\0\1\0\0", b"ICC_PROFILE\0\x01\xff\0", b"Adobe\0\x64\0\0\0\0\0"
    for marker, body in ((0xE1, b""), (0xE1, b"http://ns"), (0xE2, profile), (0xE0, jfif), (0xEE, adobe), (0xFE, b""),
                         (0xDB, b"\0" + bytes([1]) * 64)):  # fmt: skip
        yield f"200000 segments {marker:x}", jpeg(segment(marker, body) * 200_000), SIDES
    both = io.BytesIO()
    noise(*SIDES).save(both, "MPO", save_all=True, append_images=[noise(*SIDES)] * 3)
    yield "MPO", both.getvalue(), SIDES
    yield "TIFF before itself", tiff(after=8), SIDES
    yield "TIFF there and back", tiff(after=1000, size=1000) + listed([(256, LONG, 1, 8)], after=8), SIDES
    yield "TIFF within itself", tiff([(330, LONG, 1, 8), (34665, LONG, 1, 8), (34853, LONG, 1, 8)]), SIDES
    yield "TIFF within itself, often", tiff([(330, LONG, 100, 8)]), SIDES
    yield "TIFF, blank strips that are the same", strips(4096, bytes(8), 1), (4096, 8)
    yield "BigTIFF", strips(16, bytes(8), 1, big=True), (16, 8)
    frames = [noise(*SIDES) for _ in range(100)]
    for kind in ("PNG", "WEBP", "GIF"):
        yield f"{kind} of 100 frames", saved(frames[0], kind, save_all=True, append_images=frames[1:]), SIDES
    yield "GIF on 11000 x 12000", canvas(11_000, 12_000), (12_000, 11_000)
    moving = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    at = moving.index(b"acTL") - 4
    claimed = moving[:at] + chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + moving[at + 20 :]
    yield "PNG that claims 2^31 frames", claimed, SIDES
    yield "PNG of a million empty parts", png_with(chunk(b"IDAT", b"") * 1_000_000), SIDES
    yield "PNG 16 bit", saved(Image.fromarray(np.full(SIDES, 0xABCD, np.uint16)), "PNG"), SIDES
    yield "PNG 16 bit, colours", png(*SIDES, bytes((1 + 6 * SIDES[0]) * SIDES[1]), 16, 2), SIDES
    packed = struct.pack("<IiiHHIIiiII", 40, 11_000, 12_000, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    for name, data in {"ends": b"\0\1", "moves on": b"\0\2\1\0" * 1_000_000 + b"\0\1"}.items():
        head = b"BM" + struct.pack("<IHHI", 14 + len(packed) + len(data), 0, 0, 14 + len(packed))
        yield f"BMP that {name}", head + packed + data, (12_000, 11_000)
    yield "PPM of comments", b"P6\n" + b"#a\n" * 1_000_000 + b"24 16 255\n" + bytes(3 * 24 * 16), SIDES
