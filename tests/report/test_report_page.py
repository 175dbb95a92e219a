"""The page: self-contained, the same bytes every time, and nothing from a file gets out of its place."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from report_case import HOSTILE, SCRIPT, make_case

from dsconvert.base.errors import InputError
from dsconvert.base.text import printable
from dsconvert.commands import report as command
from dsconvert.report.gather import ReportOptions, gather
from dsconvert.report.page import page_bytes
from dsconvert.report.svg import COLOURS
from dsconvert.scoring.compare import ScoreShift

VOID = {"meta", "link", "image", "use", "rect", "path", "br", "img"}


class Page(HTMLParser):
    """Every element with its attributes, the text of scripts, and a check that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("report")
    make_case(made)
    return made


def options(folder: Path, **given) -> ReportOptions:
    """What to report on of that folder, unless something else is given."""
    usual = {"model": folder / "q/model.safetensors", "data": folder / "data.yaml", "float_model": folder / "best.pt"}
    return ReportOptions(**(usual | given))


@pytest.fixture(scope="module")
def gathered(folder):
    return gather(options(folder, latency=False))


@pytest.fixture(scope="module")
def html(gathered):
    return page_bytes(gathered).decode()


def test_the_whole_page(gathered, html):
    page = Page(html)

    # hostile names: shown, never obeyed
    assert SCRIPT not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    assert "{{ 7 * 7 }}" in html
    assert "49 0." not in html
    assert [a for _, attrs in page.found for a in attrs if a.startswith("on")] == []

    # nothing but what is inside it, and the policy says so
    assert re.findall(r"https?://[^\"' ]+", html.replace("http://www.w3.org/2000/svg", "")) == []
    links = [
        attrs[k] or "" for _, attrs in page.found for k in ("href", "src", "action", "data", "srcset") if k in attrs
    ]
    assert {link[:5] for link in links if not link.startswith("#")} <= {"data:"}
    (policy,) = [a["content"] or "" for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )

    # a document that can be found one's way in
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert {attrs["aria-labelledby"] for attrs in page.all("section")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in page.all("svg"))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    assert all(attrs.get("type") == "button" for attrs in page.all("button"))

    # charts wear the page's colours, all of them
    assert not [token for token in COLOURS if token in html]
    assert "<metadata" not in html

    # every section that has something to say, and the photos once each
    assert {"compared", "photos", "classes", "layers", "weights", "activations", "finetuning", "made"} <= set(ids)
    assert len(page.all("image")) == len(gathered.photos) == 3


def test_sections_without_content_are_left_out(gathered):
    silent = {"activation_db": None, "damage": None, "sensitivity": None}
    layers = [dataclasses.replace(row, **silent) for row in gathered.layers]
    bare = dataclasses.replace(gathered, finetune=(), photos=(), activations=(), layers=layers, same_source=False)
    html = page_bytes(bare).decode()
    ids = {attrs.get("id") for _, attrs in Page(html).found}
    assert not {"finetuning", "photos", "activations"} & ids
    assert "#finetuning" not in html
    assert "tuning" not in html
    assert "activations, dB" not in html
    assert "damage" not in re.sub(r"<script>.*</script>", "", html, flags=re.S)
    assert "differs from the file" in html


def test_figures_on_the_page_are_the_gathered_ones(gathered, html):
    for row in gathered.rows:
        assert f"<td>{row.metrics.map50_95:.4f}</td><td>{row.metrics.map50:.4f}</td>" in html
        assert f"<td>{row.size_bytes / 1e6:.2f}</td>" in html
    for layer in gathered.layers:
        assert f"<td>{layer.weight_db:.1f}</td>" in html
    assert [r.weight_db for r in gathered.layers] == [10.0 + i for i in range(len(gathered.layers))]  # quantize.json's
    assert gathered.same_source
    assert "differs from the file" not in html
    assert gathered.finetune[0] == (0, 1)
    assert tuple(gathered.names) == tuple(printable(name) for name in HOSTILE)  # as every model file is read


