"""A reader only ever sees the old file or the whole new one."""

from __future__ import annotations

import os

import pytest

from dsconvert.errors import InputError
from dsconvert.files import free_folder, write_atomic


def test_writes_makes_folders_and_refuses_to_overwrite(tmp_path):
    path = tmp_path / "a" / "b.bin"
    write_atomic(path, b"one", force=False)
    with pytest.raises(InputError, match="--force"):
        write_atomic(path, b"two", force=False)
    assert path.read_bytes() == b"one"
    write_atomic(path, b"two", force=True)
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"]


@pytest.mark.parametrize("force", [False, True])
def test_a_fault_while_writing_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, force):
    path = tmp_path / "f"
    if force:
        path.write_bytes(b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_atomic(path, b"new", force)
    assert [p.name for p in tmp_path.iterdir()] == (["f"] if force else [])
    if force:
        assert path.read_bytes() == b"old"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "f"
    real = os.fsync

    def other_run(fd):
        if not path.exists():
            path.write_bytes(b"theirs")
        real(fd)

    monkeypatch.setattr(os, "fsync", other_run)
    with pytest.raises(InputError, match="already exists"):
        write_atomic(path, b"ours", force=False)
    assert path.read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_unwritable_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x", b"", force=False)


def test_free_folder_counts_up(tmp_path):
    base = tmp_path / "best"
    assert free_folder(base) == base
    base.mkdir()
    (tmp_path / "best2").mkdir()
    assert free_folder(base) == tmp_path / "best3"
