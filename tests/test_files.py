"""Atomic writing: the old file or the whole new one, and nothing left behind."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsconvert.errors import InputError
from dsconvert.files import (
    NameRefused,
    check_writable,
    claim_folder,
    free_folder,
    refuse_inputs,
    write_atomic,
    written_whole,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_a_new_file_is_written_whole_and_alone(tmp_path, force):
    path = tmp_path / "new/folder/model.bin"
    data = bytes(range(256)) * 1000
    write_atomic(path, data, force)
    assert path.read_bytes() == data
    assert names(path.parent) == ["model.bin"]
    assert path.stat().st_nlink == 1


@pytest.mark.parametrize("force", [False, True])
def test_the_file_has_the_permissions_of_any_new_file(tmp_path, force):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"x", force)
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=r"already exists; give --force"):
        write_atomic(path, b"new", force=False)
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new", force=True)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["model.bin"]


def test_an_existing_file_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"old")
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: pytest.fail("a temporary file was asked for"))
    with pytest.raises(InputError, match="already exists"):
        write_atomic(tmp_path / "model.bin", b"new", force=False)


def test_a_file_another_run_makes_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    link = os.link

    def late(source, target):
        path.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(InputError, match="already exists"):
        write_atomic(path, b"ours", force=False)
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_neither_followed_nor_replaced(tmp_path, dangling, force):
    path, behind = tmp_path / "model.bin", tmp_path / "elsewhere"
    path.symlink_to(behind)
    if not dangling:
        behind.write_bytes(b"old")
    with pytest.raises(InputError, match="it is a link"):
        write_atomic(path, b"new", force)
    assert names(tmp_path) == (["model.bin"] if dangling else ["elsewhere", "model.bin"])
    assert path.is_symlink()
    assert dangling or behind.read_bytes() == b"old"


def test_links_to_folders_on_the_way_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    write_atomic(tmp_path / "runs/model.bin", b"new", force=False)
    assert (tmp_path / "disk/model.bin").read_bytes() == b"new"


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door"))
    for path, words in [
        (tmp_path / "pipe", "a device or a pipe"), (tmp_path / "door", "a device or a pipe"),
        (Path("/dev/null"), "a device or a pipe"), (tmp_path, "a folder"),
    ]:  # fmt: skip
        before = path.lstat()
        for force in (False, True):
            with pytest.raises(InputError, match=words):
                write_atomic(path, b"new", force)
        assert path.lstat().st_mode == before.st_mode
    assert names(tmp_path) == ["door", "pipe"]


@pytest.mark.parametrize("name", ["n" * 240, "ä" * 120, "n" * 255])
def test_a_name_as_long_as_disks_allow_is_written(tmp_path, name):
    write_atomic(tmp_path / name, b"x", force=False)
    write_atomic(tmp_path / name, b"y", force=True)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["n" * 256, "ä" * 128, "a\0b", "\ud800"])
def test_a_name_that_no_disk_takes_is_told_from_a_disk_that_takes_nothing(tmp_path, name):
    with pytest.raises(NameRefused, match="cannot be written"):
        write_atomic(tmp_path / name, b"x", force=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        write_atomic(tmp_path / "file/x", b"x", force=False)
    assert not isinstance(caught.value, NameRefused)
    assert names(tmp_path) == ["file"]


def test_an_output_that_is_an_input_is_refused_under_any_name(tmp_path):
    model, photos = tmp_path / "model.bin", tmp_path / "photos"
    model.write_bytes(b"x")
    photos.mkdir()
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "hard").hardlink_to(model)
    (tmp_path / "album").symlink_to(photos)
    for output in (model, tmp_path / "photos/../model.bin", tmp_path / "link", tmp_path / "hard"):
        with pytest.raises(InputError, match=r"model\.bin is an input"):
            refuse_inputs([tmp_path / "new", output], [photos, model])
    with pytest.raises(InputError, match="photos is an input"):
        refuse_inputs([tmp_path / "album"], [model, photos])
    refuse_inputs([tmp_path / "new", photos / "new", tmp_path], [model, photos, tmp_path / "gone"])


@pytest.mark.parametrize(("call", "force"), [("replace", True), ("link", False), ("fsync", True), ("chmod", False)])
def test_a_failing_step_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, force):
    path = tmp_path / "model.bin"
    if force:
        path.write_bytes(b"old")
    reached = []

    def fail(*args, **kwargs):
        reached.append(names(tmp_path))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError) as caught:
        write_atomic(path, b"new", force)
    monkeypatch.undo()
    assert str(caught.value) == f"{path} cannot be written: No space left on device."
    assert any(name.endswith(".part") for name in reached[0])  # there was something to leave behind
    assert names(tmp_path) == (["model.bin"] if force else [])
    if force:
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize(("call", "force"), [("replace", True), ("link", False)])
def test_an_interrupt_leaves_no_other_file_and_goes_on(tmp_path, monkeypatch, call, force):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "model.bin", b"new", force)
    assert names(tmp_path) == []


def test_a_library_fills_a_file_that_then_takes_its_place(tmp_path):
    path = tmp_path / "new/clip.mp4"
    with written_whole(path, False, ".part.mp4") as temporary:
        assert (temporary.parent, temporary.suffix, path.exists()) == (path.parent, ".mp4", False)
        temporary.write_bytes(b"film")
    assert path.read_bytes() == b"film"

    def fail() -> None:
        with written_whole(path, True) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert (names(path.parent), path.read_bytes()) == (["clip.mp4"], b"film")


def test_a_reader_never_sees_a_part_of_the_file(tmp_path, monkeypatch):
    """Up to the rename the path holds the old content, whole; the rename is given all of the new one, synced."""
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    replace, fsync, seen = os.replace, os.fsync, []

    def watched_sync(handle):
        seen.append(("sync", path.read_bytes()))
        fsync(handle)

    def watched_replace(source, target):
        with open(source, "rb") as stream:
            seen.append(("replace", path.read_bytes(), stream.read()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomic(path, b"new" * 9999, force=True)
    # the file is synced before the rename, its folder after
    assert seen == [("sync", b"old"), ("replace", b"old", b"new" * 9999), ("sync", b"new" * 9999)]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file/model.bin", tmp_path / "file/deeper/model.bin"):
        with pytest.raises(InputError, match=r"model\.bin cannot be written: .*\.$"):
            write_atomic(path, b"x", force=False)
    assert names(tmp_path) == ["file"]


def test_forcing_onto_a_folder_fails_and_leaves_it(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/inside").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "model", b"x", force=True)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["inside"]


def test_free_folder_counts_up_from_two(tmp_path):
    base = tmp_path / "runs/best"
    assert free_folder(base) == base
    assert not base.exists()  # only named
    base.mkdir(parents=True)
    assert free_folder(base) == tmp_path / "runs/best2"
    (tmp_path / "runs/best3").mkdir()
    assert free_folder(base) == tmp_path / "runs/best2"  # the first gap
    (tmp_path / "runs/best2").write_text("a file takes the name too")
    assert free_folder(base) == tmp_path / "runs/best4"


def test_free_folder_keeps_dots_in_the_name(tmp_path):
    (tmp_path / "best.v1").mkdir()
    assert free_folder(tmp_path / "best.v1") == tmp_path / "best.v12"


def test_a_claimed_folder_is_the_first_free_one(tmp_path):
    base = tmp_path / "runs/best.v1"
    assert claim_folder(base) == base
    assert base.is_dir()
    (tmp_path / "runs/best.v13").mkdir()
    (tmp_path / "runs/best.v12").write_text("a file takes the name too")
    assert claim_folder(base) == tmp_path / "runs/best.v14"
    assert claim_folder(base) == tmp_path / "runs/best.v15"


def test_two_runs_never_claim_one_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(claim_folder, [tmp_path / "best"] * 64))
    assert len(set(claimed)) == 64


def test_where_nothing_can_be_written_is_known_beforehand(tmp_path):
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path)
    check_writable(tmp_path / "not/there/yet")
    with pytest.raises(InputError, match="is not a folder"):
        check_writable(tmp_path / "file/below")
    with pytest.raises(InputError, match="is read-only"):
        check_writable(Path("/proc/1/new"))  # where even root cannot write
    for place in (tmp_path / "file/below", Path("/proc/new")):
        with pytest.raises(InputError, match="cannot be written"):
            claim_folder(place)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a link to nowhere"):
        claim_folder(tmp_path / "link")
