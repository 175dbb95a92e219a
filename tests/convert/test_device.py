"""--device in YOLOv5's spellings: one sentence for all others, with and without CUDA."""

from __future__ import annotations

import pytest
import torch

import dsconvert
from dsconvert.base import workers
from dsconvert.base.errors import InputError


@pytest.fixture
def gpus(monkeypatch):
    """Say that CUDA is there, with so many GPUs."""

    def there(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there


NAMES = {"cpu": "cpu", "CPU": "cpu", " cpu ": "cpu", "": "cpu", "None": "cpu", "0": "cuda:0", "1": "cuda:1",
         "cuda:0": "cuda:0", "CUDA:1": "cuda:1", "cuda": "cuda", "00": "cuda:0", "0,": "cuda:0"}  # fmt: skip
NONSENSE = ["gpu", "mps", "cuda:", "cuda:x", "-1", "1.5", "0;1", "meta", "xpu:0", "cuda:-1", "٣", "0 1", "tpu", "cpu,0",
            "cpu:0", "a" * 5000, "0\x1b[31m", "9999"]  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_the_spellings_of_yolov5(gpus, text):
    gpus(2)
    workers.check_device(text)
    assert workers.named_device(text) == NAMES[text]


def test_numbers_and_torchs_own_devices_from_python():
    assert workers.named_device(0) == "cuda:0"
    assert workers.named_device(None) == "cpu"
    assert workers.named_device(torch.device("cuda", 1)) == "cuda:1"


@pytest.mark.parametrize("text", NONSENSE)
@pytest.mark.parametrize("count", [0, 2])
def test_others_are_refused_in_a_sentence(gpus, text, count):
    gpus(count)
    with pytest.raises(InputError, match="is not a device; give cpu, 0") as caught:
        workers.check_device(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("text", "processes"), [("0,1", 2), ("cuda:0,1", 2), ("0, 1,2", 3), ("cuda:0,cuda:1", 2)])
@pytest.mark.parametrize("count", [0, 4])
def test_several_are_refused_with_the_way(gpus, text, processes, count):
    gpus(count)
    with pytest.raises(InputError, match=f"several GPUs.*torchrun --nproc-per-node {processes} -m dsconvert"):
        workers.check_device(text)


@pytest.mark.parametrize(("text", "count", "words"), [
    ("0", 0, "not available"), ("cuda", 0, "not available"), ("cuda:3", 0, "not available"),
    ("1", 1, "this machine has one GPU, device 0"), ("cuda:7", 4, "this machine has 4 GPUs, device 0 to 3"),
])  # fmt: skip
def test_what_the_machine_has_not(gpus, text, count, words):
    gpus(count)
    with pytest.raises(InputError, match=words):
        workers.check_device(text)


def test_a_gpu_of_ones_own_under_torchrun(gpus, monkeypatch):
    gpus(4)
    made = []
    monkeypatch.setattr(workers, "count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "zeros", lambda n, device: made.append(device))
    assert [workers.device(d) for d in ("cuda", "0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert made == ["cuda:1", "cuda:0"]


@pytest.mark.parametrize("text", ["0", "cuda:0", "cuda"])
def test_a_gpu_that_fails_is_one_sentence_in_every_command(work, call, monkeypatch, gpus, text):
    """CUDA says that it is there, and then cannot be used, as with an old driver."""
    gpus(1)

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: the provided PTX was compiled with an unsupported toolchain.\nMore lines")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: broken() if "cuda" in str(k.get("device")) else zeros(*a, **k))
    quantize = ("quantize", "best.pt", "--calib", "images", "--imgsz", "64")
    done = call(*quantize, "--device", text, cwd=work)
    assert done.code == 2
    assert "cannot be used (CUDA error: the provided PTX was compiled with an unsupported toolchain)" in done.err
    assert done.err.count("\n") == 1
    with pytest.raises(dsconvert.InputError, match="cannot be used"):
        dsconvert.quantize(work / "best.pt", work / "images", imgsz=64, device=text)


@pytest.mark.parametrize("command", [("quantize", "best.pt", "--calib", "images", "--imgsz", "64"),
                                     ("finetune", "model.safetensors", "--data", "data.yaml")])  # fmt: skip
@pytest.mark.parametrize(("text", "words"), [("0,1", "torchrun"), ("gpu", "not a device"), ("cuda:x", "not a device")])
def test_both_commands_refuse_alike(work, call, command, text, words):
    (work / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    done = call(*command, "--device", text, cwd=work)
    assert done.code == 2
    assert words in done.err
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1


def test_nothing_named_is_the_cpu_and_said(work, call):
    line = ("quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--bits", "8", "--samples", "1", "--quiet")
    done = call(*line, "--device", "", "--out", "a", cwd=work)
    assert done.code == 0, done.err
    assert "names no device, so the CPU is used; give --device 0 for the first GPU" in done.err
    assert call(*line, "--device", "CPU", "--out", "b", cwd=work).code == 0
    first, second = (dsconvert.load(work / f / "model.safetensors").model for f in "ab")
    assert first.provenance["options"]["device"] == second.provenance["options"]["device"] == "cpu"
