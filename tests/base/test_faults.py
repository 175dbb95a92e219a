"""The machine against us: kills, interrupts, full and read-only disks, little memory, files that vanish.

Whatever happens, a file is whole or not there, what was there before stays, and the user reads one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import stress
import torch
from conftest import HANGS, INTERRUPTED, ROOT, SMALL, randomise, small_network
from pt_writer import yolov5_bytes

from dsconvert import __main__ as entry
from dsconvert.base.errors import InputError, system_fault
from dsconvert.commands import cli
from dsconvert.commands.shared import bars
from dsconvert.convert import exporting
from dsconvert.convert import quantize as pipeline
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.record import save_quantized
from dsconvert.export.weights.layouts import PACKED
from dsconvert.graph.integer import run_integer
from dsconvert.measure.calibration import FEW
from dsconvert.model.file import load_model, model_bytes
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.network import Network, head_from_detect

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with best.pt, four labelled pictures and data.yaml."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "best.pt").write_bytes(yolov5_bytes(*small_network()))
    for kind in ("images", "labels"):
        (folder / kind / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (100, 80))
        cv2.imwrite(str(folder / "images/val" / f"{i}.jpg"), picture)
        (folder / "labels/val" / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    (folder / "data.yaml").write_text("path: .\nval: images/val\nnames: [cat, dog]\n")
    return folder


@pytest.mark.long
def test_killed_at_any_moment_nothing_is_lost(inputs):
    """A bounded share of what benchmarks/stress.py does."""
    script = [sys.executable, str(ROOT / "benchmarks/stress.py"), "--runs", "20", "--imgsz", "64"]
    given = ["--checkpoint", str(inputs / "best.pt"), "--data", str(inputs / "data.yaml")]
    done = subprocess.run([*script, *given], capture_output=True, text=True, timeout=HANGS, env=ENVIRONMENT)
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout)
    assert figures["problems"] == []
    assert done.returncode == 0, done.stderr
    assert sum(figures["runs"].values()) == 22
    assert figures["killed"] >= 10


def test_a_process_is_killed_by_its_own_time():
    """Not by the clock: one that sleeps is left to its end, one that works is ended."""
    for work, wanted in ((lambda: time.sleep(0.3), 0), (lambda: sum(range(10**12)), -signal.SIGKILL)):
        child = os.fork()
        if not child:
            work()
            os._exit(0)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        assert stress.kill_after(child, 0.2) == wanted
        assert (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before > 0.15) == bool(wanted)  # ticks of 10 ms


# --- interrupts -----------------------------------------------------------------------------------------------------


def test_an_interrupt_is_one_word_and_exit_130(inputs, tmp_path):
    """Ctrl-C in the middle of the work: as soon as the command has said its first word."""
    line = [sys.executable, "-m", "dsconvert", "quantize", str(inputs / "best.pt"), "--imgsz", "320", "--samples", "16"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as run:
        assert run.stderr is not None
        assert run.stdout is not None
        assert b"synthesised" in run.stderr.readline()
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        err = run.stderr.read().decode()
        out = run.stdout.read().decode()
        assert run.wait(HANGS) in INTERRUPTED, err
    assert err.splitlines()[-1] == "Error: Interrupted."
    assert "Traceback" not in err
    assert out == ""
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "unfinished.safetensors"] == []


def test_an_interrupt_that_python_made_something_else_of_is_one_word_too(monkeypatch, capsys):
    """Python 3.11 raises RuntimeError where __set_name__ is interrupted, as when a library is imported late."""

    class Interrupted:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    def command(*given, **options):
        type("Late", (), {"field": Interrupted()})

    monkeypatch.setattr(cli.cli.commands["info"], "callback", command)
    with pytest.raises(SystemExit) as end:
        cli.main(["info"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "Error: Interrupted.\n"


def test_an_interrupt_that_a_library_swallows_is_not_lost():
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with bars(quiet=True) as progress:
            progress("fit", 1, 9)
            with contextlib.suppress(BaseException):  # as an import in `try: ... except:` does
                signal.raise_signal(signal.SIGINT)
            progress("fit", 2, 9)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_while_torch_is_loading_is_one_word_too(monkeypatch, capsys):
    class Impatient:
        def find_spec(self, name, path=None, target=None):
            if name == "dsconvert.commands.cli":
                raise KeyboardInterrupt
            return None

    monkeypatch.delitem(sys.modules, "dsconvert.commands.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Impatient(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        entry.run()
    assert end.value.code == 130
    assert capsys.readouterr().err == "Error: Interrupted.\n"


# --- disks ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A disk of that size in memory; skips where mounting is not allowed."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def exported(inputs, call, tmp_path) -> Path:
    """A float model, to be exported again."""
    answer = call("export", inputs / "best.pt", "--onnx", "--imgsz", "64", "--out", tmp_path / "a.onnx", cwd=tmp_path)
    assert answer.code == 0, answer.err
    return tmp_path / "a.onnx"


def test_a_full_disk_keeps_what_was_there(inputs, call, exported, tmp_path):
    with mounted(tmp_path / "disk", "8k") as disk:
        earlier = disk / "a.onnx"
        earlier.write_bytes(b"an earlier result")
        assert exported.stat().st_size > 4 << 10
        for target, force in ((earlier, ["--force"]), (disk / "b.onnx", [])):
            command = ["export", inputs / "best.pt", "--onnx", "--imgsz", "64", "--out", target, *force]
            answer = call(*command, cwd=tmp_path)
            assert answer.code == 2
            assert answer.err == f"Error: {target} cannot be written: No space left on device.\n"
        assert [p.name for p in disk.iterdir()] == ["a.onnx"]
        assert earlier.read_bytes() == b"an earlier result"


def test_a_disk_that_fills_up_while_quantizing_leaves_nothing_half(inputs, call, tmp_path):
    codes = []
    for size in ("4k", "8k", "12k", "64k"):
        with mounted(tmp_path / size, size) as disk:
            command = ["quantize", inputs / "best.pt", "--calib", inputs / "data.yaml", "--imgsz", "64", "--bits", "4"]
            answer = call(*command, "--out", disk / "q", cwd=tmp_path)
            codes.append(answer.code)
            assert "Traceback" not in answer.err
            assert answer.code == 0 or "No space left on device." in answer.err
            for path in (p for p in disk.rglob("*") if p.is_file()):
                assert path.name in ("model.safetensors", "quantize.json", "unfinished.safetensors")
                if path.name == "model.safetensors":
                    load_model(path)
                if path.name == "quantize.json":
                    assert json.loads(path.read_text())["layers"]
    assert codes[0] == codes[1] == 2
    assert codes[-1] == 0


def test_a_read_only_disk_is_known_before_the_work(inputs, call, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "quantize", lambda *_: pytest.fail("the work was begun"))
    with mounted(tmp_path / "disk", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        answer = call("quantize", inputs / "best.pt", "--out", disk / "q", cwd=tmp_path)
        assert answer.code == 2
        assert answer.err.splitlines()[-1] == f"Error: {disk / 'q'} cannot be written: {disk} is read-only."


def test_a_limit_on_file_sizes_is_one_sentence(inputs, call, tmp_path):
    """As a quota would be."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        answer = call("export", inputs / "best.pt", "--onnx", "--imgsz", "64", "--out", "a.onnx", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer.code == 2
    assert answer.err == "Error: a.onnx cannot be written: File too large.\n"
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_can_take_is_one_sentence(inputs):
    """A full disk behind stdout."""
    line = [sys.executable, "-m", "dsconvert", "info", str(inputs / "best.pt")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANGS, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr == "Error: Reading or writing failed: No space left on device.\n"


# --- memory ---------------------------------------------------------------------------------------------------------

LITTLE_MEMORY = """
import re, resource, sys
from dsconvert.commands.cli import main
used = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20),) * 2)
sys.argv = ["dsconvert", *sys.argv[1:]]
main()
"""


def test_too_little_memory_is_one_sentence(inputs, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(FEW):  # with fewer, images would be synthesised first
        shutil.copy(inputs / "images/val/0.jpg", photos / f"{i}.jpg")
    command = ["quantize", str(inputs / "best.pt"), "--calib", str(photos), "--imgsz", "2048"]
    line = [sys.executable, "-c", LITTLE_MEMORY, *command, "--threads", "1", "--out", "q"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, env=ENVIRONMENT)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "Error: There is not enough memory; use fewer --samples or a smaller --imgsz."
    assert [p for p in tmp_path.rglob("*") if p.is_file() and photos not in p.parents] == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(np.uint8)),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("std::bad_alloc"), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        cv2.error("OpenCV(4.9) (-4:Insufficient memory) Failed to allocate 3000 bytes"),
    ],
)  # fmt: skip
def test_every_librarys_word_for_no_memory_is_known(error):
    assert "not enough memory" in (system_fault(error) or "")
    assert system_fault(RuntimeError("shape mismatch")) is None
    assert system_fault(ValueError("bad")) is None


