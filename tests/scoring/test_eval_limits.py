"""eval: which boxes count, and what is still said where the first model finds nothing."""

from __future__ import annotations

import json

import pytest
from pt_writer import yolov5_bytes

import dsconvert

ROOM = ("--imgsz", "64")


@pytest.fixture
def silent(work, tiny):
    """The folder `work`, its checkpoint so unsure that it finds nothing."""
    network, head = tiny
    for conv in network.detect.m:
        conv.bias.fill_(-9)
    (work / "best.pt").write_bytes(yolov5_bytes(network, head))
    return work


def test_candidates_below_the_limits_do_not_count(work, call):
    def row(*options: str) -> dict:
        done = call("eval", "best.pt", "--data", "data.yaml", "--json", *ROOM, *options, cwd=work)
        assert done.code == 0, done.err
        return json.loads(done.out)

    usual, least, none = row(), row("--conf-thres", "0.001", "--iou-thres", "0.6"), row("--conf-thres", "0.99999")
    assert (usual["conf_thres"], usual["iou_thres"]) == (0.001, 0.6)
    assert usual["models"][0]["map50_95"] == least["models"][0]["map50_95"] > 0
    assert none["models"][0]["map50_95"] == none["models"][0]["recall"] == 0
    fewer = row("--conf-thres", "0.5", "--iou-thres", "0.2")
    assert 0 <= fewer["models"][0]["map50_95"] != usual["models"][0]["map50_95"]


@pytest.mark.parametrize("option", ["--conf-thres", "--iou-thres"])
@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan"])
def test_limits_that_mean_nothing_are_one_sentence(work, call, option, value):
    done = call("eval", "best.pt", "--data", "data.yaml", option, value, cwd=work)
    assert (done.code, done.out) == (2, "")
    assert "must lie in 0..1" in done.err


def test_size_and_speed_are_told_where_nothing_is_found(silent, call):
    args = ("eval", "best.pt", "best.pt", "--data", "images", *ROOM)
    done = call(*args, "--json", cwd=silent)
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["models"]
    for row in (first, second):
        assert [row[k] for k in ("map50_95", "map50", "precision", "recall")] == [None] * 4
        assert row["size_bytes"] == (silent / "best.pt").stat().st_size
        assert row["latency_ms"]["median"] > 0
        assert (row["images"], row["skipped"]) == (4, 0)
    assert "best.pt finds nothing above a score of 0.25 in these images" in done.err
    shown = call(*args, "--verbose", cwd=silent)
    assert shown.code == 0, shown.err
    assert "4 images." in shown.out
    assert "nan" not in shown.out
    held = call(*args, "--max-map-drop", "1", cwd=silent)
    assert (held.code, "cannot be checked" in held.err) == (2, True)
    with pytest.warns(UserWarning, match="finds nothing"):
        (row,) = found = dsconvert.evaluate(silent / "best.pt", silent / "images", imgsz=64)
    assert (row.map50_95, row.recall, row.images, row.ap50_95) == (None, None, 4, {})
    assert "best.pt" in repr(found)


def test_images_without_labels_where_there_should_be_some_are_an_error(work, call):
    for file in (work / "labels/val").iterdir():
        file.unlink()
    done = call("eval", "best.pt", "--data", "data.yaml", *ROOM, cwd=work)
    assert done.code == 2
    assert "None of the 4 images of data.yaml has labels" in done.err
