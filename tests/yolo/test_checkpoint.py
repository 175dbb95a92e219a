"""Reading YOLOv5's format: what is in comes out; whatever else is in runs nothing and is one sentence."""

from __future__ import annotations

import copy
import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from archived import edited
from conftest import TINY, randomise
from pt_writer import yolov5_bytes

from dsconvert.base.errors import InputError
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.network import Head, Network, head_from_detect


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_round_trip_to_half_precision(tiny, tmp_path):
    network, head = tiny
    loaded = load_checkpoint(write(tmp_path / "best.pt", yolov5_bytes(network, head, {"date": "today"})))
    wanted, got = network.state_dict(), loaded.network.state_dict()
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        kept = value.half().float() if value.is_floating_point() else value
        assert got[name].dtype == kept.dtype
        assert torch.equal(got[name], kept), name
    # anchors are kept as halves in units of the stride; their product with it is exact in float64
    assert loaded.head == head_from_detect(copy.deepcopy(network).half().detect, head.strides, head.names)
    assert (loaded.path, loaded.stored_bits) == (tmp_path / "best.pt", 16)
    assert not loaded.network.training
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
    data = yolov5_bytes(loaded.fused(), head)
    fused = load_checkpoint(write(tmp_path / "b.pt", data)).network
    for a, b in zip(loaded.fused()(picture), fused(picture), strict=True):
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


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"depth_multiple", b"depth_multipla", "no usable 'depth_multiple'"),
        (b"running_mean", b"running_mien", "does not match its own model yaml"),
        (struct.pack(">d", 0.25), struct.pack(">d", 0.5), "has shape"),  # the yaml's width
    ],
)
def test_weights_that_do_not_fit_the_yaml_are_refused(tiny, tmp_path, old, new, words):
    path = write(tmp_path / "best.pt", edited(yolov5_bytes(*tiny), old, new))
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
        ("models.yolo\nClassificationModel", "classification"),
        ("my.own\nThing\x1b[31m", r"my.own.Thing\\x1b\[31m"),
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
    assert loaded.head.names == ("ok", "red\\x1b[31m\\x0a")


