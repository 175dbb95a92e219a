"""Atomic writing: the old file or the whole new one, and nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from dsconvert.base.errors import InputError
from dsconvert.base.files import (
    NameRefused,
    check_writable,
    claim_folder,
    free_folder,
    refuse_inputs,
    scratch_folder,
    scratch_in,
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
    with pytest.raises(InputError, match=r"already exists; give force=True"):
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


# --- disks that cannot do everything ----------------------------------------------------------------------------------

# as FAT and exFAT, FUSE (gcsfuse, Google Drive), VirtualBox's and SMB's folders say it
UNABLE = [errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY]


def poor_disk(monkeypatch, number: int) -> list[str]:
    """No hard links, no sync of folders, no permissions; what was tried."""
    tried, fsync = [], os.fsync

    def unable(name: str):
        def call(*args, **kwargs):
            tried.append(name)
            raise OSError(number, os.strerror(number))

        return call

    def of_files(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            unable("fsync")()
        fsync(handle)

    for name in ("link", "chmod"):
        monkeypatch.setattr(os, name, unable(name))
    monkeypatch.setattr(os, "fsync", of_files)
    return tried


@pytest.mark.parametrize("number", UNABLE)
@pytest.mark.parametrize("force", [False, True])
def test_what_a_disk_cannot_do_is_left_out(tmp_path, monkeypatch, number, force):
    tried = poor_disk(monkeypatch, number)
    check_writable(tmp_path)
    write_atomic(tmp_path / "model.bin", b"new" * 999, force)
    assert (tmp_path / "model.bin").read_bytes() == b"new" * 999
    assert names(tmp_path) == ["model.bin"]
    assert {"chmod", "fsync"} | ({"link"} if not force else set()) == set(tried)
    with pytest.raises(InputError, match="already exists"):
        write_atomic(tmp_path / "model.bin", b"newer", force=False)
    write_atomic(tmp_path / "model.bin", b"newer", force=True)
    assert (tmp_path / "model.bin").read_bytes() == b"newer"
    assert names(tmp_path) == ["model.bin"]


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    """As on Windows."""
    opened = os.open

    def of_files(path, flags, *rest):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", of_files)
    monkeypatch.delattr(os, "link")
    write_atomic(tmp_path / "model.bin", b"new", force=False)
    assert (tmp_path / "model.bin").read_bytes() == b"new"


def test_without_links_a_file_that_another_run_makes_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"

    def late(source, target):
        path.write_bytes(b"theirs")
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(InputError, match="already exists"):
        write_atomic(path, b"ours", force=False)
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == ["model.bin"]


def test_without_links_a_rename_that_fails_leaves_nothing(tmp_path, monkeypatch):
    poor_disk(monkeypatch, errno.EPERM)

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="Input/output error"):
        write_atomic(tmp_path / "model.bin", b"new", force=False)
    assert names(tmp_path) == []


def test_a_folder_that_fails_otherwise_is_said(tmp_path, monkeypatch):
    fsync = os.fsync

    def broken(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(InputError, match="Input/output error"):
        write_atomic(tmp_path / "model.bin", b"new", force=True)


@pytest.mark.parametrize("length", [200, 240, 255])
def test_a_long_name_is_no_longer_while_it_is_written(tmp_path, length):
    for name in ("a" * length, "\u00e4" * (length // 2)):
        write_atomic(tmp_path / name, b"x", force=False)
        assert (tmp_path / name).read_bytes() == b"x"


def test_the_probe_writes_and_leaves_nothing(tmp_path, monkeypatch):
    check_writable(tmp_path / "not/there/yet")
    assert names(tmp_path) == []

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"yet cannot be written: No space left on device\.$"):
        check_writable(tmp_path / "not/there/yet")
    assert names(tmp_path) == []


# --- temporary folders ------------------------------------------------------------------------------------------------


def test_a_temporary_folder_is_where_the_result_will_be_and_goes(tmp_path):
    with scratch_in(tmp_path / "runs/best"), scratch_folder() as folder:
        assert folder.parent == tmp_path
        (folder / "deep").mkdir()
        (folder / "deep/x").write_bytes(b"x")
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), scratch_in(tmp_path), scratch_folder() as folder:
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with scratch_folder() as folder:
        assert str(folder).startswith(tempfile.gettempdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_temporary_folder_goes_when_the_process_is_told_to_end(tmp_path, number):
    script = (
        "import sys, time; from pathlib import Path; from dsconvert.base.files import *\n"
        "with scratch_in(Path(sys.argv[1])), scratch_folder() as folder:\n"
        "    (folder / 'photo').write_bytes(b'x'); print('ready', flush=True); time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        assert len(names(tmp_path)) == 1
        run.send_signal(number)
        assert run.wait() == -number
    assert names(tmp_path) == []


def test_what_ended_processes_before_ends_them_after(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with scratch_in(tmp_path), scratch_folder():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with scratch_in(tmp_path), scratch_folder():  # who is told to ignore it does
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
