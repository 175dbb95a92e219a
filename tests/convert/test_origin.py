"""A stranger's model names paths of this machine: what is opened without being asked."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import convert, smooth_picture, tiny_network, write_pictures
from pt_writer import yolov5_bytes

from dsconvert.base.errors import InputError
from dsconvert.convert import exporting
from dsconvert.convert.origin import known_images, known_source
from dsconvert.model.file import model_bytes
from dsconvert.model.model import DSModel
from dsconvert.photos import images
from dsconvert.report import gather
from dsconvert.scoring import contest


@pytest.fixture(scope="module")
def made() -> DSModel:
    return convert(*tiny_network(), smooth_picture())


@pytest.fixture
def secret(tmp_path) -> Path:
    """Somebody's photos and checkpoint."""
    folder = tmp_path / "home"
    folder.mkdir()
    write_pictures(folder)
    (folder / "best.pt").write_bytes(yolov5_bytes(*tiny_network()))
    return folder


@pytest.fixture
def stranger(made, secret, tmp_path):
    """A folder with a stranger's model under runs/dsconvert, by what it says it was calibrated on."""

    def write(calib: Path | str, source: Path | str) -> Path:
        folder = tmp_path / "work/runs/dsconvert/q"
        folder.mkdir(parents=True)
        provenance = {"source": str(source), "options": {"calib": str(calib)}}
        (folder / "model.safetensors").write_bytes(model_bytes(replace(made, provenance=provenance)))
        return folder / "model.safetensors"

    return write


def ways_out(secret: Path, work: Path) -> dict[str, Path]:
    """Paths that lead to somebody's photos."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "link").symlink_to(secret / "images")
    (work / "links").mkdir()
    (work / "links/a.jpg").symlink_to(secret / "images/val/0.jpg")
    (work / "list.txt").write_text(f"{secret}/images/val/0.jpg\n")
    (work / "data.yaml").write_text(f"path: {secret}\nval: images/val\nnames: [cat, dog]\n")
    return {
        "a folder": secret / "images", "a file": secret / "images/val/0.jpg", "a data.yaml": secret / "data.yaml",
        "upwards": work / "../home/images", "a link": work / "link", "a folder of links": work / "links",
        "a list": work / "list.txt", "a data.yaml of other folders": work / "data.yaml",
    }  # fmt: skip


WAYS = ["a folder", "a file", "a data.yaml", "upwards", "a link", "a folder of links", "a list",
        "a data.yaml of other folders"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_photos_elsewhere_are_not_opened(stranger, secret, tmp_path, call, monkeypatch, way):
    calib = ways_out(secret, tmp_path / "work")[way]
    model = stranger(calib, tmp_path / "work/best.pt")
    (tmp_path / "work/best.pt").write_bytes((secret / "best.pt").read_bytes())
    for module in (gather, exporting, images):
        monkeypatch.setattr(module, "read_image", lambda path: pytest.fail(f"{path} was opened"))
    for line in (["report", model], ["eval"], ["eval", model]):
        answer = call(*line, cwd=tmp_path / "work")
        assert answer.code == 2, answer.err
        assert "give --data" in answer.err
        assert answer.err.count("\n") == 1
    assert not (model.parent / "report.html").exists()
    answer = call("export", model, "--onnx", cwd=tmp_path / "work")  # and is checked on a drawn image
    assert answer.code == 0, answer.err


def test_a_checkpoint_elsewhere_is_not_opened(stranger, secret, tmp_path, call, monkeypatch):
    model = stranger(tmp_path / "work/images", secret / "best.pt")
    write_pictures(tmp_path / "work")
    monkeypatch.setattr(gather, "load_checkpoint", lambda path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(contest, "load_candidates", lambda *_: pytest.fail("a model was opened"))
    for line, ask in (
        (["report", model], "give it with --float"),
        (["eval"], "name the models: dsconvert eval CHECKPOINT MODEL"),
    ):
        answer = call(*line, cwd=tmp_path / "work")
        assert answer.code == 2
        assert f"names the checkpoint that it was converted from at {secret / 'best.pt'}, neither below" in answer.err
        assert answer.err.endswith(f"so it was not opened; {ask}.\n")


@pytest.mark.parametrize("place", ["beside the model", "in the working directory"])
def test_what_is_near_is_opened_unasked(made, tmp_path, monkeypatch, place):
    model, here = tmp_path / "model/model.safetensors", tmp_path / "here"
    here.mkdir()
    model.parent.mkdir()
    near = model.parent if place == "beside the model" else here
    write_pictures(near)
    (near / "best.pt").write_bytes(b"x")
    monkeypatch.chdir(here)
    for calib in ("data.yaml", "images", "images/val/1.jpg"):
        assert known_images({"options": {"calib": str(near / calib)}}, model) == near / calib
    assert known_source({"source": str(near / "best.pt")}, model, "") == near / "best.pt"
    (near / "best.pt").unlink()
    with pytest.raises(InputError, match=r"is not at .* any more; give it with --float\.$"):
        known_source({"source": str(near / "best.pt")}, model, "give it with --float")


@pytest.mark.parametrize("provenance", [{}, {"options": {}}, {"options": {"calib": None}}, {"options": {"calib": ""}}])
def test_what_is_not_known_is_asked_for(provenance, tmp_path):
    with pytest.raises(InputError, match="names no images; give data"):
        known_images(provenance, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="is not known; say it"):
        known_source(provenance, tmp_path / "m.safetensors", "say it")


@pytest.mark.parametrize("calib", ["a\0b", "a" * 5000, "\ud800"])
def test_paths_that_are_none_are_refused(calib, tmp_path):
    with pytest.raises(InputError):
        known_images({"options": {"calib": calib}}, tmp_path / "m.safetensors")
    with pytest.raises(InputError):
        known_source({"source": calib}, tmp_path / "m.safetensors", "")


def test_a_checkpoint_elsewhere_is_opened_when_it_is_the_very_one(tmp_path, monkeypatch):
    """As after `quantize ~/models/best.pt`: `eval` finds it again."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    monkeypatch.chdir(tmp_path / "near")
    source, model = tmp_path / "far/best.pt", tmp_path / "near/model.safetensors"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert known_source({"source": str(source), "source_sha256": digest}, model, "say it") == source
    for other in (hashlib.sha256(b"others").hexdigest(), None, 5, ""):
        with pytest.raises(InputError, match="was not opened; say it"):
            known_source({"source": str(source), "source_sha256": other}, model, "say it")
    os.mkfifo(tmp_path / "far/pipe")
    with pytest.raises(InputError, match="was not opened"):
        known_source({"source": str(tmp_path / "far/pipe"), "source_sha256": digest}, model, "say it")
