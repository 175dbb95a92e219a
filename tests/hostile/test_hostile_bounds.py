"""ONNX files of some hundred bytes that ask for gigabytes, or for ever: one sentence, within 2 GiB and 30 s."""

from __future__ import annotations

import gc
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import HANGS, INTERRUPTED, write_pictures
from greedy import ENDLESS, MEMORY, greedy, large_images
from small import ENDLESS_THEN, later
from watched import MOST_BYTES, MOST_SECONDS, dsconvert

from dsconvert.base.errors import InputError
from dsconvert.graph.ir import INPUT, Node
from dsconvert.model.file import model_bytes
from dsconvert.onnxfile import bounds
from dsconvert.onnxfile.bounds import Bounds, enforced, growth, in_time
from dsconvert.onnxfile.engines import session

TOO_MUCH = r"needs over \d+ MB of memory, more than a network of its size should or than this machine has\.$"
COMMANDS = {
    "eval": ["eval", "greedy.onnx", "--data", "images", "--threads", "1"],
    "detect": ["detect", "greedy.onnx", "images"],
    "compare": ["compare", "greedy.onnx", "greedy.onnx", "images"],
    "bench": ["bench", "greedy.onnx", "--threads", "1", "--runs", "2"],
    "quantize": ["quantize", "greedy.onnx", "--calib", "images"],
}


