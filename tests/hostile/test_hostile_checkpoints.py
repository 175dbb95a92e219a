"""Checkpoints from strangers: nothing runs, memory and time stay small, and the refusal is one sentence."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import END, HEAD, Case, all_cases, call
from conftest import TINY, randomise
from watched import run_child, unharmed

from dsconvert.yolo.checkpoint import yolov5_bytes
from dsconvert.yolo.network import Network, head_from_detect


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    network = Network(TINY, nc=2, na=3).eval()
    randomise(network)
    path = tmp_path_factory.mktemp("good") / "best.pt"
    path.write_bytes(yolov5_bytes(network, head_from_detect(network.detect, [4, 8], ["cat", "dog"])))
    return path


@pytest.fixture(scope="module")
def canary(tmp_path_factory) -> Path:
    """What the payloads would write."""
    return tmp_path_factory.mktemp("canary") / "canary"


@pytest.fixture(scope="module")
def cases(good, canary) -> dict[str, Case]:
    found = list(all_cases(good, canary))
    assert len({c.name for c in found}) == len(found)
    return {c.name: c for c in found}


def test_every_kind_of_bad_checkpoint(good, cases, canary, tmp_path):
    words, files = {}, []
    for index, case in enumerate(cases.values()):
        path = tmp_path / f"{index}.pt"
        path.write_bytes(case.data)
        words[str(path)] = case
        files.append(path)
    assert len(files) > 200
    problems = []
    for result in run_child("checkpoint", good, files):
        case = words[result["file"]]
        problems += [f"{case.name}: {p}" for p in unharmed(result, case.words)]
        if case.words is None and result["error"] is None:
            problems += [f"{case.name}: name {n!r}" for n in result["text"] if not n.isprintable() or len(n) > 200]
    assert not problems, "\n".join(problems)
    assert not canary.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in files)


def test_the_payloads_are_real(tmp_path):
    """Plain pickle runs them."""
    for function, argument in (("os.system", f"touch {tmp_path}/a"), ("builtins.eval", f"open('{tmp_path}/b', 'w')")):
        pickle.loads(HEAD + call(function, argument) + END)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_cut_anywhere(good, tmp_path):
    """At every 4 KiB boundary, and at every byte of the end."""
    whole = good.read_bytes()
    cuts = {*range(0, len(whole), 4096), *range(len(whole) - 256, len(whole))}
    files = []
    for cut in sorted(cuts):
        files.append(tmp_path / f"{cut}.pt")
        files[-1].write_bytes(whole[:cut])
    for result in run_child("checkpoint", good, files):
        assert not unharmed(result, "not a PyTorch checkpoint, or it is truncated"), result


def test_a_flipped_bit_is_noticed_or_changes_nothing(good, tmp_path):
    """Every number is under a checksum: what loads after a flip is the very same network."""
    whole, rng = good.read_bytes(), random.Random(0)
    files = []
    for index in range(80):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        files.append(tmp_path / f"{index}.pt")
        files[-1].write_bytes(bytes(data))
    same = next(iter(run_child("digest", good, [good])))["text"]
    refused = 0
    for result in run_child("digest", good, files):
        assert not unharmed(result, "" if result["error"] else None), result
        refused += result["error"] is not None
        assert result["error"] or result["text"] == same
    assert refused > 50


CLI = ("calls os.system", "TorchScript", "yaml: an escape for a module", "NaN weights")


@pytest.mark.parametrize("name", CLI)
def test_on_the_command_line_it_is_one_sentence_and_exit_2(cases, tmp_path, name):
    case = cases[name]
    (tmp_path / "best.pt").write_bytes(case.data)
    command = "quantize" if name == "NaN weights" else "info"
    line = [sys.executable, "-m", "dsconvert", command, "best.pt"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"Error: [^\n]*\.\n", done.stderr), done.stderr
    assert done.stderr[:-1].isprintable()
    assert re.search(case.words, done.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_the_watcher_watches(good, tmp_path):
    """A file that does act is seen: this one is run by plain pickle in the same kind of process."""
    path = tmp_path / "evil.pkl"
    path.write_bytes(HEAD + call("os.system", "true") + END)
    result = json.loads(json.dumps(next(iter(run_child("plain pickle", good, [path])))))
    assert any("os.system" in event for event in result["events"])
    assert unharmed(result, None)
