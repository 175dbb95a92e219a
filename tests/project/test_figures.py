"""The figures and computed tables of README.md and docs/method.md are those that docs/figures.py makes today."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from loaded import load

DOCS = ROOT / "docs"
figures = load(DOCS / "figures.py")


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_a_figure_is_as_new_as_its_source(name):
    drawn = figures.FIGURES[name]()
    assert (DOCS / "img" / f"{name}.svg").read_text() == drawn, "run python docs/figures.py"
    ElementTree.fromstring(drawn)


@pytest.mark.parametrize("name", sorted(figures.TABLES))
def test_a_computed_table_is_as_new_as_its_source(name):
    path, made = figures.TABLES[name]
    text = path.read_text()
    assert figures.filled(text, name, made()) == text, "run python docs/figures.py"


def test_a_page_without_the_part_is_an_error():
    with pytest.raises(ValueError, match="no part"):
        figures.filled("# A page", "example", "")


def test_the_worked_example_by_hand():
    """The operator and the integer arithmetic of docs/method.md, in plain Python."""
    e = figures.example()
    for o in range(2):
        blocks = [e["m"][o][i // 2] for i in range(4)]
        assert e["merged"][o] == [m * v for m, v in zip(blocks, e["vqk"][o], strict=True)]
        assert all(-8 <= v <= 7 for v in e["vqk"][o])
        assert all(1 <= m <= 15 for m in e["m"][o])
        assert max(map(abs, e["merged"][o])) <= 127
        assert e["weight"][o] == pytest.approx([e["cds"][o] * w for w in e["merged"][o]])
        total = sum(q * w for q, w in zip(figures.PIXEL, e["merged"][o], strict=True)) + e["bias"][o]
        assert e["sums"][o] == total
        byte = round(total * e["cds"][o] / 255 / figures.OUTPUT.scale) + figures.OUTPUT.zero_point
        assert e["out"][o] == min(max(byte, 0), 255)
        assert abs(e["value"][o] - e["real"][o]) < 0.02


def test_the_trellis_figure_reads_the_last_eight_bits():
    table = [int(v) for v in figures.table(figures.BITS)]
    string = "".join(f"{c:0{figures.BITS}b}" for c in figures.STRING)
    for place, (window, value) in enumerate(figures.trellis_rows()):
        seen = ("0" * 8 + string[: figures.BITS * (place + 1)])[-8:]
        assert (window, value) == (seen, table[int(seen, 2)])


NUMBERS = {
    "README.md": [r"the default file has (0\.\d\d) of the size of NNCF's"],
    "docs/accuracy.md": [r"The default has (0\.\d\d) of the size of NNCF's"],
}


def test_the_ratio_of_sizes_in_the_text_is_the_results():
    rows = {row["name"]: row for row in json.loads((DOCS / "accuracy.json").read_text())[figures.SET]["rows"]}
    ratio = rows[figures.DEFAULT]["bytes"] / rows["OpenVINO NNCF int8"]["bytes"]
    for page, patterns in NUMBERS.items():
        text = " ".join((ROOT / page).read_text().split())
        for pattern in patterns:
            assert re.search(pattern, text)[1] == f"{ratio:.2f}", page


def test_the_drops_in_the_accuracy_pages_text_are_the_results():
    """Every `a (b to c)` in the part about the 500 images is a drop, a share of boxes or a score of some row."""
    rows = json.loads((DOCS / "accuracy.json").read_text())[figures.SET]["rows"]
    known = set()
    for r in rows:
        known.add(f"{r['drop']:.2f} ({r['low']:.2f} to {r['high']:.2f})")
        for share, (low, high) in zip((r["lost"], r["new"]), r["box intervals"][:2], strict=True):
            known |= {f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"}
        low, high = r["box intervals"][2]
        known.add(f"{r['moved']:.3f} ({low:.3f} to {high:.3f})")
    text = (DOCS / "accuracy.md").read_text().split("### COCO: 500 images")[1].split("### Corn pests")[0]
    text = " ".join(text.split()).replace(" points (", " (")
    said = re.findall(r"-?\d+\.\d+(?: %)? \(-?\d+\.\d+ to -?\d+\.\d+\)", text)
    assert len(said) > 10
    assert [s for s in said if s not in known] == []
