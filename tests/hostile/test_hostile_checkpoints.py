"""Checkpoints from strangers: nothing runs, memory and time stay small, and the refusal is one sentence."""

from __future__ import annotations

import pickle
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from case import SHARES, Case
from checkpoints import all_cases
from conftest import TINY, randomise
from pickles import END, HEAD, call
from pt_writer import yolov5_bytes
from watched import Result, dsconvert, problems, run_child, unharmed, write_cases

from dsconvert.yolo.network import Network, head_from_detect


@dataclass(frozen=True)
class Corpus:
    """All files or a share, read by one watched process: the cases, cuts of a good file, and the same with a flipped
    bit."""

    good: Path
    canary: Path
    every: list[Case]
    cases: dict[Path, Case]
    cuts: dict[Path, Case]
    flips: list[Path]
    results: list[Result]


@pytest.fixture(scope="module", params=SHARES)
def corpus(tmp_path_factory, request) -> Corpus:
    network = Network(TINY, nc=2, na=3).eval()
    randomise(network)
    folder = tmp_path_factory.mktemp("checkpoints")
    good, canary = folder / "best.pt", folder / "canary"
    good.write_bytes(yolov5_bytes(network, head_from_detect(network.detect, [4, 8], ["cat", "dog"])))
    every = list(all_cases(good, canary))
    untouched = next(case for case in every if case.name == "attention: untouched")
    (folder / "warm.pt").write_bytes(untouched.data)
    cases = write_cases(every[:: request.param], folder / "cases", ".pt")
    whole, rng = good.read_bytes(), random.Random(0)
    # at every 4 KiB boundary, and at every byte of the end
    places = [*range(0, len(whole), 4096), *range(len(whole) - 256, len(whole))]
    words = r"not a PyTorch checkpoint.*truncated"
    cuts = write_cases(
        [Case(f"cut at {n}", whole[:n], words) for n in places[:: request.param]], folder / "cuts", ".pt"
    )
    (folder / "flips").mkdir()
    flips = []
    for index in range(60 // request.param):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        flips.append(folder / f"flips/{index}.pt")
        flips[-1].write_bytes(bytes(data))
    (folder / "evil.pkl").write_bytes(HEAD + call("os.system", "true") + END)
    files = [("checkpoint", p) for p in (*cases, *cuts)] + [("digest", p) for p in (good, *flips)]
    files.append(("plain pickle", folder / "evil.pkl"))
    # torch imports more of itself when it first makes attention
    warm = [("checkpoint", good), ("checkpoint", folder / "warm.pt")]
    return Corpus(good, canary, every, cases, cuts, flips, run_child(warm, files))


def test_every_kind_of_bad_checkpoint(corpus):
    assert len(corpus.every) > 200
    assert len({c.name for c in corpus.every}) == len(corpus.every)
    found = problems(corpus.cases, corpus.results)
    assert not found, found
    assert not corpus.canary.exists()
    there = {p.name for p in corpus.good.parent.rglob("*") if p.is_file()}
    assert there == {p.name for p in (*corpus.cases, *corpus.cuts, *corpus.flips, corpus.good)} | {
        "evil.pkl",
        "warm.pt",
    }


def test_the_payloads_are_real(tmp_path):
    """Plain pickle runs them."""
    for function, argument in (("os.system", f"touch {tmp_path}/a"), ("builtins.eval", f"open('{tmp_path}/b', 'w')")):
        pickle.loads(HEAD + call(function, argument) + END)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_watcher_watches(corpus):
    """A file that does act is seen: plain pickle runs it in the same process."""
    result = corpus.results[-1]
    assert any("os.system" in event for event in result["events"])
    assert unharmed(result, None)


def test_cut_anywhere(corpus):
    found = problems(corpus.cuts, corpus.results)
    assert not found, found


def test_a_flipped_bit_is_noticed_or_changes_nothing(corpus):
    """Every number is under a checksum: what loads after a flip is the very same network."""
    by_file = {r["file"]: r for r in corpus.results}
    same = by_file[str(corpus.good)]["text"]
    results = [by_file[str(p)] for p in corpus.flips]
    for result in results:
        assert not unharmed(result, "" if result["error"] else None), result
        assert result["error"] or result["text"] == same
    assert sum(r["error"] is not None for r in results) > 2 / 3 * len(results)


@pytest.mark.parametrize(
    "name", ["calls os.system", "TorchScript", "2^60 bytes by encoding", "yaml: an escape for a module", "NaN weights"]
)
def test_on_the_command_line_it_is_one_sentence_and_exit_2(corpus, tmp_path, name):
    case = next(c for c in corpus.every if c.name == name)
    (tmp_path / "best.pt").write_bytes(case.data)
    for command in (["info", "best.pt"], ["quantize", "best.pt"], ["export", "best.pt", "--onnx"]):
        code, out, err = dsconvert(tmp_path, *command)
        assert code == 2, err
        assert out == ""
        assert re.fullmatch(r"Error: [^\n]*\.\n", err), err
        assert err[:-1].isprintable()
        assert re.search(case.words, err)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
