"""The locks pin all that pyproject.toml asks for, with hashes. The Makefile, the Dockerfile and the example workflow
install from them; the metadata ask for ranges."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import HANGS, ROOT
from image import instructions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
RUNS = "requirements.lock"
LOCKS = [RUNS, "locks/dev.lock", "locks/bench.lock", "locks/ops.lock", "locks/audit.lock"]


def pinned(lock: str) -> dict[str, Version]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ]+)", (ROOT / lock).read_text(), re.MULTILINE)
    assert len(dict(found)) == len(found)
    return {canonicalize_name(name): Version(version) for name, version in found}


def wanted() -> list[tuple[str, str]]:
    """Each requirement of pyproject.toml, and the lock that must have it when requirements.lock has not."""
    runs = [(RUNS, line) for line in (*PROJECT["project"]["dependencies"], *EXTRAS["report"])]
    extras = {name: [line for line in EXTRAS[name] if not line.startswith("dsconvert[")] for name in EXTRAS}
    assert set(extras) == {"report", "docs", "dev", "bench", "ops", "audit"}
    added = [
        ("locks/dev.lock", line) for line in (*extras["dev"], *extras["docs"], *PROJECT["build-system"]["requires"])
    ]
    return runs + added + [(f"locks/{name}.lock", line) for name in ("bench", "ops", "audit") for line in extras[name]]


@pytest.mark.parametrize(("lock", "line"), wanted())
def test_what_is_asked_for_is_pinned_to_a_version_that_satisfies_it(lock, line):
    needed = Requirement(line)
    pins = pinned(lock) | pinned(RUNS)
    assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), "run make lock"


@pytest.mark.parametrize("line", PROJECT["project"]["dependencies"])
def test_the_metadata_ask_for_a_range(line):
    """A user's environment has versions of its own: from what is tested to the next major version."""
    assert sorted(part.operator for part in Requirement(line).specifier) == ["<", ">="]
    if Requirement(line).name == "torch":
        assert Requirement(line).specifier.contains("2.99")
        assert not Requirement(line).specifier.contains("3.0")


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes_and_nothing_comes_from_elsewhere(lock):
    text = (ROOT / lock).read_text()
    entries = re.split(r"^(?=\S+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pinned(lock)) > (2 if lock == "locks/ops.lock" else 10)
    for entry in entries:
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]
    assert not re.search(r"://|^-|@", text.split("\n", 3)[3], re.MULTILINE)


def test_locks_do_not_contradict_each_other():
    """They are installed on top of each other."""
    pins: dict[str, set[Version]] = {}
    for lock in LOCKS:
        for name, version in pinned(lock).items():
            pins.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}
    # what is installed without hashes, dsconvert itself, is built by a setuptools that has them
    assert "setuptools" in pinned(RUNS)


def installs(text: str) -> list[str]:
    """Every pip install of a script, its lines joined."""
    return re.findall(r"\bpip install\b[^&\n]*", text.replace("\\\n", " "))


def check(found: list[str], own: str) -> None:
    """Packages come by hash; dsconvert itself, called `own`, brings none along."""
    assert any(RUNS in line for line in found)
    for line in found:
        if re.search(rf"{re.escape(own)}$", line.rstrip(" \"'")):
            assert "--no-deps" in line
            assert "--no-build-isolation" in line
        else:
            assert "--require-hashes" in line
            assert re.search(r"(?:-r|--requirement) \S*requirements\.lock", line)


def test_the_makefile_installs_by_hash():
    targets = ["setup", "bench", "ops", "audit"]
    made = subprocess.run(["make", "--always-make", "-n", *targets], cwd=ROOT, capture_output=True, text=True,
                          timeout=HANGS, check=True).stdout  # fmt: skip
    check([line for line in installs(made) if not line.endswith("./ops")], "--editable .")
    check([line for line in installs(made) if "--editable" not in line], "./ops")
    for lock in LOCKS:
        assert lock in made
    assert "build --no-isolation" in (ROOT / "Makefile").read_text()  # else it downloads a setuptools of any kind


def test_the_image_is_built_of_hashes_alone():
    steps = instructions((ROOT / "Dockerfile").read_text())
    check(installs("\n".join(rest for name, rest in steps if name == "RUN")), "/src")
    bases = [rest.split()[0] for name, rest in steps if name == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base) for base in bases)
    assert f"!{RUNS}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_workflow_names_its_actions_by_commit():
    steps = yaml.safe_load((ROOT / "examples/github-action.yml").read_text())["jobs"]["convert"]["steps"]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert len(actions) == 3
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action) for action in actions)
    check(installs("\n".join(step["run"] for step in steps if "run" in step)), "./dsconvert")


@pytest.mark.parametrize("line", ["pip install .", "pip install numpy", "pip install --no-deps --requirement a.txt"])
def test_a_loose_install_is_noticed(line):
    with pytest.raises(AssertionError):
        check([f"pip install --require-hashes -r {RUNS}", line], ".")