@pytest.fixture
def work(tmp_path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def peak_of(call) -> tuple[int, object]:
    """The most memory that this process held during the call, and what the call returned."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    returned = call()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024, returned


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_to_make_4_gigabytes(work, command):
    (work / "greedy.onnx").write_bytes(greedy(MEMORY["ConstantOfShape"]))
    peak, (code, _, err) = peak_of(lambda: dsconvert(work, *COMMANDS[command]))
    assert code == 2
    assert re.search(TOO_MUCH, err.strip()), err
    assert err.count("\n") == 1
    assert peak < MOST_BYTES


# refused memory for these, the engine itself may crash, by what the process did before: the command tries a file in a
# process of its own first
CRASH = ("a sequence", "outputs of a Loop")


@pytest.mark.parametrize("way", CRASH)
def test_memory_whose_want_may_crash_the_engine_is_refused_by_the_command(work, way):
    (work / "greedy.onnx").write_bytes(greedy(MEMORY[way]))
    code, _, err = dsconvert(work, *COMMANDS["detect"])
    assert code == 2, err
    assert err.count("\n") == 1
    assert err.startswith("Error: greedy.onnx ")


@pytest.mark.parametrize("way", [way for way in MEMORY if way not in CRASH])
def test_every_way_to_ask_for_memory_is_refused(work, way):
    data = greedy(MEMORY[way])
    assert len(data) < 3000

    def run() -> str:
        with enforced(), pytest.raises(InputError) as refused:
            session(data, 1, "greedy.onnx").run(None, {"x": np.zeros((1, 3, 64, 64), np.float32)})
        return str(refused.value)

    peak, said = peak_of(run)
    assert re.fullmatch(f"greedy.onnx {TOO_MUCH}", said), said
    assert peak < MOST_BYTES


def test_what_stays_within_the_bounds_is_not_disturbed():
    """The same kind of file, of 4 kB instead of 4 GB; and no limit is left behind."""
    data = greedy(MEMORY["ConstantOfShape"].replace("1073741824", "1024"))
    x = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    with enforced():
        inside = session(data, 1)
        found = [inside.run(None, {"x": x})[0] for _ in range(3)]
        with growth(64 << 20):
            pass
        large = np.ones(1 << 28, np.uint8)  # 268 MB
    wanted = x.sum(1, keepdims=True).repeat(3, 1).max(3)[:, :, :6] / 8
    for y in found:
        np.testing.assert_allclose(y, wanted, rtol=1e-6)  # sums of three float32 in another order
    assert large.sum() == 1 << 28


def test_the_limit_holds_within_and_ends():
    with growth(64 << 20), pytest.raises(MemoryError):
        np.ones(1 << 28, np.uint8)
    assert np.ones(1 << 28, np.uint8).size == 1 << 28


def test_garbage_is_no_room():
    """A gigabyte that is already thrown away, but not yet collected, is not what a call may use."""

    class Held:
        def __init__(self) -> None:
            self.me, self.data = self, np.empty(1 << 30, np.uint8)

    def collected() -> np.ndarray:
        gc.collect()
        return np.empty(1 << 28, np.uint8)

    gc.disable()
    try:
        Held()
        with growth(64 << 20), pytest.raises(MemoryError):
            collected()
        Held()
        with enforced(), pytest.raises(InputError, match=TOO_MUCH):
            Bounds("a", 0).first(lambda: np.empty(2 << 30, np.uint8))
    finally:
        gc.enable()
        gc.collect()


def test_bounds_grow_with_file_and_image():
    """yolov5x in float32 (347 MB) took 821 MB to load, and 294 MB for an image of 1280 pixels (20 MB)."""
    small, large = Bounds("a", 1000), Bounds("b", 347_000_000)
    assert small.most_bytes(4_915_200) - small.most_bytes(0) == 16 * 4_915_200
    assert large.most_bytes(0) > 2 * 821e6
    assert large.most_bytes(19_660_800) > 821e6 + 294e6
    assert small.most_seconds(4_915_200) < MOST_SECONDS
    assert large.most_seconds(0) > 300


def test_stacks_of_threads_are_no_reason_to_refuse(monkeypatch):
    """128 threads reserve 1 GB of stacks, and use none of it."""
    data, feed = greedy(MEMORY["ConstantOfShape"].replace("1073741824", "1024")), np.zeros((1, 3, 64, 64), np.float32)
    monkeypatch.setattr(bounds.os, "cpu_count", lambda: 128)
    with enforced():
        assert session(data, 128).run(None, {"x": feed})[0].shape == (1, 3, 6)
    assert Bounds("a", 0).most_bytes(0) < 3 << 29  # 1.5 GiB, on any machine


def test_only_those_who_ask_for_bounds_have_them(monkeypatch):
    """A program that uses dsconvert may want its memory for itself."""
    monkeypatch.setattr(bounds, "BASE_BYTES", 16 << 20)
    data, feed = (
        greedy(MEMORY["ConstantOfShape"].replace("1073741824", "67108864")),
        np.zeros((1, 3, 64, 64), np.float32),
    )
    assert session(data, 1).run(None, {"x": feed})[0].shape == (1, 3, 6)  # 268 MB
    with enforced(), pytest.raises(InputError, match="of memory"):
        session(data, 1).run(None, {"x": feed})


def test_what_takes_too_long_is_left():
    end = threading.Event()
    with pytest.raises(TimeoutError):
        in_time(end.wait, 0.05)
    assert bounds.left_running()
    end.set()
    next(t for t in threading.enumerate() if t.name == bounds.THREAD).join()
    assert not bounds.left_running()
    assert in_time(lambda: 5, 60) == 5
    with pytest.raises(KeyError):
        in_time(lambda: {}["a"], 60)


def test_loading_and_the_first_call_share_their_time():
    file = Bounds("greedy.onnx", 0)
    file.spent = file.most_seconds(0)
    end = threading.Event()
    with enforced(), pytest.raises(InputError, match=r"^greedy.onnx takes over 20 s to load and run once"):
        file.first(end.wait)
    end.set()


def test_an_endless_file_ends(work):
    """In a process of its own, with half a second for 20: what runs for ever ends with it."""
    (work / "greedy.onnx").write_bytes(greedy(ENDLESS))
    code = (
        "import sys; from dsconvert.onnxfile import bounds; bounds.BASE_SECONDS = 0.5;"
        "from dsconvert.commands.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *COMMANDS["detect"]]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 2
    assert re.fullmatch(
        r"Error: greedy.onnx takes over \d s to load and run once, more than a network of its size should, so it was "
        r"stopped\.\n", done.stderr,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_a_file_whose_tenth_run_is_endless_ends(work, command):
    """The first runs, of the trial too, are like any other's."""
    (work / "greedy.onnx").write_bytes(later(ENDLESS_THEN))
    code = (
        "import sys; from dsconvert.onnxfile import bounds; bounds.BASE_SECONDS = 2.0;"
        "from dsconvert.commands.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *COMMANDS[command]]
    command[-1] = "20" if command[-2] == "--runs" else command[-1]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"Error: greedy.onnx takes over \d s to run once, more than a network of its size should, so it was "
        r"stopped\.\n", done.stderr,
    ), done.stderr  # fmt: skip


@pytest.mark.long
def test_an_interrupt_ends_the_trial_too(work):
    """The process that tries a file out ends with the one that began it."""
    (work / "greedy.onnx").write_bytes(greedy(ENDLESS))
    code = """
import subprocess, sys
Popen = subprocess.Popen
class Told(Popen):
    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        sys.stdout.write(f"{self.pid}\\n")
        sys.stdout.flush()
subprocess.Popen = Told
from dsconvert.commands.cli import main
main(sys.argv[1:])
"""
    line = [sys.executable, "-c", code, *COMMANDS["detect"]]
    with subprocess.Popen(line, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        child = int(run.stdout.readline())
        run.send_signal(signal.SIGINT)
        assert run.wait(HANGS) in INTERRUPTED, run.stderr.read()
        assert run.stderr.read().splitlines()[-1] == "Error: Interrupted."
    stat = Path(f"/proc/{child}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":  # dead, but nobody asked
        time.sleep(0.05)


def test_an_interrupt_reaches_even_an_endless_file(work):
    """Python does nothing of Ctrl-C while native code runs in its main thread."""
    (work / "greedy.onnx").write_bytes(greedy(ENDLESS))
    code = """
import sys
from dsconvert.scoring import candidates
from dsconvert.onnxfile import bounds
candidates.try_out = lambda *given: None
in_time = bounds.in_time
bounds.in_time = lambda *given: sys.stdout.write("begun\\n") and sys.stdout.flush() or in_time(*given)
from dsconvert.commands.cli import main
main(sys.argv[1:])
"""
    line = [sys.executable, "-c", code, *COMMANDS["detect"]]
    with subprocess.Popen(line, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert [run.stdout.readline() for _ in range(2)] == ["begun\n"] * 2  # loading, and the first image
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        assert run.wait(HANGS) in INTERRUPTED, run.stderr.read()
        assert run.stderr.read().splitlines()[-1] == "Error: Interrupted."


def test_large_images_are_for_those_who_ask_for_them(work):
    for data in large_images():
        (work / "greedy.onnx").write_bytes(data)
        for command in ("bench", "detect", "quantize"):
            peak, (code, _, err) = peak_of(lambda command=command: dsconvert(work, *COMMANDS[command]))
            assert code == 2, command
            assert "--imgsz to run it nevertheless." in err, command
            assert peak < MOST_BYTES


@pytest.mark.parametrize("command", ["eval", "detect", "compare"])
def test_a_model_file_that_unfolds_into_gigabytes(work, converted, command):
    """Bytes of a graph: the image enlarged three times in turn; the last has 201 million numbers."""
    steps = [(8, INPUT, "a"), (8, "a", "b"), (2, "b", "c")]
    more = tuple(Node("upsample", name, (source,), {"scale": scale}) for scale, source, name in steps)
    grown = replace(converted, graph=replace(converted.graph, nodes=(*more, *converted.graph.nodes)))
    (work / "greedy.safetensors").write_bytes(model_bytes(grown))
    given = [a.replace(".onnx", ".safetensors") for a in COMMANDS[command]]
    peak, (code, _, err) = peak_of(lambda: dsconvert(work, *given))
    assert code == 2
    assert re.search(TOO_MUCH, err.strip()), err
    assert peak < MOST_BYTES
