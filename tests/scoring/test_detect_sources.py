"""What detect may be pointed at: images, videos, folders, patterns, lists, webcams, addresses of streams."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsconvert.base.errors import InputError
from dsconvert.scoring.sources import Sources, find_sources


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with photos/a.jpg, photos/b.PNG, photos/in/c.jpg, photos/d.mp4, photos/in/e.AVI, x.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/in").mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "in/c.jpg", "d.mp4", "in/e.AVI", "notes.txt"):
        (tmp_path / "photos" / name).write_bytes(b"")
    (tmp_path / "x.txt").write_text("photos/a.jpg\nphotos/d.mp4\n")
    return tmp_path


def found(*given: str) -> tuple[list[str], list[str]]:
    """Images and videos, as text."""
    sources = find_sources(given)
    return [p.as_posix() for p in sources.images], [p.as_posix() for p in sources.videos]


def test_files_folders_lists_and_patterns(place):
    every = (["photos/a.jpg", "photos/b.PNG", "photos/in/c.jpg"], ["photos/d.mp4", "photos/in/e.AVI"])
    assert found("photos") == every
    assert found("photos/a.jpg") == (["photos/a.jpg"], [])
    assert found("photos/in/e.AVI") == ([], ["photos/in/e.AVI"])
    assert found("x.txt") == (["photos/a.jpg"], ["photos/d.mp4"])
    assert found("photos/*") == (["photos/a.jpg", "photos/b.PNG"], ["photos/d.mp4"])
    assert found("photos/**/*.[ja]*") == (["photos/a.jpg", "photos/in/c.jpg"], [])
    assert found("photos/**") == every
    assert found("photos/?.mp4") == ([], ["photos/d.mp4"])


def test_a_data_yaml_is_its_images_to_measure_on(place):
    (place / "data.yaml").write_text("train: photos\nval: photos/in\nnames: [x]\n")
    assert found("data.yaml") == (["photos/in/c.jpg"], [])


def test_nothing_is_looked_at_twice(place):
    assert found("photos/a.jpg", "photos/../photos/a.jpg", "x.txt", "photos/?.jpg") == (
        ["photos/a.jpg"], ["photos/d.mp4"],
    )  # fmt: skip


def test_a_name_with_brackets_that_exists_is_no_pattern(place):
    (place / "a[1].jpg").write_bytes(b"")
    (place / "a1.jpg").write_bytes(b"")
    assert found("a[1].jpg") == (["a[1].jpg"], [])
    (place / "set[1]").mkdir()
    (place / "set[1]/y.jpg").write_bytes(b"")
    assert found("set[1]") == (["set[1]/y.jpg"], [])


def test_links_to_folders_are_followed_once(place):
    (place / "more").mkdir()
    (place / "more/z.mov").write_bytes(b"")
    (place / "photos/linked").symlink_to(place / "more")
    (place / "more/circle").symlink_to(place / "photos")
    assert found("photos")[1] == ["photos/d.mp4", "photos/in/e.AVI", "photos/linked/z.mov"]


def test_a_number_is_a_webcam_unless_a_file_has_that_name(place):
    assert find_sources(["0"]) == Sources(live="0")
    (place / "0").mkdir()
    (place / "0/k.jpg").write_bytes(b"")
    assert found("0") == (["0/k.jpg"], [])
    assert find_sources(["1"]).live == "1"
    with pytest.raises(InputError, match="0 to 999"):
        find_sources(["12345"])


@pytest.mark.parametrize("address", ["rtsp://a/b", "RTSP://u:p@a:554/b", "http://a/b.mp4", "https://a/b", "rtmp://a"])
def test_an_address_is_a_stream(place, address):
    assert find_sources([address]) == Sources(live=address)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["ftp://a/b.mp4"], "not a stream"), (["file:///etc/passwd"], "not a stream"),
        (["nowhere"], "no file or folder"),
        (["none/*.jpg"], "matches no image"), (["photos/*.txt"], "matches no image"), (["empty"], "holds no images"),
        (["nowhere.mp4"], "no file or folder"), (["0", "photos"], "look at it alone"), (["0", "1"], "look at it alone"),
        (["pipe.mp4"], "neither"), (["x" * 300], "cannot be read"), (["a\0b.jpg"], "no file or folder"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_one_sentence(place, given, words):
    (place / "empty").mkdir()
    os.mkfifo(place / "pipe.mp4")
    with pytest.raises(InputError, match=words):
        find_sources(given)
