"""Count the sentences of Markdown pages by their words, or draw passages to read.

    python docs/sentences.py [PAGE ...]        list the long sentences and their share
    python docs/sentences.py --draw 10 --seed 27        print ten passages drawn at random

A long sentence has more than LONG words. Code blocks, tables, headings, comments and the targets of links are left
out. A span of code counts as one word, as it is read as one. A sentence that leads into a list goes on in its items,
unless the items are sentences of their own.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

LONG = 30
SHORTEST = 20  # words of a passage that is drawn
ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"^([ ]*)```.*?^\1```[ ]*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")
# A sentence ends at a full stop, question mark or exclamation mark before a space, but not after an abbreviation.
END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<! vs\.)(?<!\.\.\.)[\"')]*\s+")

WHOLE = re.compile(r"[.!?][\"')]*$")  # a sentence that has its end


def pages() -> list[Path]:
    """README.md and the pages in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs and the items of lists of a page, each on one line."""
    return (said for _, said in following(text))


def following(text: str) -> Iterator[tuple[bool, str]]:
    """The paragraphs of a page, and whether each is an item of a list with nothing but text before it."""
    text = COMMENT.sub("", FENCED.sub("|", text))
    found: list[str] = []
    item = False
    parted = False  # whether code, a table or a heading stands before it
    listed = False  # whether the paragraph before was an item, whose text may be indented
    for line in [*text.splitlines(), ""]:
        code = line.startswith("    ") and not found and not listed
        code |= line.startswith("        ") and not found
        other = line.lstrip().startswith(("|", "#", "![")) or code
        if found and (other or not line.strip() or ITEM.match(line)):
            yield item and not parted, " ".join(found)
            found, item, parted = [], False, False
        if other:
            parted = True
        elif ITEM.match(line):
            found, listed, item = [ITEM.sub("", line, count=1).strip()], True, True
        elif line.strip():
            listed = listed and (bool(found) or line.startswith(" "))
            found.append(line.strip())


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page, without Markdown's marks."""
    begun = ""  # a sentence that has not ended, and may go on in a list
    for listed, paragraph in following(text):
        plain = re.sub(r"!?\[((?:[^\]`]|`[^`]*`)*)\]\([^)\s]*\)", r"\1", paragraph)
        plain = re.sub(r"``?[^`]+``?", "CODE", plain).replace("**", "").replace("*", "")
        first, *more = END.split(plain)
        if begun and (not listed or (begun.endswith(":") and WHOLE.search(first))):
            yield begun
            begun = ""
        *ended, last = (f"{begun} {first}".strip(), *more)
        yield from ended
        begun = "" if WHOLE.search(last) else last
        if not begun:
            yield last
    if begun:
        yield begun


def words(sentence: str) -> int:
    """How many words a sentence has; a mark alone is none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def main(paths: list[Path]) -> None:
    """Print the long sentences of each page, and their share."""
    every = long = 0
    for path in paths:
        found = list(sentences(path.read_text()))
        over = [s for s in found if words(s) > LONG]
        every, long = every + len(found), long + len(over)
        print(f"{path.name}: {len(over)} of {len(found)} sentences have more than {LONG} words")
        for sentence in over:
            print(f"  {words(sentence)}: {sentence}")
    print(f"{100 * long / max(every, 1):.2f} % of {every} sentences")


def draw(paths: list[Path], count: int, seed: int) -> None:
    """Print so many passages: paragraphs of at least SHORTEST words, each as likely as any other."""
    every = [(path, text) for path in paths for text in paragraphs(path.read_text()) if words(text) >= SHORTEST]
    for number, (path, text) in enumerate(random.Random(seed).sample(every, count), 1):
        print(f"{number}. {path.name}: {text}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="README.md and docs/ if none is named")
    parser.add_argument("--draw", type=int, default=0, help="how many passages to print")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.draw:
        draw(given.pages or pages(), given.draw, given.seed)
    else:
        main(given.pages or pages())