def test_a_network_whose_values_overflow_is_one_sentence(inputs, tmp_path):
    """Every weight is finite, what they compute is not."""
    network = Network(SMALL, nc=2, na=3).eval()
    randomise(network)
    for name, value in network.state_dict().items():
        if name.endswith("bn.weight"):
            value.mul_(50_000)  # the most a half holds is 65504
    (tmp_path / "huge.pt").write_bytes(yolov5_bytes(network, head_from_detect(network.detect, [2], ["cat", "dog"])))
    options = QuantizeOptions(calib=inputs / "data.yaml", imgsz=64, bits=4)
    with pytest.raises(InputError, match=r"The values of layer model\.\S+ are infinite or beyond"):
        pipeline.quantize(load_checkpoint(tmp_path / "huge.pt"), options)


# --- files that vanish ----------------------------------------------------------------------------------------------


def test_a_checkpoint_and_images_may_vanish_once_they_were_read(inputs, tmp_path):
    checkpoint = tmp_path / "best.pt"
    checkpoint.write_bytes((inputs / "best.pt").read_bytes())
    loaded = load_checkpoint(checkpoint)
    checkpoint.unlink()
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (inputs / "images/val").iterdir():
        (photos / path.name).write_bytes(path.read_bytes())

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "images":
            for path in photos.iterdir():
                path.unlink()

    options = QuantizeOptions(calib=photos, imgsz=64, bits=4)
    result = pipeline.quantize(loaded, options, progress=progress)
    (tmp_path / "m.safetensors").write_bytes(model_bytes(result.model))
    assert re.fullmatch("[0-9a-f]{64}", load_model(tmp_path / "m.safetensors").provenance["source_sha256"])


