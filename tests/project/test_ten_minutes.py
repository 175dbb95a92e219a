"""docs/ten-minutes.md: every command of the page, in its order, on the demo model. Each ends with the exit code that
the page shows and prints the page's kinds of lines; only numbers, class names and folders differ."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import DEMO, ROOT

PAGE = ROOT / "docs/ten-minutes.md"
CLASSES = ("helmet", "vest", "ball", "crate", "cone", "star", "ring", "kite")
# What makes a command cheap on the demo, whose scenes are 320 pixels: added here, not on the page.
CHEAP = {"quantize": ["--imgsz", "320"], "report": ["--no-latency", "--images", "2"]}


@dataclass(frozen=True)
class Step:
    """A command of the page, the lines shown below it ('...' for some left out), and its exit code."""

    command: list[str]
    shown: list[str]
    code: int


def steps(page: str) -> list[Step]:
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *rest = part.rstrip("\n").split("\n")
            if first == "echo $?":
                last = found.pop()
                found.append(Step(last.command, last.shown, int(rest[0])))
            else:
                found.append(Step(shlex.split(first), rest, 0))
    return found


def kind(line: str) -> str:
    """The line with every number as N, every class as C, and tables without their widths."""
    line = re.sub(rf"\b({'|'.join(CLASSES)})\b", "C", line)
    line = re.sub(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?", "N", line)
    line = re.sub(r"N C(, N C)+", "N C", line)
    line = line.replace(" and N views of them and N synthesised ones", "")  # of the few photos here, not of the page's
    return re.sub(r" +", " ", re.sub(r"[━─]+", "─", line)).strip()


def missing(shown: list[str], *printed: str) -> list[str]:
    """Lines of the page that are in none of the streams, or not in their order there."""
    left = [[kind(line) for line in text.splitlines()] for text in printed]
    lost = []
    for line in shown:
        stream = next((i for i, lines in enumerate(left) if kind(line) in lines), None)
        if stream is not None:
            left[stream] = left[stream][left[stream].index(kind(line)) + 1 :]
        elif line != "...":
            lost.append(line)
    return lost


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files: a checkpoint, photos to calibrate on, and others; all of them show what it detects. Enough of
    them that the converted model misses something: on six it agreed in everything, and the gate had nothing to say."""
    shutil.copy(DEMO / "demo.pt", tmp_path / "ppe_best.pt")
    for name, source, count in (("photos", "calib", 3), ("others", "val", 60)):
        (tmp_path / name).mkdir()
        for picture in sorted((DEMO / "images" / source).iterdir())[:count]:
            shutil.copy(picture, tmp_path / name)
    return tmp_path


@pytest.mark.long
def test_every_command_of_the_page_does_what_the_page_shows(folder, call):
    done = []
    for step in steps(PAGE.read_text()):
        program, *arguments = step.command
        assert program == "dsconvert"
        answer = call(*arguments, *CHEAP.get(arguments[0], []), cwd=folder)
        assert answer.code == step.code, (step.command, answer.err)
        printed = [text.replace(f"{folder}/", ".../") for text in (answer.out, answer.err)]
        assert missing(step.shown, *printed) == [], printed
        done.append(arguments[0])
    assert set(done) == {"--version", "info", "quantize", "export", "compare", "detect", "eval", "report"}
    assert (folder / "runs/dsconvert/ppe_best/report.html").read_text().startswith("<!doctype html>")
    assert len(list((folder / "runs/detect/exp").glob("*.jpg"))) == 60


def test_the_page_shows_output_of_every_command():
    page = PAGE.read_text()
    for step in steps(page):
        assert any(line != "..." for line in step.shown), step.command
    assert len(steps(page)) == page.count("\n$ dsconvert ") > 8


def test_a_line_that_is_not_printed_is_missed():
    printed = (
        "Found 3 objects in 6 images: 2 ball, 1 kite.\n│ mean IoU     │ 0.98 │\nWrote 6 images: runs/detect/exp2\n"
    )
    page = ["Found 20 objects in 64 images: 19 helmet, 1 vest.", "...", "│ mean IoU │ 0.9726      │"]
    assert missing([*page, "Wrote 64 images: runs/detect/exp7"], printed) == []
    for wrong in ("Found 3 things in 6 images: 2 ball.", "│ mean IoU │ none │", "Wrote 6 pictures: runs/detect/exp"):
        assert missing([wrong], printed) == [wrong]
    assert missing(page[::-1], printed) == page[:1]  # in order
    assert steps("```console\n$ dsconvert a 'b c'\nx\n$ dsconvert d\n$ echo $?\n2\n```\n") == [
        Step(["dsconvert", "a", "b c"], ["x"], 0), Step(["dsconvert", "d"], [], 2),
    ]  # fmt: skip