def small_config() -> dict:
    """The least that is a detector: one convolution before a single Detect level."""
    return {
        "nc": 1, "depth_multiple": 1.0, "width_multiple": 1.0,
        "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip


def test_a_loaded_checkpoint_written_again_is_the_same_checkpoint(tiny, tmp_path):
    """Halves are halves: the second round trip changes nothing at all."""
    first = load_checkpoint(write(tmp_path / "a.pt", yolov5_bytes(*tiny)))
    second = load_checkpoint(write(tmp_path / "b.pt", yolov5_bytes(first.network, first.head)))
    wanted, got = first.network.state_dict(), second.network.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert second.head == first.head
    assert second.network.config == first.network.config


def test_a_one_layer_detector_keeps_its_numbers(tmp_path):
    network = Network(small_config(), nc=1, na=2).eval()
    randomise(network, seed=3)
    network.detect.anchors.copy_(torch.tensor([[[1.5, 2.0], [4.25, 8.0]]]))  # binary fractions: exact halves
    weight = network.model[0].conv.weight.detach().clone()
    head = head_from_detect(network.detect, [2], ["thing"])
    loaded = load_checkpoint(write(tmp_path / "a.pt", yolov5_bytes(network, head)))
    assert loaded.head == Head(("thing",), (2,), (((3.0, 4.0), (8.5, 16.0)),))
    assert torch.equal(loaded.network.model[0].conv.weight, weight.half().float())


def test_a_fused_checkpoint_has_no_batchnorm_and_exactly_its_weights(tiny, tmp_path):
    network, head = tiny[0].fused(), tiny[1]
    loaded = load_checkpoint(write(tmp_path / "fused.pt", yolov5_bytes(network, head))).network
    wanted, got = network.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    assert not any(".bn." in name for name in got)
    for name, value in wanted.items():
        assert torch.equal(got[name], value.half().float() if value.is_floating_point() else value), name


def test_what_a_batchnorm_adds_to_its_variance_is_read(tiny, tmp_path, picture):
    network, head = copy.deepcopy(tiny[0]), tiny[1]
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for place, norm in enumerate(norms):
        norm.eps = 1e-5 + 0.01 * place
    loaded = load_checkpoint(write(tmp_path / "a.pt", yolov5_bytes(network, head))).network
    assert [m.eps for m in loaded.modules() if isinstance(m, torch.nn.BatchNorm2d)] == [n.eps for n in norms]
    usual = copy.deepcopy(loaded)
    for norm in (m for m in usual.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.eps = 1e-3
    assert not torch.allclose(loaded.fused()(picture)[0], usual.fused()(picture)[0], atol=1e-3)
    norms[0].eps = -1e-3
    assert "adds -0.001 to its variances" in one_sentence(write(tmp_path / "b.pt", yolov5_bytes(network, head)))


def test_the_average_weights_are_preferred(tiny, tmp_path):
    """Training checkpoints hold `model` and `ema`; YOLOv5 itself takes the second."""
    network, head = tiny
    empty, key = b"cmodels.yolo\nDetectionModel\n)\x81", b"X\x03\x00\x00\x00em"
    # the model becomes `ema`, an empty record (which could not be loaded) `model`, the old empty `ema` something else
    data = edited(yolov5_bytes(network, head), key + b"a", key + b"b")
    data = edited(data, b"modelq\x02", b"modelq\x02" + empty + key + b"a")
    loaded = load_checkpoint(write(tmp_path / "ema.pt", data))
    assert torch.equal(loaded.network.model[0].conv.weight, network.model[0].conv.weight.half().float())
    message = one_sentence(write(tmp_path / "model.pt", edited(data, key + b"a", key + b"c")))
    assert "no yaml or no weights" in message  # without `ema` the empty record is what is left


def one_sentence(path: Path) -> str:
    """Load, expect an InputError of exactly one printable sentence, return it."""
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.endswith(".")
    assert message.isprintable()
    assert ". " not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # no second traceback
    return message


def test_every_unusable_file_is_one_sentence(tiny, tmp_path):
    network, head = tiny
    whole = yolov5_bytes(network, head)
    files = {
        "empty": b"",
        "text": b"These are not weights.\nNor is this.\n",
        "pickle without torch": pickle.dumps({"model": 1}),
        "nothing in a zip": b"PK\x05\x06" + bytes(18),
        "no end": whole[:-1],
        "middle gone": whole[: len(whole) // 3] + whole[len(whole) // 3 + 1000 :],
        **{f"first {n} bytes": whole[:n] for n in (1, 4, 30, 1000, len(whole) // 2, len(whole) - 22)},
    }
    for name, data in files.items():
        path = write(tmp_path / "x.pt", data)
        assert str(path) in one_sentence(path), name
    assert str(tmp_path / "gone.pt") in one_sentence(tmp_path / "gone.pt")
    assert str(tmp_path) in one_sentence(tmp_path)  # a folder
    load_checkpoint(write(tmp_path / "x.pt", whole))  # the file they were made of is usable


def test_one_flipped_byte_is_refused_or_harmless(tiny, tmp_path):
    """Wherever a byte is damaged, the file loads or is refused by an InputError: never another exception."""
    whole = yolov5_bytes(*tiny)
    refused = 0
    for place in range(0, len(whole), len(whole) // 60):
        data = bytearray(whole)
        data[place] ^= 0xFF
        try:
            load_checkpoint(write(tmp_path / "x.pt", bytes(data)))
        except InputError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e6])
@pytest.mark.parametrize("name", ["model.1.conv.weight", "model.1.bn.running_var", "model.8.anchors"])
def test_no_tensor_may_hold_what_is_not_finite(tiny, tmp_path, name, value):
    """1e6 is finite in float32 and infinite in the file's float16."""
    network, head = tiny
    network.state_dict()[name].view(-1)[-1] = value
    message = one_sentence(write(tmp_path / "best.pt", yolov5_bytes(network, head)))
    assert f"{name} holds NaN or infinite numbers" in message


def test_a_weight_of_another_shape_is_named_with_both_shapes(tiny, tmp_path):
    network, head = tiny
    conv = network.model[1].conv
    conv.weight = torch.nn.Parameter(conv.weight[:, :, :2].clone(), requires_grad=False)
    message = one_sentence(write(tmp_path / "best.pt", yolov5_bytes(network, head)))
    assert "model.1.conv.weight has shape (16, 8, 2, 3) where its yaml needs (16, 8, 3, 3)" in message


def test_a_missing_and_an_unexpected_tensor_are_counted_and_named(tiny, tmp_path):
    network, head = tiny
    del network.model[1].bn._buffers["running_mean"]
    network.model[1].bn._buffers["more"] = torch.zeros(1)
    message = one_sentence(write(tmp_path / "best.pt", yolov5_bytes(network, head)))
    assert "1 tensors missing (model.1.bn.running_mean), 1 unexpected (model.1.bn.more)" in message


@pytest.mark.parametrize("module", [b"posix\nsystem", b"os\nsystem", b"nt\nsystem", b"subprocess\nPopen"])
@pytest.mark.parametrize("opcode", ["GLOBAL", "INST"])
def test_hand_written_calls_of_the_system_never_run(tmp_path, module, opcode):
    """No pickler's own words: the two opcodes that name a function, spelled byte by byte."""
    canary = tmp_path / "canary"
    command = f"touch {canary}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    call = b"(" + text + b"i" + module + b"\n" if opcode == "INST" else b"c" + module + b"\n" + text + b"\x85R"
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + call + b".")
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    assert module.replace(b"\n", b".").decode() in one_sentence(path)
    assert not canary.exists()
    if module == b"posix\nsystem":
        pickle.loads(b"\x80\x02" + call + b".")  # the payload is real: plain pickle does run it
        assert canary.exists()


def test_a_bare_pickle_never_runs(tmp_path):
    """Before its zip format torch wrote plain pickles; those are not even opened."""
    canary = tmp_path / "canary"
    payload = {"model": Call(os.system, f"touch {canary}")}
    path = tmp_path / "x.pt"
    torch.save(payload, path, _use_new_zipfile_serialization=False)
    one_sentence(path)
    one_sentence(write(path, pickle.dumps(payload)))
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # the payload is real
    assert canary.exists()


def test_a_second_pickle_hidden_in_the_archive_never_runs(tiny, tmp_path):
    """A file of the same name twice: what was checked must be what is loaded."""
    canary = tmp_path / "canary"
    buffer = io.BytesIO()
    torch.save({"model": Call(os.system, f"touch {canary}")}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        evil = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    for name in ("archive/data.pkl", "other/data.pkl", "archive/../archive/data.pkl"):
        path = write(tmp_path / "x.pt", yolov5_bytes(*tiny))
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # zipfile warns of the duplicate we mean to write
            archive.writestr(name, evil)
        assert "not a PyTorch checkpoint" in one_sentence(path)
        assert not canary.exists()


def test_an_archive_that_looks_like_torchscript_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/constants.pkl", b"\x80\x02).")
        archive.writestr("x/code/__torch__.py", "")
    assert "TorchScript" in one_sentence(tmp_path / "x.pt")


def test_a_state_dict_of_the_right_network_is_still_no_checkpoint(tiny, tmp_path):
    torch.save(tiny[0].state_dict(), tmp_path / "x.pt")
    assert "a plain state dict" in one_sentence(tmp_path / "x.pt")


def test_writing_leaves_no_modules_behind(tiny):
    yolov5_bytes(*tiny)
    assert not [name for name in sys.modules if name.split(".")[0] == "models"]
