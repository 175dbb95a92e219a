"""A bounded share of benchmarks/soak.py, and that it would notice a leak."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import HANGS, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import soak


def test_the_rise_is_that_of_the_second_half():
    assert soak.rise([900.0, 1.0, 5.0, 5.0, 5.0, 5.0]) == pytest.approx(0, abs=1e-9)
    assert soak.rise([0.0, 0.0, 0.0, 1.0, 2.0, 3.0]) == pytest.approx(2)


@pytest.mark.long
def test_memory_stays_flat():
    """Keeping one decoded picture of 160 pixels an image (0.3 MB as floats) would be 46 MB over the second half; the
    allocator's own unrest is a few MB."""
    command = [sys.executable, str(ROOT / "benchmarks/soak.py"), "--images", "300", "--most", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) == {"evaluate", "detect"}
    assert all(f["images"] == 300 and f["results"] == 1 for f in figures.values())
