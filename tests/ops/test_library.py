"""The library of `ops/`, built from source: needs cmake and a C compiler. The test of its header needs ONNX Runtime's
too, whose folder DSCONVERT_ORT_HEADERS names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, ROOT

HEADERS = os.environ.get("DSCONVERT_ORT_HEADERS")
CC = next((name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and shutil.which(name)), None)
compiles = pytest.mark.skipif(not (CC and shutil.which("cmake")), reason="there is no C compiler, or no cmake")


def said(*words: object, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=HANGS, check=False, **how)


@compiles
@pytest.mark.long
def test_no_kernel_touches_memory_that_is_not_its_own(tmp_path):
    """By the address sanitizer, at every length up to 700 bytes."""
    done = said("cmake", "-S", ROOT / "ops", "-B", tmp_path, "-DSANITIZE=ON", "-DEXACT=ON")
    assert done.returncode == 0, done.stderr
    done = said("cmake", "--build", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    done = said(tmp_path / "exact")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("exact\n")


@compiles
@pytest.mark.long
def test_the_operator_touches_no_memory_that_is_not_its_own(tmp_path):
    """All tests of test_lookup.py in ONNX Runtime, with the library built for the address sanitizer."""
    sanitizers = [said(CC, f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libubsan.so")]
    if not all(Path(name).is_absolute() for name in sanitizers):
        pytest.skip("this compiler has no sanitizers that can be loaded")
    done = said("cmake", "-S", ROOT / "ops", "-B", tmp_path / "build", "-DSANITIZE=ON")
    assert done.returncode == 0, done.stderr
    done = said("cmake", "--build", tmp_path / "build")
    assert done.returncode == 0, done.stdout + done.stderr
    package = tmp_path / "site/dsconvert_ops"
    shutil.copytree(ROOT / "ops/dsconvert_ops", package)
    shutil.copy(next((tmp_path / "build").glob("libdsconvert_ops.*")), package)
    environment = {
        **os.environ, "LD_PRELOAD": " ".join(sanitizers), "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join((str(package.parent), os.environ["PYTHONPATH"])),
    }  # fmt: skip
    done = said(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", ROOT / "tests/ops/test_lookup.py",
                env=environment, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@compiles
@pytest.mark.skipif(not HEADERS, reason="DSCONVERT_ORT_HEADERS is not set")
def test_our_words_for_the_interface_are_its_own():
    done = said(CC, "-std=gnu11", "-fsyntax-only", "-Wall", f"-I{Path(str(HEADERS)).resolve()}",
                ROOT / "ops/tests/same_places.c")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_header_is_checked_in_every_place_that_it_names():
    """`same_places.c` knows each number of `ort.h`."""
    header, checked = ((ROOT / "ops" / name).read_text() for name in ("src/ort.h", "tests/same_places.c"))
    for line in header.splitlines():
        if "CALL(api, " in line or "FREE(api, " in line:
            number = line.split("CALL(api, ")[-1].split("FREE(api, ")[-1].split(",")[0]
            assert not number.isdigit() or f"PLACE({number}, " in checked, line