def test_without_labels_float_is_the_reference(folder):
    found = gather(options(folder, data=folder / "images", latency=False, images=1, samples=2))
    html = page_bytes(found).decode()
    assert not found.labelled
    assert "agreement with them is" in html
    assert "<dt>Agreement (mAP50-95)</dt>" in html
    assert not re.search(r"\b1 classes", html)
    assert "reference</td>" in html
    assert "points against float" not in html
    assert len(found.photos) == 1
    assert len(found.differing) == 2


def test_without_labels_and_without_anything_found_the_rest_is_there(folder, monkeypatch):
    monkeypatch.setattr("dsconvert.scoring.accuracy.CONFIDENT", 1.0)  # no score is above it
    found = gather(options(folder, data=folder / "images", latency=False, images=1, samples=2))
    html = page_bytes(found).decode()
    ids = {attrs.get("id") for _, attrs in Page(html).found}
    assert [row.metrics for row in found.rows] == [None, None]
    assert "the float model finds nothing above a score of 0.25 in these images" in html
    assert "mAP" not in html
    assert "None" not in html
    assert {"compared", "photos", "layers", "weights", "made"} <= ids
    assert "classes" not in ids
    assert "#classes" not in html
    assert f"<td>{found.rows[1].size_bytes / 1e6:.2f}</td>" in html
    assert len(found.layers) > 1


def test_an_image_that_cannot_be_read_is_left_out_of_every_figure(folder, tmp_path):
    whole = next(p for p in folder.rglob("*") if p.suffix in (".jpg", ".png")).read_bytes()
    for index, name in enumerate(("a.png", "b.png", "c.png")):
        (tmp_path / name).write_bytes(whole if index == 1 else b"broken")
    found = gather(options(folder, data=tmp_path, latency=False))
    assert [photo.name for photo in found.photos] == ["b.png"]
    assert [Path(reason.partition(" ")[0]).name for reason in found.skipped] == ["a.png", "c.png"]
    assert (len(found.differing), found.watched_images) == (1, 1)
    assert all(row.metrics is None or row.metrics.images == 1 for row in found.rows)
    assert "on the same 1 images" in page_bytes(found).decode().replace("All on", "on")


def test_models_that_cannot_be_reported_on(folder, call, monkeypatch):
    model, data = folder / "q/model.safetensors", folder / "data.yaml"
    refused = call("report", "best.pt", "--data", "data.yaml", cwd=folder)
    assert (refused.code, "not a converted model" in refused.err) == (2, True)
    (folder / "best.pt").rename(folder / "moved.pt")
    refused = call("report", model, "--data", "data.yaml", cwd=folder)
    assert (refused.code, "give it with --float" in refused.err) == (2, True)
    assert gather(options(folder, float_model=folder / "moved.pt", latency=False, samples=1)).same_source
    (folder / "moved.pt").rename(folder / "best.pt")
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(InputError, match=r"needs matplotlib; pip install 'dsconvert\[report\]'"):
        command.report.callback(model, data, (), None, 1, None, None, None, False, True, 1, None, False)


def test_the_page_says_how_sure_both_models_are(gathered, html):
    """In figures, and with a note where one threshold does not suit both."""
    scores = gathered.scores
    assert 0 < scores.first_best <= 1
    assert f"is {scores.first_best:.3f} on average with float and {scores.second_best:.3f} with DSConv" in html
    assert f"{scores.first_boxes} boxes of float and {scores.second_boxes} of DSConv score above 0.25" in html
    for second, noted in ((0.72, False), (0.6, True)):
        page = page_bytes(dataclasses.replace(gathered, scores=ScoreShift(0.73, second, 9, 8))).decode()
        assert ("0.73 on average with float and 0.60 with DSConv, so" in page) == noted
