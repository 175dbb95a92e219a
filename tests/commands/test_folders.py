"""Where a run writes, and which run is gone on with."""

import os

import pytest

from dsconvert.base.errors import InputError
from dsconvert.commands.folders import run_folder, stopped


def leave(folder, time):
    folder.mkdir(parents=True)
    (folder / "left").write_text("")
    os.utime(folder / "left", (time, time))


def test_the_run_gone_on_with_is_the_last_of_the_same_name(tmp_path):
    """Another checkpoint's runs begin with the same letters, and a name may end in a digit itself."""
    for name, time in (("best", 1), ("best3", 2), ("best-night", 3), ("yolov5", 4), ("yolov52", 5), ("yolov5n", 6)):
        leave(tmp_path / name, time)
    assert stopped(tmp_path / "best", "left").name == "best3"
    assert stopped(tmp_path / "yolov5", "left").name == "yolov52"
    with pytest.raises(InputError, match="no run of other under"):
        stopped(tmp_path / "other", "left")


def test_a_folder_that_a_failed_run_left_empty_is_gone_and_any_other_stays(tmp_path):
    base = tmp_path / "runs/dsconvert/best"
    with pytest.raises(KeyboardInterrupt), run_folder(None, base, "left", False) as folder:
        raise KeyboardInterrupt
    assert folder == base
    assert not (tmp_path / "runs").exists()
    leave(base, 1)
    with pytest.raises(ZeroDivisionError), run_folder(None, base, "left", True):
        raise ZeroDivisionError
    assert (base / "left").exists()
    with run_folder(None, base, "left", True) as folder:
        assert folder == base
    given = tmp_path / "given"
    given.mkdir()
    with pytest.raises(ZeroDivisionError), run_folder(given, base, "left", False) as folder:
        raise ZeroDivisionError
    assert folder == given
    assert given.exists()
