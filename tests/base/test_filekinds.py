"""Files that people take for models: every command says alike what each is and what to do, and reads what it can."""

from __future__ import annotations

import bz2
import gzip
import io
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from archived import edited
from fake_trees import COMMON, YOLO, trained
from importable import importable
from pt_writer import yolov5_bytes
from safetensors.torch import save as safetensors
from tables import SHORT
from torch import nn

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import file_kind
from dsconvert.model.file import model_bytes
from dsconvert.yolo.checkpoint import load_checkpoint

COMMANDS = (
    ("info", "FILE"), ("quantize", "FILE", "--calib", "images"), ("export", "FILE", "--onnx"),
    ("eval", "FILE", "--data", "data.yaml"), ("detect", "FILE", "images"), ("compare", "best.pt", "FILE", "images"),
    ("compare", "FILE", "best.pt", "images"), ("report", "FILE", "--data", "data.yaml"),
    ("finetune", "FILE", "--data", "data.yaml"), ("bench", "FILE"),
)  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 14808437\n"
AGAIN, SOURCE, QUANTIZE = "again", "that it was made from", "dsconvert quantize model.onnx"
OTHERS = {
    "empty": (b"", "empty", AGAIN),
    "zeros": (bytes(5000), "zeros", AGAIN),
    "pointer": (POINTER, "Git LFS pointer", "git lfs pull"),
    "old pointer": (POINTER.replace(b"git-lfs.github.com", b"hawser.github.com"), "Git LFS pointer", "git lfs pull"),
    "page": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>", r"web page \(HTML\)", AGAIN),
    "page after spaces": (b"\xef\xbb\xbf\n  <HTML lang=en><body>404</body>", r"web page \(HTML\)", AGAIN),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML", "ONNX"),
    "json": (b'{"error": "not found"}\n', "JSON", AGAIN),
    "text": (b"0.5 0.5 0.2 0.1\n", "text", r"checkpoint \(\.pt\)"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(90), "TensorFlow Lite", SOURCE),
    "engine": (b"ftrt" + bytes(200), "TensorRT engine", SOURCE),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5", QUANTIZE),
    "darknet": (struct.pack("<iii", 0, 2, 5) + bytes(100) + b"\x12", "Darknet weights", QUANTIZE),
    "gzip": (gzip.compress(b"x" * 99), "gzip", "unpack"),
    "bzip2": (bz2.compress(b"x" * 99), "bzip2", "unpack"),
    "tar": (b"a" + bytes(256) + b"ustar" + bytes(300), "tar archive", "unpack"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(90), "image", "give the model"),
    "npy": (b"\x93NUMPY\x01\0" + bytes(90), "NumPy", r"\.pt"),
}  # fmt: skip


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved(content, **how) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Conv2d(3, 4, 1)), buffer)
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


CHECKPOINTS = {
    "whole module": (lambda: saved(nn.Sequential(nn.Conv2d(3, 4, 1))), r"whole network.*Sequential", QUANTIZE),
    "a module as model": (lambda: saved({"model": nn.Sequential(nn.Conv2d(3, 4, 1))}), "Sequential", QUANTIZE),
    "a module of many": (lambda: saved(nn.DataParallel(nn.Conv2d(3, 4, 1))), "whole network.*Conv2d", QUANTIZE),
    "an unknown layer": (lambda: saved(nn.LSTM(3, 4)), "torch.nn.modules.rnn.LSTM", QUANTIZE),
    "state dict": (lambda: saved(nn.Conv2d(3, 4, 1).state_dict()), "plain state dict", "train.py"),
    "state dict of many": (lambda: saved({"epoch": 3, "state_dict": nn.Linear(2, 2).state_dict()}), "state dict",
                           "train.py"),
    "state dict with more": (lambda: saved({"a.w": torch.ones(2), "b.w": torch.ones(1), "epoch": 1}), "state dict",
                             "train.py"),
    "weights as ema": (lambda: saved({"ema_weights": nn.Linear(2, 2).state_dict(), "lr": 0.1}), "state dict",
                       "train.py"),
    "optimizer": (lambda: saved({"optimizer": torch.optim.SGD([torch.ones(2)], 0.1).state_dict(), "epoch": 4}),
                  "no model but an optimizer's state", "train.py"),
    "no model": (lambda: saved({"model": None, "epoch": 4, "date": "today"}), r"no model.*epoch", "train.py"),
    "tensor": (lambda: saved(torch.ones(3)), "a tensor", "train.py"),
    "list": (lambda: saved([1, 2]), "a list", "train.py"),
    "number": (lambda: saved(3), "a number", "train.py"),
    "TorchScript": (script, "TorchScript export", "checkpoint"),
    "legacy state dict": (lambda: saved(nn.Linear(2, 2).state_dict(), _use_new_zipfile_serialization=False),
                          "plain state dict", "train.py"),
    "zip of a model": (lambda: zipped({"runs/best.pt": b"abc"}), r"it holds runs/best\.pt", "unpack"),
    "zip of photos": (lambda: zipped({"a.jpg": b"abc"}), "zip archive", r"\.pt"),
    "npz": (arrays, "NumPy", r"\.pt"),
    "truncated": (lambda: saved(nn.Linear(9, 9))[:900], "truncated", AGAIN),
}  # fmt: skip


