"""Ends that are not tracebacks: readers who go, closed streams, partners that stop, images that say nothing."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
from conftest import DEMO, ROOT, write_work

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.commands import cli
from dsconvert.convert.advice import advice
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.record import Quantized
from dsconvert.photos.sameness import warning_of
from dsconvert.scoring.compare import ScoreShift

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
INFO = [sys.executable, "-m", "dsconvert", "info", str(DEMO / "demo.pt")]


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_who_has_gone_is_no_fault(options):
    """As `dsconvert info | head -1`: the reader is gone before anything is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*INFO, *options], stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_fault(closed, tmp_path, call):
    """And no file gets their number, and with it what is printed."""
    target, wanted = tmp_path / "demo.onnx", tmp_path / "wanted.onnx"
    arguments = ["export", str(DEMO / "demo.pt"), "--onnx", "--imgsz", "64", "--out"]
    line = f"exec {sys.executable} -m dsconvert {shlex.join(arguments)} {target} {closed}"
    done = subprocess.run(["sh", "-c", line], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    assert call(*arguments, wanted, cwd=tmp_path).code == 0
    assert target.read_bytes() == wanted.read_bytes()


def test_no_stdout_at_all_is_no_fault(monkeypatch):
    """As of a service, or pythonw."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    cli.main(["info", str(DEMO / "demo.pt")])


# --- foretold damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"target_bytes": 1000}, {"target_drop": 1.0}])
def test_no_foretold_damage_is_no_reason_to_warn(converted, options):
    """BatchNorm weights of 0, biases of 1e4: nothing that a layer does reaches the detections."""
    name = next(n for n, c in converted.convs.items() if c.weight.bits == 4)
    damage = {name: {"4/16": 0.0, "8/16": 0.0}}
    model = replace(converted, provenance={"options": asdict(QuantizeOptions(**options)), "damage": damage})
    result = Quantized(model, 64, 0, 0, 0, dict.fromkeys(converted.convs, 30.0), ScoreShift(0.7, 0.7, 5, 5))
    assert advice(result, 64) == []


# --- images that say nothing ----------------------------------------------------------------------------------------


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 8, 8), dtype=np.uint8)


def filled(value: int) -> np.ndarray:
    """One colour, with grey above and below."""
    made = np.full((3, 8, 8), 114, np.uint8)
    made[:, 2:6] = np.array([value, value // 2, value // 3])[:, None, None]
    return made


def test_black_or_equal_images_are_warned_of():
    black = np.zeros((3, 8, 8), np.uint8)
    assert warning_of([black, black]).startswith("All 2 calibration images are of one colour")
    assert warning_of([filled(20), filled(200), black]).startswith("All 3 calibration images are of one colour")
    assert warning_of([black]).startswith("The one calibration image is of one colour")
    assert warning_of([picture(0)] * 5).startswith("All 5 calibration images are the same picture")
    assert warning_of([picture(0), picture(1)]) == warning_of([picture(0)]) == warning_of([]) == ""
    assert warning_of([black, picture(0)]) == ""


@pytest.mark.parametrize("kind", ["black", "equal"])
def test_the_command_warns_and_goes_on(tiny, tmp_path, call, kind):
    write_work(tmp_path, tiny, 3)
    for i in range(3):
        image = np.zeros((50, 64, 3), np.uint8) if kind == "black" else picture(0).transpose(1, 2, 0)
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), image)
    answer = call("quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--out", "q", cwd=tmp_path)
    assert answer.code == 0, answer.err
    words = "of one colour" if kind == "black" else "the same picture"
    assert f"Warning: All 3 calibration images are {words}" in answer.err
    assert (tmp_path / "q/model.safetensors").is_file()


# --- partners -------------------------------------------------------------------------------------------------------

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT not set: start"),
        ({**TORCHRUN, "RANK": ""}, "RANK not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "-1"}, "not a number"),
        ({"WORLD_SIZE": "9" * 5000}, "not a number"),
        ({**TORCHRUN, "RANK": "2"}, "RANK is 2, which does not go with WORLD_SIZE 2"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x'"),
    ],
)
def test_what_torchrun_does_not_set_is_one_sentence(monkeypatch, settings, words):
    for name in ("WORLD_SIZE", *TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        workers.start()


SCRIPT = """
import os, signal, sys
from dsconvert.base import workers
from dsconvert.commands.cli import main
workers.PATIENCE = 8.0
together, met = workers.gathered, []
def gathered(item):
    met.append(item)
    if workers.number() and len(met) == 2:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return together(item)
workers.gathered = gathered
main(sys.argv[2:])
"""


@pytest.mark.long
@pytest.mark.parametrize("number", ["SIGSTOP", "SIGKILL"])
def test_a_partner_who_stops_does_not_hold_the_other(tiny, tmp_path, number):
    write_work(tmp_path, tiny, 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-c", SCRIPT, number, "quantize", "best.pt", "--calib", "images", "--imgsz", "64",
            "--out", "q", "--threads", "1"]  # fmt: skip
    runs = []
    try:
        for rank in range(2):
            given = {**TORCHRUN, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            run = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, env=ENVIRONMENT | given)
            runs.append(run)
        _, err = runs[0].communicate()
        assert runs[0].returncode == 2, err
        assert err.decode().splitlines()[-1] == (
            "Error: Another process has ended, or was silent for 8 s, so the work cannot go on; look for its "
            "message, and start all processes again."
        )
        assert b"Traceback" not in err
    finally:
        for run in runs:
            run.send_signal(signal.SIGKILL)
            run.wait()
