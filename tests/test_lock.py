"""requirements.lock pins all that pyproject.toml asks for, with hashes."""

from __future__ import annotations

import re
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = (ROOT / "requirements.lock").read_text()
PINNED = {canonicalize_name(n): Version(v) for n, v in re.findall(r"^([A-Za-z0-9._-]+)==([^ ]+)", LOCK, re.MULTILINE)}


def wanted() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["dev"], *extras["report"]]


@pytest.mark.parametrize("line", wanted())
def test_what_is_asked_for_is_pinned_to_a_version_that_satisfies_it(line):
    needed = Requirement(line)
    assert needed.specifier.contains(PINNED[canonicalize_name(needed.name)]), "run make lock"


def test_every_pin_has_hashes_and_nothing_comes_from_elsewhere():
    entries = re.split(r"^(?=\S+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) == len(PINNED) > 50
    for entry in entries:
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]
    assert not re.search(r"://|^-|@", LOCK.split("\n", 3)[3], re.MULTILINE)
