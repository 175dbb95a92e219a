"""Tell what a file is by its first bytes, by one rule for all commands. Names decide only where bytes do not.

`best.pt`, `best.PT`, `last.pth` and `checkpoint` are the same checkpoint; a web page saved as `best.pt` is a web page.
"""

from __future__ import annotations

import stat
import struct
from pathlib import Path

from dsconvert.base.errors import InputError

HEAD_BYTES = 1024
LEAST_SPARSE, HOLES = 1 << 20, 16  # bytes; a file system that compresses gains less on weights
CHECKPOINT, MODEL, ONNX = "pt", "safetensors", "onnx"
NAMES = {CHECKPOINT: "a PyTorch checkpoint", MODEL: "a safetensors file", ONNX: "an ONNX file"}
_MISSING = {CHECKPOINT: "checkpoint", MODEL: "model", ONNX: "ONNX"}
_SUFFIXES = {".pt": CHECKPOINT, ".pth": CHECKPOINT, ".ckpt": CHECKPOINT, ".safetensors": MODEL, ".onnx": ONNX}
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before PyTorch 1.6 wrote this number first
LFS = (b"version https://git-lfs", b"version https://hawser", b"version http://git-media")
AGAIN = "download or copy it again"
UNPACK = "unpack it and give what is inside"
SOURCE = "give the checkpoint (.pt) or the ONNX file that it was made from"
EXPORTED = "export it to ONNX with the program that made it, then dsconvert quantize model.onnx --calib photos/"


