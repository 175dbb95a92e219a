"""Odd and broken images: each with the shape it is read as, or the words of its refusal."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from case import Case
from PIL import Image

RNG = np.random.default_rng(0)
NOT_ONE, TOO_LARGE, CUT = "not an image that can be decoded", "or too large", "JPEG file that ends too early"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth enough to survive JPEG."""
    if mode == "1":
        return Image.new(mode, (width, height))
    small = RNG.integers(0, 256, (2, 2, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    return Image.fromarray(small.squeeze(), mode=mode).resize((width, height))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose frame header declares another size."""
    data = bytearray(saved(noise(8, 8), "JPEG"))
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + head + bytes(100)


def tiff(width: int, height: int) -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *e) for e in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + table + bytes(104)


def bad() -> Iterator[Case]:
    """Files that are no whole image of a bearable size."""
    jpeg = saved(noise(64, 48), "JPEG")
    for share in (0.3, 0.6, 0.9):
        yield Case(f"JPEG cut at {share}", jpeg[: int(len(jpeg) * share)], f"{CUT}|{NOT_ONE}")
    yield Case("JPEG without its last pixels", jpeg[:-8], CUT)
    small, exif = saved(noise(16, 16), "JPEG"), Image.Exif()
    exif[270] = small.decode("latin-1")
    with_thumbnail = saved(noise(64, 48), "JPEG", exif=exif)
    yield Case("JPEG with a thumbnail, cut", with_thumbnail[:-40], CUT)
    for kind in ("PNG", "WEBP", "BMP", "TIFF"):
        data = saved(noise(64, 48), kind)
        yield Case(f"{kind} cut", data[: len(data) // 3], f"{NOT_ONE}: a .* file that ends too early")
    for what, data in {
        "PNG 60000x60000": png(60000, 60000, bytes(1000)), "PNG 20000x20000": png(20000, 20000, bytes(1000)),
        "PNG 2^31-1": png(2**31 - 1, 2**31 - 1, b""), "BMP 30000x30000": bmp(30000, 30000),
        "BMP -30000": bmp(30000, -30000), "BMP 2^31-1": bmp(2**31 - 1, 2**31 - 1),
        "TIFF 30000x30000": tiff(30000, 30000),
        "TIFF 2^32-1": tiff(2**32 - 1, 2**32 - 1), "JPEG 65500x65500": jpeg_of(65500, 65500),
        "PNG 0x0": png(0, 0, b""), "PNG bits 7": png(4, 4, bytes(64), 7), "zero bytes": b"", "one byte": b"\xff",
        "text": b"not an image", "html": b"<html><script>alert(1)</script>", "svg": b"<svg onload='alert(1)'/>",
        "pickle": b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00idtR.", "zeros": bytes(10_000),
        "JPEG start": b"\xff\xd8", "JPEG end": b"\xff\xd8\xff\xd9", "pdf": b"%PDF-1.4\n", "gif start": b"GIF89a",
        "ImageMagick": b"push graphic-context\nfill 'url(https://x/|ls)'\npop graphic-context\n",
    }.items():  # fmt: skip
        yield Case(what, data, f"{NOT_ONE}|{TOO_LARGE}")


def odd() -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    """Unusual images that are read, and their height and width."""
    yield "1x1", saved(noise(1, 1), "PNG"), (1, 1)
    yield "20000x10", saved(noise(20000, 10), "PNG"), (10, 20000)
    yield "10x20000", saved(noise(10, 20000), "JPEG"), (20000, 10)
    yield "132 million pixels in 20 kB", png(11000, 12000, bytes(1376 * 12000), 1, 0), (12000, 11000)
    for mode in ("CMYK", "L", "RGB"):
        yield f"JPEG {mode}", saved(noise(20, 10, mode), "JPEG"), (10, 20)
    for mode in ("L", "LA", "RGBA", "1"):
        yield f"PNG {mode}", saved(noise(20, 10, mode), "PNG"), (10, 20)
    yield "PNG palette", saved(noise(20, 10).quantize(16), "PNG", transparency=3), (10, 20)
    deep = RNG.integers(0, 65536, (10, 20), dtype=np.uint16)
    yield "PNG 16 bit", saved(Image.fromarray(deep), "PNG"), (10, 20)
    yield "PNG 16 bit RGBA", png(20, 10, b"".join(b"\0" + bytes(160) for _ in range(10)), 16, 6), (10, 20)
    yield "TIFF 16 bit", saved(Image.fromarray(deep), "TIFF"), (10, 20)
    yield "JPEG progressive", saved(noise(20, 10), "JPEG", progressive=True), (10, 20)
    yield "JPEG without its last byte", saved(noise(20, 10), "JPEG")[:-1], (10, 20)
    yield "JPEG with junk behind", saved(noise(20, 10), "JPEG") + b"\0" * 1000, (10, 20)
    frames = [noise(20, 10), noise(20, 10)]
    for kind in ("GIF", "WEBP", "PNG"):
        yield f"{kind} animated", saved(frames[0], kind, save_all=True, append_images=frames[1:]), (10, 20)
