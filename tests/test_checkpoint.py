"""Reading YOLOv5's format: what is in comes out; whatever else is in runs nothing and is one sentence."""

from __future__ import annotations

import copy
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise

from dsconvert.errors import InputError
from dsconvert.yolo.checkpoint import load_checkpoint, yolov5_bytes
from dsconvert.yolo.network import Head, Network


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_round_trip_to_half_precision(tiny, tmp_path):
    network, head = tiny
    loaded = load_checkpoint(write(tmp_path / "best.pt", yolov5_bytes(network, head, {"date": "today"})))
    wanted, got = network.state_dict(), loaded.network.state_dict()
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name].half(), value.half() if value.is_floating_point() else value)
    assert loaded.head.names == head.names
    assert loaded.head.strides == head.strides
    # anchors are halves in units of the stride: eleven bits
    for a, b in zip(loaded.head.anchors, head.anchors, strict=True):
        assert a == pytest.approx(b, rel=2**-10) if isinstance(a, float) else len(a) == len(b)
    assert loaded.size_bytes == (tmp_path / "best.pt").stat().st_size


def test_file_names_yolov5s_classes_and_can_be_read_by_them(tiny, tmp_path):
    data = yolov5_bytes(*tiny)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stream = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    for name in (b"models.yolo\nDetectionModel", b"models.yolo\nDetect", b"models.common\nC3", b"models.common\nSPPF"):
        assert name in stream
    assert b"dsconvert" not in stream


def test_fused_and_leaky_checkpoints_load(tmp_path, picture):
    network = Network(TINY, 2, 3, "LeakyReLU").eval()
    randomise(network)
    head = Head(("a", "b"), (4, 8), tuple(tuple((4.0, 4.0) for _ in range(3)) for _ in range(2)))
    loaded = load_checkpoint(write(tmp_path / "a.pt", yolov5_bytes(network, head))).network
    assert type(loaded.model[0].act).__name__ == "LeakyReLU"
    data = yolov5_bytes(copy.deepcopy(loaded).fuse(), head)
    fused = load_checkpoint(write(tmp_path / "b.pt", data)).network
    for a, b in zip(loaded.fuse()(picture), fused(picture), strict=True):
        # the fused weights were rounded to float16: eleven bits through 12 layers
        assert torch.allclose(a, b, rtol=0.05, atol=0.05)


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("place", ["model", "ema", "epoch", "top"])
@pytest.mark.parametrize("how", ["system", "eval", "exec", "open"])
def test_code_in_a_checkpoint_never_runs(tmp_path, place, how):
    canary = tmp_path / "canary"
    line = f"open({str(canary)!r}, 'w')"
    payload = {
        "system": Call(os.system, f"touch {canary}"),
        "eval": Call(eval, line),
        "exec": Call(exec, line),
        "open": Call(open, str(canary), "w"),
    }[how]
    content = payload if place == "top" else {"model": None, "ema": None, "epoch": 0, place: payload}
    path = tmp_path / "evil.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match="does not allow, so nothing was loaded"):
        load_checkpoint(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the payload is real: a plain load does run it
    assert canary.exists()


def test_memoised_and_stacked_global_names_are_seen_too(tmp_path):
    """Protocol 4 names globals through the stack; such a file is refused as a whole."""
    canary = tmp_path / "canary"
    path = tmp_path / "evil.pt"
    torch.save({"model": Call(os.system, f"touch {canary}")}, path, pickle_protocol=4)
    with pytest.raises(InputError, match="protocol"):
        load_checkpoint(path)
    assert not canary.exists()


def test_allowed_names_are_inert(tmp_path):
    """A class on the allow-list is a record: its own constructor is never called, here with absurd arguments."""
    path = tmp_path / "c.pt"
    billion = b"J\x00\xca\x9a;"
    stream = b"\x80\x02}X\x05\x00\x00\x00modelctorch.nn.modules.conv\nConv2d\n(" + 3 * billion + b"tRs."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", stream)
        archive.writestr("c/version", "3\n")
        archive.writestr("c/byteorder", "little")
    with pytest.raises(InputError, match="no model"):
        load_checkpoint(path)


def test_damage_is_one_sentence(tiny, tmp_path):
    data = yolov5_bytes(*tiny)
    path = tmp_path / "best.pt"
    for broken in [b"", b"hello", *(data[: len(data) * i // 8] for i in range(1, 8))]:
        with pytest.raises(InputError, match=r"truncated|damaged"):
            load_checkpoint(write(path, broken))
    with pytest.raises(InputError, match="no checkpoint file"):
        load_checkpoint(tmp_path / "none.pt")


def changed(tiny, tmp_path, change) -> Path:
    network, head = tiny
    change(network)
    return write(tmp_path / "best.pt", yolov5_bytes(network, head))


def test_nan_weights_are_refused(tiny, tmp_path):
    def change(network):
        network.model[1].conv.weight.data[0, 0, 0, 0] = float("nan")

    with pytest.raises(InputError, match=r"model.1.conv.weight holds NaN"):
        load_checkpoint(changed(tiny, tmp_path, change))


def repacked(data: bytes, old: bytes, new: bytes) -> bytes:
    """The same archive with its pickle edited."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            target.writestr(info.filename, content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"depth_multiple", b"depth_multipla", "no usable 'depth_multiple'"),
        (b"running_mean", b"running_mien", "does not match its own model yaml"),
        (struct.pack(">d", 0.25), struct.pack(">d", 0.5), "has shape"),  # the yaml's width
    ],
)
def test_weights_that_do_not_fit_the_yaml_are_refused(tiny, tmp_path, old, new, words):
    path = write(tmp_path / "best.pt", repacked(yolov5_bytes(*tiny), old, new))
    with pytest.raises(InputError, match=words):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a.weight": torch.zeros(1)}, "a plain state dict"),
        ([1, 2], "not a YOLOv5 checkpoint dictionary"),
        ({"model": None, "epoch": 3}, "no model"),
    ],
)
def test_other_torch_files_are_named(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ultralytics.nn.tasks\nDetectionModel", "YOLOv8"),
        ("models.yolo\nSegmentationModel", "segmentation"),
        ("models.yolo\nClassificationModel", "classification"),
        ("my.own\nThing\x1b[31m", r"my.own.Thing\?\[31m"),
    ],
)
def test_foreign_models_are_named_for_what_they_are(tmp_path, name, words):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c" + name.encode() + b"\n)\x81.")
    with pytest.raises(InputError, match=words) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "\x1b" not in str(caught.value)


def test_torchscript_is_named(tmp_path):
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "x.pt")
    with pytest.raises(InputError, match="TorchScript"):
        load_checkpoint(tmp_path / "x.pt")


def test_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("x/data/0", b"\0" * (200 << 20))
    with pytest.raises(InputError, match="compressed archive"):
        load_checkpoint(tmp_path / "x.pt")


def test_class_names_lose_control_characters(tiny, tmp_path):
    network, head = tiny
    evil = Head(("ok", "red\x1b[31m\n"), head.strides, head.anchors)
    loaded = load_checkpoint(write(tmp_path / "best.pt", yolov5_bytes(network, evil)))
    assert loaded.head.names == ("ok", "red?[31m?")