# (offset, bytes, what the file is, what to do)
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (4, b"TFL3", "a TensorFlow Lite model", SOURCE),
    (0, b"ftrt", "a TensorRT engine", SOURCE),
    (0, b"ptrt", "a TensorRT engine", SOURCE),
    (4, b"ET12", "an ExecuTorch program", SOURCE),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them", EXPORTED),
    (0, bytes(4) + b"\x01\0\0\0", "a file of Darknet weights (YOLOv3, YOLOv4)", EXPORTED),
    (0, bytes(4) + b"\x02\0\0\0", "a file of Darknet weights (YOLOv3, YOLOv4)", EXPORTED),
    (0, b"7767517\n", "an ncnn model", SOURCE),
    (0, b"GGUF", "a GGUF file", EXPORTED),
    (0, b"\x93NUMPY", "a NumPy array", "give the checkpoint (.pt) of the network"),
    (0, b"\x89PNG", "an image (PNG)", "give the model here, and images with the command's own option"),
    (0, b"\xff\xd8\xff", "an image (JPEG)", "give the model here, and images with the command's own option"),
    (0, b"\x1f\x8b", "a compressed file (gzip)", UNPACK),
    (0, b"BZh", "a compressed file (bzip2)", UNPACK),
    (0, b"\xfd7zXZ\0", "a compressed file (xz)", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a compressed archive (7z)", UNPACK),
    (0, b"Rar!", "a compressed archive (RAR)", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a compressed file (Zstandard)", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"%PDF", "a PDF document", "give the checkpoint (.pt) of the network"),
    (0, b"\x7fELF", "a program or library", "give the checkpoint (.pt) of the network"),
    (0, b"MZ", "a program or library of Windows", "give the checkpoint (.pt) of the network"),
)  # fmt: skip
# by suffix, for files whose bytes tell nothing
_BY_SUFFIX = {
    ".engine": ("a TensorRT engine", SOURCE), ".plan": ("a TensorRT engine", SOURCE),
    ".trt": ("a TensorRT engine", SOURCE), ".pb": ("a TensorFlow graph", SOURCE),
    ".tflite": ("a TensorFlow Lite model", SOURCE), ".mlmodel": ("a Core ML model", SOURCE),
    ".torchscript": ("a TorchScript export", SOURCE), ".pdparams": ("a Paddle checkpoint", EXPORTED),
    ".pdmodel": ("a Paddle model", EXPORTED), ".pdiparams": ("a Paddle model", EXPORTED),
    ".weights": ("a file of Darknet weights (YOLOv3, YOLOv4)", EXPORTED), ".keras": ("a Keras model", EXPORTED),
    ".bin": ("a file of bare weights, such as OpenVINO's", SOURCE), ".mnn": ("an MNN model", SOURCE),
    ".rknn": ("an RKNN model", SOURCE), ".hef": ("a Hailo program", SOURCE), ".dlc": ("a Qualcomm model", SOURCE),
    ".om": ("an Ascend model", SOURCE), ".param": ("an ncnn model", SOURCE), ".ncnn": ("an ncnn model", SOURCE),
}  # fmt: skip


def file_kind(path: Path, wanted: str | None = None) -> str:
    """Return CHECKPOINT, MODEL or ONNX.

    wanted: the kind that the caller needs; it is named in the error for other files.

    Raises InputError for any other file.
    """
    named = _SUFFIXES.get(path.suffix.lower())
    check_ordinary(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the model file (.pt, .safetensors or .onnx) in it.")
    if not path.is_file():
        if not named:
            raise InputError(f"There is no file at {path}; give a .pt, .safetensors or .onnx file.")
        raise InputError(f"There is no {_MISSING[named]} file at {path}.")
    found = known_kind(path)
    if not found:
        refuse_other(path, named or wanted)
    if not found and not named:
        raise InputError(f"{path} is not a .pt, .safetensors or .onnx file, by name or by content.")
    return found or named or ""


def check_ordinary(path: Path) -> None:
    """Raise InputError for a pipe, a socket or a device, which may never end, and for a file that is mostly holes.

    A file of holes claims gigabytes at no cost. Missing files and folders are left to other checks.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is a pipe or a device, not an ordinary file; give the file itself.")
    held = getattr(status, "st_blocks", 0) * 512  # some systems do not tell
    if status.st_size > LEAST_SPARSE and 0 < held < status.st_size // HOLES:
        raise InputError(
            f"{path} claims {status.st_size / 1e6:.0f} MB but holds only {held / 1e6:.1f} MB, like a broken download; "
            f"{AGAIN}."
        )


def known_kind(path: Path) -> str | None:
    """Return the kind that the first bytes tell, or None. Raises InputError for unreadable files."""
    head, size = _head(path)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or head.startswith(LEGACY_MAGIC[:14]):
        return CHECKPOINT  # `archive` tells which archives are not checkpoints
    if len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= size - 8:
        return MODEL
    if path.suffix.lower() not in _BY_SUFFIX and _is_onnx(head):
        return ONNX
    return None


def refuse_other(path: Path, wanted: str | None) -> None:
    """Raise InputError, saying what the file is and what to do, if its bytes or its name tell.

    wanted: the kind that it should be; None: any.
    """
    noun = NAMES[wanted] if wanted else "a .pt, .safetensors or .onnx file"
    head, size = _head(path)
    found = described(head, path.suffix.lower(), size)
    if found:
        what, do = found
        raise InputError(f"{path} is not {noun}: it is {what}; {do}.")
    other = known_kind(path)
    if other and other != wanted:
        raise InputError(f"{path} is not {noun}: it is {NAMES[other]}; {_WAY[other]}.")


_WAY = {
    CHECKPOINT: "dsconvert quantize takes that, and dsconvert export --onnx writes ONNX",
    MODEL: "dsconvert export --onnx takes one that dsconvert quantize wrote",
    ONNX: "dsconvert quantize takes that with --calib, and eval, detect and bench run it",
}


def described(head: bytes, suffix: str, size: int) -> tuple[str, str] | None:
    """Return what a file of no known model kind is, and what to do, by its first bytes and its suffix."""
    if not size:
        return "empty, truncated by a broken download or a full disk", AGAIN
    if not any(head):
        return "zeros where it should begin, truncated by a broken download or a full disk", AGAIN
    for place, magic, what, do in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return what, do
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(LFS):
        return (
            "a Git LFS pointer, a few lines of text instead of the file",
            "run git lfs pull, or download it again",
        )
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "a web page (HTML) instead of the file", "download it again, by its direct link"
    if text.startswith(b"<"):
        return "XML text, such as OpenVINO's description of a network or a server's error message", SOURCE
    if text.startswith((b"{", b"[")) and _is_text(head):
        return "JSON text, such as a server's error message", AGAIN
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a plain pickle, damaged or not written by torch.save", "save the network with torch.save"
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if _is_text(head):
        return "text", "give the checkpoint (.pt) of the network, or download it again if it was damaged"
    return None


def _head(path: Path) -> tuple[bytes, int]:
    try:
        size = path.stat().st_size
        if not size:  # files of the system have no size, and reading some of them blocks
            return b"", 0
        with path.open("rb") as stream:
            return stream.read(HEAD_BYTES), size
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _is_onnx(head: bytes) -> bool:
    """Return whether a protobuf begins as ONNX's writers do: ir_version, then a name, the graph or the operator
    sets.
    """
    return (
        len(head) > 3 and head[0] == 8 and 1 <= head[1] <= 30 and head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
        text = head[: error.start].decode()
    return all(c.isprintable() or c in "\t\r\n" for c in text)
