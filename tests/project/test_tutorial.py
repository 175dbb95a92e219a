"""docs/tutorial.md does what it says: its blocks are run in order, in a folder of their own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HANGS, ROOT

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block, the content at its own lines of the text."""
    return [(m[1], "\n" * text[: m.start(2)].count("\n") + m[2]) for m in BLOCK.finditer(text)]


def run_python(code: str, names: dict) -> None:
    """As a notebook cell: a last line that is an expression is shown."""
    tree = ast.parse(code)
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.copy_location(ast.Expr(_shown(tree.body[-1].value)), tree.body[-1])
    exec(compile(ast.fix_missing_locations(tree), "docs/tutorial.md", "exec"), names)


def _shown(value: ast.expr) -> ast.expr:
    return ast.Call(ast.Name("print", ast.Load()), [ast.Call(ast.Name("repr", ast.Load()), [value], [])], [])


def run_shell(code: str, folder: Path) -> None:
    """With this interpreter's dsconvert as the command."""
    function = f'dsconvert() {{ "{sys.executable}" -m dsconvert "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euc", function + code], cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_every_block_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "calib").symlink_to(ROOT / "calib")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/tutorial.md").read_text()
    found = blocks(text)
    assert {language for language, _ in found} == {"python", "sh"}
    assert len(found) == text.count("```") / 2  # none that the pattern misses
    names: dict = {}
    threads = torch.get_num_threads()
    for language, code in found:
        if language == "python":
            run_python(code, names)
        else:
            run_shell(code, tmp_path)
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    assert "FloatModel('calib/demo/demo.pt', 6 classes" in shown
    assert "already exists; give force=True" in shown
    assert re.search(r"demo.pt \(converted\) +0\.\d{4}", shown)
    assert re.search(r"points of mAP50-95 lost, [3-8]\.\d times smaller", shown)
    assert "(1, 6300, 11)" in shown
    assert re.search(r"^calib/demo/images/val/0001.jpg: \d+ \w+", shown, re.MULTILINE)
    assert re.search(r"^\w+ 0\.\d\d at \d+, \d+, \d+, \d+$", shown, re.MULTILINE)
    assert names["drawn"].shape == (320, 320, 3)
    assert "Comparison(matched=" in shown
    assert 0.5 < names["agreement"].agreement <= 1
    assert names["rows"][0].map50_95 > 0.5  # the demo detector works, so the table says something
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calib", "small"]