def refused(done, path: str) -> str:
    """The one sentence of a refusal."""
    assert done.code == 2, done.err
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("Error: ")
    assert lines[0].endswith(".")
    assert path in lines[0]
    assert not re.search(r"Record|_Dictionary|Traceback|<class|a_dict|Error\)", lines[0])
    return lines[0]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("file", ["best.pt", "model.onnx", "model.safetensors"])
def test_what_is_no_model_is_named_whatever_its_name(tmp_path, name, file):
    data, what, do = OTHERS[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=f"{file} is not a.* it is .*{what}.*; .*{do}") as caught:
        file_kind(tmp_path / file) if file != "best.pt" else load_checkpoint(tmp_path / file)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize("name", ["pointer", "page", "empty", "tflite"])
@pytest.mark.parametrize("file", ["best.pt", "net.onnx", "model.safetensors"])
def test_every_command_says_the_same_of_it(work, call, name, file):
    data, what, do = OTHERS[name]
    (work / "best.pt").rename(work / "good.pt")
    (work / file).write_bytes(data)
    if file != "best.pt":
        (work / "good.pt").rename(work / "best.pt")
    said = set()
    for command in COMMANDS:
        if "best.pt" in command and file == "best.pt":
            command = tuple(word.replace("best.pt", "good.pt") for word in command)
        said.add(refused(call(*(file if word == "FILE" else word for word in command), cwd=work), file))
    assert len(said) == 1
    assert re.search(f"{what}.*{do}", said.pop())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_torch_wrote_that_is_no_checkpoint_is_named(tmp_path, call, name):
    make, what, do = CHECKPOINTS[name]
    (tmp_path / "x.pth").write_bytes(make())
    said = refused(call("info", "x.pth", cwd=tmp_path), "x.pth")
    assert re.search(f"{what}.*{do}", said), said
    for command in (("quantize", "x.pth"), ("export", "x.pth", "--onnx")):
        assert refused(call(*command, cwd=tmp_path), "x.pth") == said


