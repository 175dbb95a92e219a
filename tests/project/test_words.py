"""The language of README.md and docs/: short sentences, no spelling mistakes, no private dialect, no doubled words."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
from conftest import HANGS, ROOT
from loaded import load

MOST_LONG = 0.02  # of all sentences
counting = load(ROOT / "docs/sentences.py")


def test_fewer_than_two_in_a_hundred_sentences_are_long():
    found = [s for page in counting.pages() for s in counting.sentences(page.read_text())]
    long = [s for s in found if counting.words(s) > counting.LONG]
    assert len(found) > 1000  # the pages were read
    assert len(long) < MOST_LONG * len(found), long


def test_what_counts_as_a_sentence():
    text = "# A heading. Here.\n\nOne two. Three `a b c` four!\n\n| a. b. |\n|---|\n\n    code. more.\n\n"
    text += "```\nx. y.\n```\n"
    text += "- First item: [five six](a-b.md#c). Seven, e.g. eight\n  nine.\n<!-- no. -->\n1. Ten 0.5 (eleven).\n"
    assert list(counting.sentences(text)) == [
        "One two.", "Three CODE four!", "First item: five six.", "Seven, e.g. eight nine.", "Ten 0.5 (eleven).",
    ]  # fmt: skip
    assert counting.words("One, two - CODE = 3.") == 4


def test_the_code_in_a_list_is_no_sentence():
    text = "1. Do this:\n\n    ```sh\n    dsconvert a. b\n    ```\n\n    Then that.\n\nAnd more:\n\n    code. here.\n"
    assert list(counting.sentences(text)) == ["Do this:", "Then that.", "And more:"]


def test_a_sentence_goes_on_in_a_list_unless_its_items_are_sentences():
    text = "It has:\n\n- one;\n- two,\n    and\n- three. Four\n\nFive if\n1. six.\n\nIt does:\n\n- One. Two:\n"
    text += "    - three\n\n```\nx\n```\n- Four;\n\nFive.\n\nIt is:\n\n    code\n\n- six;\n\n| it |\n|---|\n\n1. seven"
    assert list(counting.sentences(text)) == [
        "It has: one; two, and three.", "Four", "Five if six.", "It does:", "One.", "Two: three", "Four;", "Five.",
        "It is:", "six;", "seven",
    ]  # fmt: skip
    lead = "Here are words that lead into a list of which every item has some more:\n\n"
    (long,) = counting.sentences(lead + "- this item has eight words, without an end;\n" * 2 + "- and so on.")
    assert counting.words(long) > counting.LONG


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 80
    for command in ("make demo", "make test"):
        assert any(line.strip().startswith(command) for line in lines)


DIALECT = re.compile(
    r"\b(what is left of it|what it counts for|that of the one|hang on others|is said by)\b", re.IGNORECASE
)


@pytest.mark.parametrize("page", counting.pages(), ids=lambda p: p.name)
def test_no_page_speaks_a_private_dialect(page):
    assert DIALECT.findall(" ".join(page.read_text().split())) == []


@pytest.mark.parametrize("page", counting.pages(), ids=lambda p: p.name)
def test_no_word_stands_twice_in_a_row(page):
    for sentence in counting.sentences(page.read_text()):
        assert not re.search(r"\b([a-z]+) \1\b", sentence), sentence


def test_the_spell_check_finds_a_mistake_and_nothing_in_the_pages(tmp_path):
    pytest.importorskip("codespell_lib", reason="codespell is not installed: pip install '.[dev]'")
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml")]
    mistake = "Rec" + "ieve"
    (tmp_path / "wrong.md").write_text(f"{mistake} the images.\n")
    found = subprocess.run([*command, tmp_path / "wrong.md"], cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert found.returncode
    assert mistake in found.stdout
    done = subprocess.run([*command, "README.md", "docs"], cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout


def test_lint_checks_spelling_and_style_of_the_same_pages():
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert "codespell" in lint
    assert "proselint" in lint
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["codespell"]
    assert (ROOT / settings["ignore-words"]).exists()