def test_images_that_vanish_before_they_are_read_are_left_out(inputs, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "abcdefgh":
        (photos / f"{name}.jpg").write_bytes((inputs / "images/val/0.jpg").read_bytes())

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "images":  # after the first batch of four
            (photos / "g.jpg").unlink(missing_ok=True)

    loaded = load_checkpoint(inputs / "best.pt")
    result = pipeline.quantize(loaded, QuantizeOptions(calib=photos, imgsz=64, bits=4), progress=progress)
    assert (result.images, result.skipped) == (7, 1)
    assert result.skipped_reason == f"{photos / 'g.jpg'} cannot be read."


def test_a_model_that_vanishes_is_one_sentence(inputs, tmp_path):
    with pytest.raises(InputError, match="There is no checkpoint file"):
        load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(InputError, match="There is no model file"):
        load_model(tmp_path / "gone.safetensors")


# --- networks that are hardly one ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "part"),
    [("dead layer", "model.1.cv1.conv.weight"), ("dead network", "conv.weight"), ("pruned", "bn.weight")],
)
def test_dead_layers_are_converted_and_exported(inputs, tmp_path, what, part):
    """Zero weights, as pruning leaves them: what is left are biases, and those are right."""
    network = Network(SMALL, nc=2, na=3).eval()
    randomise(network)
    for name, value in network.state_dict().items():
        if name.endswith(part):
            value.mul_(torch.arange(len(value)).view(-1, *[1] * (value.dim() - 1)) % 2 if what == "pruned" else 0)
    path = tmp_path / "best.pt"
    path.write_bytes(yolov5_bytes(network, head_from_detect(network.detect, [2], ["cat", "dog"])))
    loaded = load_checkpoint(path)
    result = pipeline.quantize(loaded, QuantizeOptions(calib=inputs / "data.yaml", imgsz=64, bits=4))
    (tmp_path / "m.safetensors").write_bytes(model_bytes(result.model))
    assert exporting.onnx_bytes(tmp_path / "m.safetensors", PACKED, None)  # checked against torch, bounds included
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = loaded.network(image)[0]
    model = result.model
    found = run_integer(model.graph, model.convs, model.activations, image)
    joined = torch.cat([t.unflatten(1, (3, -1)) for t in found], 2).flatten(1, 2)
    assert float((joined - wanted).square().mean()) <= 0.02 * float(wanted.square().mean())  # 4 bits; lost biases: all


def test_a_report_that_a_killed_run_left_is_no_obstacle(inputs, tmp_path):
    loaded = load_checkpoint(inputs / "best.pt")
    result = pipeline.quantize(loaded, QuantizeOptions(calib=inputs / "data.yaml", imgsz=64, bits=4))
    (tmp_path / "quantize.json").write_text("{}")
    written = save_quantized(result, tmp_path, force=False)
    whole = (tmp_path / "quantize.json").read_bytes()
    assert json.loads(whole)["model"] == written.name
    with pytest.raises(InputError, match="already exists"):
        save_quantized(result, tmp_path, force=False)
    assert (tmp_path / "quantize.json").read_bytes() == whole
