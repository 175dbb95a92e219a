"""What `python -m build` makes is complete: the wheel runs by itself, and the sdist holds what tests and docs need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from conftest import HANGS, ROOT

import dsconvert

SOURCES = (
    "dsconvert", "calib", "docs", "examples", "tests", "benchmarks", "pyproject.toml", "README.md", "LICENSE",
    "Makefile", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "Dockerfile", ".dockerignore", "mkdocs.yml",
    "requirements.lock", "locks", "ops",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with wheel and sdist, built from a copy so that no build/ or egg-info comes into the source tree."""
    pytest.importorskip("build", reason="build is not installed: pip install build")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.onnx"))
        else:
            shutil.copy(source, copy / name)
    # --no-isolation: with this environment's setuptools, as a test should need no package registry
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    found = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "dsconvert", followlinks=True)  # recipes may be a link
        for name in names
        if "__pycache__" not in folder
    }
    assert found == expected


def test_metadata(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = f"dsconvert-{dsconvert.__version__}.dist-info"
        meta = message_from_string(archive.read(f"{info}/METADATA").decode())
        assert "dsconvert = dsconvert.__main__:run" in archive.read(f"{info}/entry_points.txt").decode()
        assert "dsconvert authors" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert meta["Version"] == dsconvert.__version__
    assert meta["License-Expression"] == "MIT"
    assert {"report", "bench", "docs"} <= set(meta.get_all("Provides-Extra"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dsconvert.__version__
    assert citation["license"] == "MIT"
    assert dsconvert.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_runs_by_itself(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import dsconvert; print(dsconvert.__file__); from dsconvert.__main__ import run; run()"
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert Path(first).is_relative_to(tmp_path)
    assert dsconvert.__version__ in second


def test_the_sdist_has_what_tests_and_docs_need(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as stored:
        names = {n.partition("/")[2] for n in stored.getnames()}
    for name in SOURCES:
        path = ROOT / name
        files = (
            [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        )
        missing = {str(p.relative_to(ROOT)) for p in files if p.suffix != ".onnx"} - names
        assert not missing, sorted(missing)[:5]
