"""The rooms of the product, and that imports go one way."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

PRODUCT = ROOT / "dsconvert"
# what stands later may import what stands earlier: docs/contributing.md has the same
ORDER = (
    "base", "dsconv", "graph", "photos", "onnxfile", "yolo", "fit", "model", "measure", "export", "widths", "scoring",
    "tune", "convert", "report", "torch", "api", "commands",
)  # fmt: skip
ROOMS = 24  # packages at most: more, and nobody has the house in mind
# the package itself hands names of the API on, and the command's start imports what it starts
FACES = {PRODUCT / "__init__.py", PRODUCT / "__main__.py"}


def imported(source: str) -> set[str]:
    """The rooms of dsconvert that a file imports from, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "dsconvert":
            rooms |= {alias.name for alias in node.names if (PRODUCT / alias.name).is_dir()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsconvert."):
            rooms.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dsconvert.")}
    return rooms


def upward(room: str, source: str) -> set[str]:
    """Rooms that stand later than `room`, and that its file imports all the same."""
    return {other for other in imported(source) if ORDER.index(other) > ORDER.index(room)}


@pytest.mark.parametrize("room", ORDER)
def test_no_room_imports_one_that_stands_later(room):
    files = sorted((PRODUCT / room).rglob("*.py"))
    assert files
    assert {f: found for f in files if (found := upward(room, f.read_text()))} == {}


def test_an_upward_import_is_seen_wherever_it_stands():
    assert upward("fit", "def f():\n    from dsconvert.convert.quantize import quantize") == {"convert"}
    assert upward("fit", "from dsconvert import api, __version__") == {"api"}
    assert upward("fit", "import dsconvert.report.page") == {"report"}
    assert upward("fit", "from dsconvert.graph.ir import Node") == set()


def test_every_file_is_in_a_room_and_the_rooms_are_few():
    assert {p for p in PRODUCT.glob("*.py")} == FACES
    packages = [p.parent for p in PRODUCT.rglob("__init__.py") if p.parent != PRODUCT]
    assert {p.relative_to(PRODUCT).parts[0] for p in packages} == set(ORDER)
    assert len(packages) <= ROOMS


def test_the_table_of_folders_stands_in_the_order_of_imports():
    page = (ROOT / "docs" / "contributing.md").read_text()
    named = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `dsconvert/")]
    assert [Path(name).name for name in named] == list(ORDER)


def exists(name: str) -> bool:
    """Whether `room.module` or `room.module.thing` is there."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = PRODUCT.joinpath(*parts[:count])
        if path.with_suffix(".py").is_file() or path.is_dir():
            found: object = importlib.import_module(".".join(("dsconvert", *parts[:count])))
            return all((found := getattr(found, part, None)) is not None for part in parts[count:])
    return False


def test_what_comments_and_docstrings_name_is_there():
    rooms = "|".join(room for room in ORDER if room != "torch")  # that name is another package's, too
    wrong = {
        f"{path.name}: {name}"
        for path in PRODUCT.rglob("*.py")
        for name in re.findall(rf"`(?:dsconvert\.)?((?:{rooms})\.[a-z_][\w.]*)`", path.read_text())
        if not name.endswith(".py") and not exists(name)
    }
    assert wrong == set()
    assert exists("fit.gptq.fit_weight_gptq")
    assert not exists("fit.gptq.fit_layer")
    assert not exists("fit.trellis")


def test_files_are_short_enough_to_be_read():
    long = {p.name: n for p in PRODUCT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
