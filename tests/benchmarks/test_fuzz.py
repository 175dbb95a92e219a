"""A bounded share of benchmarks/fuzz.py: the first cases of every target, which are always the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import HANGS, ROOT

CASES = 15
pytestmark = pytest.mark.long


def test_damaged_files_of_every_kind_end_in_one_sentence_or_load():
    command = [sys.executable, str(ROOT / "benchmarks/fuzz.py"), "--cases", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads(done.stdout)
    cases = figures.pop("cases")
    assert len(figures) >= 19
    assert all(f["bad_cases"] == [] for f in figures.values())
    assert cases == CASES * len(figures)
