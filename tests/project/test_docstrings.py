"""The words of the product's code and help: short sentences in docstrings, comments and help texts, in plain words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import click
import pytest
from conftest import ROOT
from loaded import load

from dsconvert.commands.cli import cli

counting = load(ROOT / "docs/sentences.py")
MOST_LONG = 0.01  # of all sentences
FILES = sorted((ROOT / "dsconvert").rglob("*.py"))
ARGUMENT = re.compile(r"[\w*]+(, [\w*]+)*: ")
# Phrases that only the authors understood.
DIALECT = re.compile(
    r"\b(what it counts for|hangs? on others|what is left of (it|them)|with what each of them is|values wait|"
    r"lets? expect|that of least squares|nobody says|hand(s|ed)? on\b|along a trellis what|who means it|is said by)\b",
    re.IGNORECASE,
)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a docstring, each on one line. An argument begins a new one; equations are none."""
    found: list[str] = []
    for line in [*text.splitlines(), ""]:
        begins = bool(ARGUMENT.match(line))
        equation = line.startswith("    ") and not (found and ARGUMENT.match(found[0]))
        if found and (begins or equation or not line.strip()):
            yield " ".join(found)
            found = []
        if line.strip() and not equation:
            found.append(line.strip())


def sentences(text: str) -> list[str]:
    """The sentences of a docstring, comment or help text; code between back quotes is one word."""
    return [s for p in paragraphs(text) for s in counting.END.split(re.sub(r"`[^`]+`", "CODE", p))]


def docstrings(source: str) -> Iterator[str]:
    """Every docstring of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield text.split("\b")[0]  # a command's examples follow it


def comments(source: str) -> Iterator[str]:
    """Every comment of a file; one of several lines is one text."""
    follows, found = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"# (fmt|noqa|type)\b", token.string):
            continue
        row, trailing = token.start[0], bool(token.line[: token.start[1]].strip())
        if found and (row != follows or trailing):
            yield " ".join(found)
            found = []
        found.append(token.string.lstrip("# "))
        follows = 0 if trailing else row + 1
    if found:
        yield " ".join(found)


def helps(command: click.Command) -> Iterator[str]:
    """The help of a command's options, and of its own commands'."""
    yield from (p.help for p in command.params if isinstance(p, click.Option) and p.help)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from helps(inner)


def texts() -> Iterator[str]:
    """All that is checked."""
    for file in FILES:
        source = file.read_text()
        yield from docstrings(source)
        yield from comments(source)
    yield from helps(cli)


def test_hardly_any_sentence_is_long():
    found = [s for text in texts() for s in sentences(text)]
    long = [s for s in found if counting.words(s) > counting.LONG]
    assert len(found) > 4000  # the files were read
    assert len(long) < MOST_LONG * len(found), long


def test_what_counts_as_a_sentence():
    text = "Return `a b c` twice.\n\nIt has, e.g.\nthis.\n\n    x = y. z\n\nfirst: one. Two\n    three.\nsecond: four."
    assert sentences(text) == ["Return CODE twice.", "It has, e.g. this.", "first: one.", "Two three.", "second: four."]
    source = '"""A. B."""\nx = 1  # C.\n# D\n# e.\n\n# fmt: skip\ndef f():\n    """F.\n\n    \b\n    $ g h"""\n'
    assert [t.strip() for t in docstrings(source)] == ["A. B.", "F."]
    assert list(comments(source)) == ["C.", "D e."]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "dsconvert")))
def test_no_file_speaks_a_private_dialect(file):
    assert [m[0] for m in DIALECT.finditer(" ".join(file.read_text().split()))] == []
