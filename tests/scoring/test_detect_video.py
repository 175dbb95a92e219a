"""Videos read and written: the right frames, at the right speed, whole or not at all; nothing else is opened."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsconvert.base.errors import InputError, Unusable
from dsconvert.scoring.video import OPTIONS, film, live_name, live_stem, opened

GREYS = [40 * i for i in range(6)]
CODECS = {".avi": "MJPG", ".mkv": "mp4v", ".mov": "mp4v", ".mp4": "mp4v", ".wmv": "WMV2", ".m4v": "mp4v"}
NEAR = 4  # grey levels that these codecs are off by, of steps of 40


def write_video(path: Path, greys=GREYS, size: tuple[int, int] = (64, 48), fps: float = 10.0) -> Path:
    """A video of plain grey frames."""
    code = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
    writer = cv2.VideoWriter(str(path.absolute()), cv2.CAP_FFMPEG, code, fps, size)
    assert writer.isOpened()
    for grey in greys:
        writer.write(np.full((size[1], size[0], 3), grey, np.uint8))
    writer.release()
    return path


def greys_of(source: Path | str, stride: int = 1) -> list[float]:
    """The mean of each frame."""
    with opened(source, stride) as clip:
        return [float(frame.mean()) for frame in clip.frames]


@pytest.mark.parametrize("suffix", CODECS)
def test_every_frame_is_read_in_order(tmp_path, suffix):
    path = write_video(tmp_path / f"clip{suffix}")
    np.testing.assert_allclose(greys_of(path), GREYS, atol=NEAR)
    with opened(path) as clip:
        assert (clip.fps, clip.count) == (10, 6)


def test_an_animation_is_a_video(tmp_path):
    frames = cv2.Animation()
    frames.frames, frames.durations = [np.full((48, 64, 3), g, np.uint8) for g in GREYS], [100] * 6
    assert cv2.imwriteanimation(str(tmp_path / "a.gif"), frames)
    np.testing.assert_allclose(greys_of(tmp_path / "a.gif"), GREYS, atol=NEAR)


def test_a_stride_takes_the_last_of_so_many_frames_and_keeps_the_time(tmp_path):
    path = write_video(tmp_path / "clip.avi")
    np.testing.assert_allclose(greys_of(path, 2), [40, 120, 200], atol=NEAR)
    np.testing.assert_allclose(greys_of(path, 4), [120], atol=NEAR)
    assert greys_of(path, 7) == []
    with opened(path, 2) as clip:
        assert (clip.fps, clip.count) == (5, 3)


def test_colours_are_red_green_blue(tmp_path):
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 255
    with film(tmp_path / "red.mp4", False, 10) as add:
        add(red)
    with opened(tmp_path / "red.mp4") as clip:
        (frame,) = clip.frames
    np.testing.assert_allclose(frame.mean((0, 1)), [255, 0, 0], atol=NEAR)


@pytest.mark.parametrize("size", [(64, 48), (63, 47), (1, 1), (1, 300), (15, 17)])
def test_a_film_of_any_shape_has_all_its_frames(tmp_path, size):
    with film(tmp_path / "deep/x.mp4", False, 29.97) as add:
        for grey in GREYS:
            add(np.full((size[1], size[0], 3), grey, np.uint8))
    np.testing.assert_allclose(greys_of(tmp_path / "deep/x.mp4"), GREYS, atol=NEAR)
    with opened(tmp_path / "deep/x.mp4") as clip:
        assert clip.fps == pytest.approx(29.97, abs=1e-3)  # three decimals are written
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.mp4"]


@pytest.mark.parametrize("fps", [0.1, 23.976, 1000 / 3, 599.99])
def test_a_film_of_any_speed_can_be_written(tmp_path, fps):
    with film(tmp_path / "x.mp4", False, fps) as add:
        add(np.zeros((48, 64, 3), np.uint8))
    with opened(tmp_path / "x.mp4") as clip:
        assert clip.fps == pytest.approx(fps, rel=1e-3)


def test_a_frame_of_another_size_gets_that_of_the_first(tmp_path):
    with film(tmp_path / "x.mp4", False, 10) as add:
        add(np.zeros((48, 64, 3), np.uint8))
        add(np.full((96, 32, 3), 200, np.uint8))
    np.testing.assert_allclose(greys_of(tmp_path / "x.mp4"), [0, 200], atol=NEAR)


def test_a_film_that_fails_is_not_there_and_one_that_is_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"

    def fail() -> None:
        with film(path, True, 10) as add:
            add(np.zeros((48, 64, 3), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="already exists"), film(path, False, 10):
        pass
    with pytest.raises(Unusable, match="no video of 20000x20"), film(path, True, 10) as add:
        add(np.zeros((20, 20000, 3), np.uint8))
    assert path.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_a_film_that_lacks_frames_is_an_error_of_the_disk(tmp_path, monkeypatch):
    class Lossy:
        fourcc = cv2.VideoWriter.fourcc

        def __init__(self, *given: object) -> None:
            self.inner = writer(*given)
            self.isOpened, self.release = self.inner.isOpened, self.inner.release

        def write(self, image: np.ndarray) -> None:
            if image.mean() < 100:
                self.inner.write(image)

    writer = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", Lossy)

    def make() -> None:
        with film(tmp_path / "x.mp4", False, 10) as add:
            for grey in GREYS:
                add(np.full((48, 64, 3), grey, np.uint8))

    with pytest.raises(InputError, match="3 of 6 frames") as caught:
        make()
    assert not isinstance(caught.value, Unusable)  # the next one would fare no better
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile real.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nreal.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "no video at all", "",
    ],
)  # fmt: skip
def test_a_list_of_other_files_is_no_video(tmp_path, monkeypatch, text):
    write_video(tmp_path / "real.mp4")
    monkeypatch.chdir(tmp_path)
    for suffix in (".mp4", ".avi", ".ts", ".mov"):
        path = Path(f"clip{suffix}")
        path.write_text(text)
        with pytest.raises(Unusable, match=f"clip{suffix} is not a video"), opened(path):
            pass
    assert OPTIONS not in os.environ  # the user's own programs are left alone


def test_a_path_that_looks_like_an_address_or_a_pattern_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("http:").mkdir()
    write_video(Path("http:/x%02d.mp4"))
    assert len(greys_of(Path("http:/x%02d.mp4"))) == 6
    cv2.imwrite("pic01.mp4.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(Unusable, match="not a video"), opened(Path("pic%02d.mp4.png")):
        pass


def test_frames_larger_than_any_image_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr("dsconvert.scoring.video.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(Unusable, match="64x48 pixels, larger"), opened(path):
        pass


def test_a_stream_is_read_where_it_is_named(tmp_path):
    write_video(tmp_path / "clip.mp4")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://user:secret@127.0.0.1:{server.server_port}/clip.mp4?key=1"
        np.testing.assert_allclose(greys_of(address), GREYS, atol=NEAR)
        server.shutdown()


def test_a_stream_that_is_not_there_is_named_without_its_secrets():
    with pytest.raises(Unusable) as caught, opened("http://user:secret@127.0.0.1:9/live?key=1"):
        pass
    assert str(caught.value) == "The stream http://127.0.0.1:9/live cannot be opened."
    with pytest.raises(Unusable, match="webcam 998 cannot be opened"), opened("998"):
        pass


def test_names_of_live_sources():
    assert (live_name("0"), live_stem("0")) == ("webcam 0", "0")
    address = "rtsp://user:pa/ss@cam.local:554/../h264?token=abc"
    assert "user" not in live_stem("rtsp://user:pw@cam.local:554/h264?token=abc")
    assert live_stem("rtsp://user:pw@cam.local:554/h264?token=abc") == "cam.local_554_h264"
    assert "/" not in live_stem(address)
    assert live_stem("http://x/" + "a" * 500) == ("x_" + "a" * 500)[:60]
    assert live_stem("http://@/..") == "stream"
