"""Every test is run by somebody: the tiers of the Makefile, what they pick, and that no clock is in the way."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

from conftest import HANGS, ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
AREAS = ("dsconv", "graph", "fit", "export")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "dsconvert").rglob("*.py")
}


def command(target: str) -> str:
    """The pytest command of a target of the Makefile, which is not run."""
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=True)
    (line,) = [line for line in shown.stdout.splitlines() if re.match(r"\S+/pytest ", line)]
    return line


def picked(line: str) -> tuple[str, list[Path]]:
    """The expression of markers and the files of a pytest command."""
    (expression,) = re.findall(r"-m ('[^']*'|\S+)", line)
    return expression.strip("'"), [ROOT / name for name in re.findall(r"\btests/\S+", line)]


def defined(path: Path) -> list[str]:
    return [node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]  # fmt: skip


def imported(paths: list[Path]) -> set[str]:
    """Modules of dsconvert that these files import themselves."""
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
            elif isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
    return found


def test_each_test_is_in_exactly_one_of_test_and_test_all():
    """They differ in the marker alone and name no files: whatever pytest finds below tests/ is in one of them."""
    assert picked(command("test")) == ("not long", [])
    assert picked(command("test-all")) == ("long", [])
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
    assert [marker.partition(":")[0] for marker in settings["markers"]] == ["long"]
    assert "--strict-markers" in settings["addopts"]  # a marker that is misspelt would put a test into the wrong tier


def test_every_file_that_has_tests_is_found_by_its_name():
    with_tests = [path for path in FILES if defined(path)]
    assert len(with_tests) > 90
    assert [path for path in with_tests if not path.name.startswith("test_")] == []
    assert [path for path in FILES if path.name.startswith("test_") and not defined(path)] == []


def test_check_is_a_part_of_test_and_covers_its_four_areas():
    expression, files = picked(command("check"))
    assert expression == "not long"
    files = [path for folder in files for path in sorted(folder.glob("test_*.py"))]
    assert set(files) <= set(FILES)
    of_the_areas = {
        n for n, path in MODULES.items() if n.split(".")[1:2] in [[a] for a in AREAS] and path.stem != "__init__"
    }
    assert len(of_the_areas) > 40
    reached: set[str] = set()
    new = imported(files) & set(MODULES)
    while new:
        reached |= new
        new = (imported([MODULES[name] for name in new]) & set(MODULES)) - reached
    assert sorted(of_the_areas - reached) == []


def test_ci_runs_both_and_help_names_all():
    called = re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert called == ["test", "test-all"]
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=True).stdout
    page = (ROOT / "docs/contributing.md").read_text()
    for target in ("check", "test", "test-all"):
        assert re.search(rf"^make {target} ", shown, re.MULTILINE)
        assert f"`make {target}`" in page


def test_no_clock_decides():
    """A busy machine is no failure: whatever a test waits for, it waits for as long as HANGS says."""
    limited = re.compile(r"(?:timeout=|\.wait\(|\.join\(|WebDriverWait\(\w+, )(\d+)")
    assert limited.findall("subprocess.run(line, timeout=300); run.wait(60)") == ["300", "60"]  # timeout=HANGS is none
    assert {path.name: limited.findall(path.read_text()) for path in FILES if path != Path(__file__)} == {
        path.name: [] for path in FILES if path != Path(__file__)
    }
