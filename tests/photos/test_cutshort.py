"""Image files with something behind their end, or without it: used when the whole picture is there, in any format."""

from __future__ import annotations

import io
import re
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from dsconvert.base.errors import InputError
from dsconvert.photos.cutshort import ends_early, kind_of
from dsconvert.photos.images import read_image

SCENE = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8), (67, 48))


def saved(kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(SCENE).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {
    "JPEG": saved("JPEG"), "progressive JPEG": saved("JPEG", progressive=True), "grey JPEG": saved("JPEG", "L"),
    "JPEG with restarts": saved("JPEG", restart_marker_rows=1), "PNG": saved("PNG"), "palette PNG": saved("PNG", "P"),
    "PNG of bits": saved("PNG", "1"), "transparent PNG": saved("PNG", "RGBA"), "GIF": saved("GIF", "P"),
    "WebP": saved("WEBP"), "lossless WebP": saved("WEBP", lossless=True), "BMP": saved("BMP"), "TIFF": saved("TIFF"),
    "LZW TIFF": saved("TIFF", compression="tiff_lzw"), "JPEG TIFF": saved("TIFF", compression="jpeg"),
}  # fmt: skip
# Bytes at the end without which the picture is whole: JPEG's end marker, PNG's checksums and end chunk, GIF's end, the
# byte that makes WebP's length even, the one that fills BMP's last row up.
LAST = {"JPEG": 2, "PNG": 16, "GIF": 1, "BMP": 1}


@pytest.fixture
def read(tmp_path):
    def read(data: bytes) -> np.ndarray:
        (tmp_path / "a.jpg").write_bytes(data)
        return read_image(tmp_path / "a.jpg")

    return read


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_whole_whatever_follows(name, read):
    data = FILES[name]
    assert not ends_early(data)
    assert kind_of(data) in name
    wanted = read(data)
    assert wanted.shape == SCENE.shape
    film = struct.pack(">I", 24) + b"ftypmp42\0\0\0\0isommp42" + b"\xff\xda\xff\xd8\xff\xda\0\x0c" * 50
    for behind in (b"\0", film, b"\xff\xda no end", data[:-20], FILES["JPEG"][:-50]):
        np.testing.assert_array_equal(read(data + behind), wanted)


@pytest.mark.parametrize("name", FILES)
def test_what_is_missing_decides(name, read):
    """Every cut near the end: all pixels right, or refused; and refused as soon as pixels hang on what is missing."""
    data = FILES[name]
    wanted = read(data)
    used, said = [], set()
    for cut in range(1, 40):
        try:
            found = read(data[:-cut])
        except InputError as error:
            said.add(str(error).split("/")[-1])
        else:
            np.testing.assert_array_equal(found, wanted)
            used.append(cut)
    assert said <= {f"a.jpg is not an image that can be decoded: a {kind_of(data)} file that ends too early."}
    last = LAST.get(kind_of(data), 0)
    assert set(range(1, last + 1)) <= set(used)
    for share in (0.9, 0.7, 0.5, 0.3):
        with pytest.raises(InputError):
            read(data[: int(len(data) * share)])


def test_motion_photos_and_pictures_of_several(read):
    """The first picture counts; the second one may be broken, or hold markers of both kinds."""
    first, second = FILES["JPEG"], FILES["progressive JPEG"]
    wanted = read(first)
    for behind in (second, second[:-2], second[:400], second[:-2] + b"\0" * 100 + b"\xff\xda", b"\xff" * 1000):
        np.testing.assert_array_equal(read(first + behind), wanted)


def test_a_thumbnail_is_no_end(read):
    segment = b"Exif\0\0" + FILES["grey JPEG"]
    data = b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + FILES["JPEG"][2:]
    assert data.count(b"\xff\xd9") == 2
    np.testing.assert_array_equal(read(data[:-2]), read(data))
    with pytest.raises(InputError, match="ends too early"):
        read(data[:-40])


def test_a_progressive_picture_without_its_last_scans_is_not_whole(read):
    data = FILES["progressive JPEG"]
    scans = [m.start() for m in re.finditer(b"\xff\xda", data)]
    tables = [m.start() for m in re.finditer(b"\xff\xc4", data)]
    for end in scans[1:]:
        begin = max([t for t in tables if t < end and t > scans[0]] or [end])
        for cut in (data[:begin], data[:end]):
            with pytest.raises(InputError, match="ends too early"):
                read(cut)


def test_an_interlaced_png_and_one_with_text_behind(read):
    done, made = cv2.imencode(".png", SCENE[..., ::-1])
    data = made.tobytes()
    assert done
    end = data.index(b"IEND") - 4
    text = struct.pack(">I", 50) + b"tEXt" + b"Comment\0cut here"
    np.testing.assert_array_equal(read(data[:end] + text), SCENE)
    np.testing.assert_array_equal(read(data[:end]), SCENE)


def test_frames_behind_the_first_may_be_cut(read):
    frames = [Image.fromarray(a).convert("P") for a in (SCENE, SCENE[::-1])]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    data = buffer.getvalue()
    np.testing.assert_array_equal(read(data[:-500]), read(data))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + b"\xff\xfe\0\2" * 1_000_000, b"\xff\xd8" + b"\xff" * 20_000_000,
        b"\xff\xd8\xff\xda\0\4\0\0" + b"\xff\0" * 10_000_000,
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt\0\0\0\0" * 1_000_000,
        b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 5_000_000, b"II*\0\x08\0\0\0\xff\xff" + bytes(100),
        b"BM", b"RIFF\xff\xff\xff\xffWEBP", b"GIF8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIDAT",
    ],
    ids=range(11),
)  # fmt: skip
def test_endless_parts_end(data, read):
    """Bounded by how many parts are looked at; the sentence is the same."""
    with pytest.raises(InputError, match="not an image that can be decoded"):
        read(data)
