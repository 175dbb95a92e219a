"""Load bad files in a process of its own, watched: `python child.py` reads a JSON list of [reader, file] from stdin
and prints one JSON line a file.

An audit hook records everything that would let a file act (running, importing, writing, connecting), and the memory
of the process is read after every file. It cannot be taken off again, which is why this is a process."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEEN: list[str] = []
WATCHED = ("os.", "subprocess.", "socket.", "exec", "compile", "import", "ctypes.", "pickle.find_class", "open", "pty.",
           "shutil.", "webbrowser.", "marshal.", "code.", "function.", "urllib.", "ftplib.", "smtplib.")  # fmt: skip
HARMLESS = {"os.listdir", "os.scandir", "os.fwalk", "os.walk", "code.__new__"}


def watch(event: str, args: tuple[Any, ...]) -> None:
    if not event.startswith(WATCHED) or event in HARMLESS:
        return
    if event == "compile" and args[1] == "<unknown>":
        return  # ast.literal_eval parsing a text, which makes no code
    if event == "open":
        _, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (isinstance(mode, str) and set(mode) & set("wax+"))
        if not writes:
            return
    SEEN.append(f"{event} {str(args)[:80]}")


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def readers() -> dict[str, Callable[[Path], Any]]:
    """Everything of dsconvert that reads a stranger's file, by name."""
    from dsconvert.model.file import load_model
    from dsconvert.photos.dataset import calibration_images, read_data_yaml
    from dsconvert.photos.images import read_image
    from dsconvert.photos.labels import read_labels
    from dsconvert.scoring.candidates import load_candidate
    from dsconvert.yolo.checkpoint import load_checkpoint

    def names(path: Path) -> Any:
        return load_checkpoint(path).head.names

    def digest(path: Path) -> str:
        loaded = load_checkpoint(path)
        made = hashlib.sha256(repr(loaded.head).encode())
        for name, value in loaded.network.state_dict().items():
            made.update(name.encode() + value.numpy().tobytes())
        return made.hexdigest()

    def info(path: Path) -> Any:
        from dsconvert.commands.info import info as command

        with contextlib.redirect_stdout(io.StringIO()) as shown:
            command.callback(path, False)
        bad = {c for c in shown.getvalue() if not c.isprintable() and c != "\n"}
        return f"showed {bad}" if bad else ""

    return {
        "checkpoint": names, "model": lambda p: load_model(p).head.names, "yaml": read_data_yaml,
        "labels": lambda p: read_labels(p, 80).shape, "image": lambda p: read_image(p).shape,
        "paths": lambda p: len(calibration_images(p)), "onnx": lambda p: load_candidate(p, None).names, "info": info,
        "digest": digest, "plain pickle": lambda p: None if p.suffix == ".pt" else pickle.loads(p.read_bytes()),
    }  # fmt: skip


def main(warm: list[tuple[str, str]], files: list[tuple[str, str]]) -> None:
    known = readers()
    for reader, file in warm:
        with contextlib.suppress(ValueError):
            known[reader](Path(file))  # imports and caches of the libraries, none of which a bad file may cause
    codecs.lookup("cp437")  # zipfile's, for names without the UTF-8 flag
    sys.addaudithook(watch)
    for reader, file in files:
        SEEN.clear()
        began = time.process_time()
        try:
            found: str | None = None
            value = known[reader](Path(file))
            text = list(value) if isinstance(value, tuple) else str(value)[:200]
        except Exception as error:
            found, text = type(error).__name__, str(error)
        out = {
            "file": file, "error": found, "text": text, "events": list(SEEN), "peak": peak_bytes(),
            "seconds": time.process_time() - began,
        }  # fmt: skip
        sys.stdout.write(json.dumps(out) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    limit = 24 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # a last net under the machine; the tests demand far less
    main(*json.load(sys.stdin))