@pytest.mark.parametrize("file", ["a.pt", "a.PT", "a.pth", "a.ckpt", "a.onnx", "a.pth.tar", "a"])
def test_a_checkpoint_is_one_by_its_content(tiny, tmp_path, call, file):
    (tmp_path / file).write_bytes(yolov5_bytes(*tiny))
    assert file_kind(tmp_path / file) == "pt"
    done = call("info", file, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert '"format": "pt"' in done.out


@pytest.mark.parametrize(
    "names", [("m.safetensors", "n.onnx"), ("m.SAFETENSORS", "n.ONNX"), ("m.pt", "n.pt"), ("m", "n")]
)
def test_converted_models_and_onnx_files_are_known_by_content_too(work, call, converted, names):
    assert call("export", "best.pt", "--onnx", "--imgsz", "64", "--out", names[1], cwd=work).code == 0
    (work / names[0]).write_bytes(model_bytes(converted))
    for name, kind in zip(names, ("safetensors", "onnx"), strict=True):
        assert file_kind(work / name) == kind
        assert f'"format": "{kind}"' in call("info", name, "--json", cwd=work).out
    said = refused(call("finetune", names[1], "--data", "data.yaml", cwd=work), names[1])
    assert "is an ONNX file" in said
    assert "is an ONNX file already" in refused(call("export", names[1], "--onnx", cwd=work), names[1])
    assert "safetensors" in refused(call("quantize", names[0], cwd=work), names[0])
    assert "dsconvert export" in refused(call("bench", names[0], cwd=work), names[0])


def test_a_strangers_safetensors_file_is_named(tmp_path, call):
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": torch.ones(2)}))
    for command in (("info", "FILE"), ("export", "FILE", "--onnx"), ("finetune", "FILE", "--data", "d.yaml")):
        said = refused(call(*("model.safetensors" if w == "FILE" else w for w in command), cwd=tmp_path), "model")
        assert "not one made by dsconvert; give dsconvert quantize" in said


def test_folders_and_missing_files_are_named(work, call):
    (work / "best.pt").unlink()
    (work / "best.pt").mkdir()
    for command in COMMANDS:
        words = [w if w != "FILE" else "best.pt" for w in command]
        assert "is a folder" in refused(call(*words, cwd=work), "best.pt")
        words = [w if w not in ("FILE", "best.pt") else "none.pt" for w in command]
        assert "There is no" in refused(call(*words, cwd=work), "none.pt")


# --- checkpoints in other wrappings ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual() -> bytes:
    """A checkpoint of a stand-in for YOLOv7's tree."""
    config, strides = SHORT["YOLOv7"]
    torch.manual_seed(0)
    return trained(config, strides, lambda model: None, old=True)[0]


def again(data: bytes, change, **how) -> bytes:
    """The checkpoint loaded in its tree, changed, and saved anew."""
    with importable(COMMON, YOLO):
        content = torch.load(io.BytesIO(data), weights_only=False)
        return saved(change(content), **how)


def same(data: bytes, other: bytes, folder: Path) -> None:
    loaded = []
    for name, some in (("a.pt", data), ("b.pt", other)):
        (folder / name).write_bytes(some)
        loaded.append(load_checkpoint(folder / name))
    wanted, found = (m.network.state_dict() for m in loaded)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(v, found[k]) for k, v in wanted.items())
    assert loaded[0].head == loaded[1].head


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def distributed(model: nn.Module) -> nn.Module:
    """As DistributedDataParallel pickles: its own class, the network in `module`."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.__dict__["device_ids"], wrapped.__dict__["dim"] = [0], 0
    wrapped.module = model
    # without a process group torch's own __getstate__ cannot run
    return wrapped


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"],
        lambda c: {**c, "model": parallel(c["model"])},
        lambda c: {**c, "ema": parallel(c["model"]), "model": None},
        lambda c: parallel(c["model"]),
        lambda c: parallel(parallel(c["model"])),
        lambda c: {**c, "optimizer": torch.optim.SGD(c["model"].parameters(), 0.1, momentum=0.9).state_dict()},
        lambda c: {**c, "device": torch.device("cpu"), "kind": torch.float32},
    ],
    ids=["whole", "parallel", "parallel ema", "whole parallel", "parallel twice", "optimizer", "device"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_wrapped_checkpoint_is_the_same_network(usual, tmp_path, change, legacy):
    same(usual, again(usual, change, _use_new_zipfile_serialization=not legacy), tmp_path)


def test_distributed_data_parallel_is_unwrapped(usual, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__getstate__", lambda self: dict(self.__dict__))
    same(usual, again(usual, lambda c: {**c, "model": distributed(c["model"])}), tmp_path)


@pytest.mark.parametrize("prefix", ["yolov5", "yolov7", "src.detection", "third_party.yolov5"])
def test_packages_that_hold_the_tree_are_the_tree(usual, tmp_path, prefix):
    same(usual, edited(usual, b"cmodels.", f"c{prefix}.models.".encode()), tmp_path)


# --- from before PyTorch 1.6 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def legacy(usual) -> bytes:
    with pytest.warns(UserWarning, match="source code"):
        return again(usual, lambda c: c, _use_new_zipfile_serialization=False)


def test_a_legacy_checkpoint_is_read_and_converts(usual, legacy, tmp_path, call):
    same(usual, legacy, tmp_path)
    done = call("export", "b.pt", "--onnx", "--imgsz", "64", cwd=tmp_path)
    assert done.code == 0, done.err


def test_a_legacy_checkpoint_cut_anywhere_is_one_sentence(legacy, tmp_path):
    path = tmp_path / "x.pt"
    for end in (*range(0, 60), *range(60, len(legacy), len(legacy) // 40), *range(len(legacy) - 20, len(legacy))):
        path.write_bytes(legacy[:end])
        with pytest.raises(InputError, match=r"truncated|damaged") as caught:
            load_checkpoint(path)
        assert ". " not in str(caught.value)


def test_a_legacy_checkpoint_with_a_damaged_byte_loads_or_is_refused(legacy, tmp_path):
    path, refusals = tmp_path / "x.pt", 0
    for place in range(0, len(legacy), len(legacy) // 60):
        data = bytearray(legacy)
        data[place] ^= 0xFF
        path.write_bytes(bytes(data))
        try:
            load_checkpoint(path)
        except InputError:
            refusals += 1
    assert refusals > 0


def test_legacy_weights_that_are_not_there_are_not_made(tmp_path):
    """A file of some hundred bytes that declares gigabytes: what it says is held against its size."""
    whole = saved({"model": None, "a.b": torch.ones(3)}, _use_new_zipfile_serialization=False)
    for count in (4, 2, 1 << 40, -1):
        numbers = struct.pack("<q", 3)
        assert whole.count(numbers) == 1
        (tmp_path / "x.pt").write_bytes(whole.replace(numbers, struct.pack("<q", count)))
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(whole.replace(b"K\x03N", b"J\xff\xff\xff\x7fN"))  # the storage's own count
    with pytest.raises(InputError, match="damaged or truncated: it declares larger weights"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("place", range(5))
def test_code_in_any_pickle_of_a_legacy_file_never_runs(tmp_path, place):
    canary = tmp_path / "canary"
    line = f"touch {canary}".encode()
    evil = b"\x80\x02cposix\nsystem\nX" + struct.pack("<I", len(line)) + line + b"\x85R."
    parts = [b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02M\xe9\x03.",
             b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s.", b"\x80\x02}X\x05\x00\x00\x00modelNs.",
             b"\x80\x02]."]  # fmt: skip
    parts[place] = evil
    (tmp_path / "x.pt").write_bytes(b"".join(parts))
    words = ["not a PyTorch checkpoint", "damaged", *3 * ["posix.system, which dsconvert does not allow"]]
    with pytest.raises(InputError, match=words[place]):
        load_checkpoint(tmp_path / "x.pt")
    assert not canary.exists()
