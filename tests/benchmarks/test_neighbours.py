"""Measuring in processes of their own: what they cost, and that none is left behind, however the measurement ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGS, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from fresh import output_of, peak_of
from neighbours import neighbours

# starts neighbours, or a command, says the numbers of the processes it started, and waits
BESIDE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from neighbours import neighbours
with neighbours(2, 1000) as pids:
    print(*pids, flush=True)
    time.sleep(1000)
"""
COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])
from fresh import peak_of
child = "import os, time; open({0!r}, 'w').write(str(os.getpid()) + chr(10)); time.sleep(1000)".format(sys.argv[2])
peak_of([sys.executable, "-c", child])
"""


def computes(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ticks(pid: int) -> int:
    """Processor time that it used."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


def wait_until(holds) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < HANGS
        time.sleep(0.02)


def test_neighbours_compute_and_end_with_the_measurement():
    with neighbours(2, HANGS) as pids:
        assert len(set(pids)) == 2
        for pid in pids:
            before = ticks(pid)
            assert before > 0  # it computed before anything is measured
            wait_until(lambda pid=pid, before=before: ticks(pid) > before)
    assert not any(computes(pid) for pid in pids)


def test_neighbours_end_with_an_error():
    with pytest.raises(ValueError, match="of the measurement"), neighbours(2, HANGS) as pids:
        raise ValueError("of the measurement")
    assert not any(computes(pid) for pid in pids)


def test_what_was_measured_beside_neighbours_that_ended_is_refused():
    """Each ends after its time, also where nobody stops it."""
    with pytest.raises(SystemExit, match="give it more time"), neighbours(1, 0.5) as (pid,):
        wait_until(lambda: not computes(pid))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_neighbours_end_with_the_process_that_measures(how):
    measuring = subprocess.Popen(
        [sys.executable, "-c", BESIDE, str(ROOT / "benchmarks")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert measuring.stdout is not None
    pids = [int(n) for n in measuring.stdout.readline().split()]
    assert len(pids) == 2
    assert all(computes(pid) for pid in pids)
    measuring.send_signal(how)
    assert measuring.wait(HANGS) != 0
    wait_until(lambda: not any(computes(pid) for pid in pids))
    measuring.stdout.close()


def test_a_measured_command_ends_with_the_process_that_measures(tmp_path):
    note = tmp_path / "pid"
    measuring = subprocess.Popen([sys.executable, "-c", COMMAND, str(ROOT / "benchmarks"), str(note)])
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"))
    pid = int(note.read_text())
    measuring.terminate()
    assert measuring.wait(HANGS) == 128 + signal.SIGTERM
    wait_until(lambda: not computes(pid))


def test_the_peak_is_that_of_the_command():
    """Not what this process holds, and not what the command holds at its end."""
    here = b"x" * (200 << 20)
    held = "x = b'x' * (300 << 20); del x"
    seconds, peak = peak_of([sys.executable, "-I", "-S", "-c", held])
    assert seconds > 0
    assert 300 << 20 <= peak < 400 << 20  # Python itself takes 10 MB
    _, nothing = peak_of([sys.executable, "-I", "-S", "-c", "pass"])
    assert nothing < len(here)


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(SystemExit, match=r"ended with 3: it said so"):
        output_of([sys.executable, "-c", "import sys; sys.stderr.write('a trace\\nit said so\\n'); sys.exit(3)"])
    with pytest.raises(SystemExit, match="ended with 3"):
        peak_of([sys.executable, "-c", "import sys; sys.exit(3)"])
    assert output_of([sys.executable, "-c", "import os; print(os.environ['A'])"], {"A": "of mine"}) == "of mine\n"
    assert "A" not in os.environ
