"""dsconvert detect as a user types it: videos, live sources, crops, folders of runs, odd images, what is never lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from dataclasses import replace
from pathlib import Path

import click
import cv2
import numpy as np
import pytest
from pt_writer import yolov5_bytes
from test_detect_video import write_video

import dsconvert.scoring.video as video
from dsconvert.commands.cli import main
from dsconvert.commands.detect import detect, spread_classes
from dsconvert.export.onnx import Ends, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.photos.images import read_image
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.detect import DetectOptions, find
from dsconvert.scoring.saving import crop
from dsconvert.scoring.video import opened

SMALL = ("--imgsz", "64")


@pytest.fixture
def clips(work) -> Path:
    """The folder `work`, and in clips/ a video of six frames."""
    (work / "clips").mkdir()
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(
        str(work / "clips/clip.avi"), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (100, 80)
    )
    for _ in range(6):
        writer.write(cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (100, 80)))
    writer.release()
    return work


def expected(folder: Path, stride: int = 1) -> list[int]:
    """How many objects best.pt finds in each frame of the clip."""
    candidate = load_candidate(folder / "best.pt", 64)
    with opened(folder / "clips/clip.avi", stride) as clip:
        return [len(find(candidate.predict, frame, 64, DetectOptions())) for frame in clip.frames]


def frames_in(path: Path) -> int:
    with opened(path) as clip:
        return len(list(clip.frames))


def test_a_video_is_drawn_and_its_frames_have_label_files(clips, call):
    wanted = ("--save-txt", "--save-json", "--save-crop", "--json", *SMALL)
    done = call("detect", "best.pt", "clips/clip.avi", *wanted, cwd=clips)
    assert done.code == 0, done.err
    folder, counts, summary = clips / "runs/detect/exp", expected(clips), json.loads(done.out)
    assert min(counts) > 0
    assert frames_in(folder / "clip.mp4") == 6
    texts = [(folder / "labels" / f"clip_{i}.txt").read_text() for i in range(1, 7)]
    assert [len(t.splitlines()) for t in texts] == counts
    assert len(list((folder / "labels").iterdir())) == 6
    document = json.loads((folder / "detections.json").read_text())
    assert [i["file_name"] for i in document["images"]] == [f"clip_{i}.jpg" for i in range(1, 7)]
    assert len(document["annotations"]) == summary["detections"] == sum(counts)
    assert len(list((folder / "crops").glob("*/clip*.jpg"))) == sum(counts)
    assert (summary["images"], summary["videos"], summary["frames"], summary["skipped"]) == (0, 1, 6, [])
    (file,) = summary["files"]
    assert file == {
        "path": "clips/clip.avi", "detections": sum(counts), "frames": 6,
        "video": "runs/detect/exp/clip.mp4", "labels": "runs/detect/exp/labels",
    }  # fmt: skip
    again = call("detect", "best.pt", "clips", "--save-txt", "--out", "runs/detect/exp", *SMALL, cwd=clips)
    assert (again.code, "already exists" in again.err) == (2, True)


def test_labels_of_frames_are_not_overwritten_and_a_stride_looks_at_fewer(clips, call):
    done = call("detect", "best.pt", "clips", "--save-txt", "--nosave", "--vid-stride", "2", "--out", "o", *SMALL,
                cwd=clips)  # fmt: skip
    assert done.code == 0, done.err
    assert "in 3 frames of 1 video" in done.out
    assert f"Found {sum(expected(clips, 2))} objects" in done.out
    assert sorted(p.name for p in (clips / "o/labels").iterdir()) == [f"clip_{i}.txt" for i in (1, 2, 3)]
    assert [p.name for p in (clips / "o").iterdir()] == ["labels"]
    (clips / "o/labels/clip_1.txt").write_text("mine")
    again = call("detect", "best.pt", "clips", "--save-txt", "--nosave", "--out", "o", *SMALL, cwd=clips)
    assert (again.code, "clip_1.txt already exists" in again.err) == (2, True)
    assert (clips / "o/labels/clip_1.txt").read_text() == "mine"


def test_images_and_videos_of_one_name_get_files_of_their_own(clips, call):
    for name in ("clip.mov", "clip.mp4"):
        write_video(clips / "clips" / name, [0, 0])
    for name in ("clip.jpg", "clip_1.jpg", "clip.png"):
        cv2.imwrite(str(clips / "clips" / name), read_image(clips / "images/val/0.jpg"))
    done = call("detect", "best.pt", "clips", "--save-txt", "--out", "o", "--verbose", *SMALL, cwd=clips)
    assert done.code == 0, done.err
    pictures = {"clip.jpg", "clip_1.jpg", "clip.png", "clip.mp4", "clip.mov.mp4", "clip.mp4.mp4"}
    assert {p.name for p in (clips / "o").iterdir()} == pictures | {"labels"}
    labels = {p.name for p in (clips / "o/labels").iterdir()}
    frames = {f"clip.{kind}_{i}.txt" for kind, n in (("avi", 6), ("mov", 2), ("mp4", 2)) for i in range(1, n + 1)}
    assert len(labels) == 3 + 6 + 2 + 2
    assert {"clip.txt", "clip_1.txt", "clip.png.txt"} <= labels
    assert labels - {"clip.txt", "clip_1.txt", "clip.png.txt"} <= frames | {f"clip_{i}.txt" for i in range(1, 7)}
    assert "3 images and 10 frames of 3 videos" in done.out


def test_a_webcam_goes_on_until_ctrl_c_and_what_it_showed_is_kept(clips, call, monkeypatch):
    class Camera:
        """The clip, again and again, and Ctrl-C in the middle of the ninth frame."""

        def __init__(self) -> None:
            self.inner, self.seen = cv2.VideoCapture(str(clips / "clips/clip.avi")), 0
            self.isOpened, self.release, self.retrieve = self.inner.isOpened, self.inner.release, self.inner.retrieve

        def get(self, what: int) -> float:
            return 0.0 if what == cv2.CAP_PROP_FPS else self.inner.get(what)

        def grab(self) -> bool:
            self.seen += 1
            if self.seen == 9:
                raise KeyboardInterrupt
            if self.seen == 7:
                self.inner.set(cv2.CAP_PROP_POS_FRAMES, 0)
            return self.inner.grab()

    real = video.capture_of
    monkeypatch.setattr(video, "capture_of", lambda source: Camera() if source == "0" else real(source))
    done = call("detect", "best.pt", "--source", "0", "--save-txt", "--json", *SMALL, cwd=clips)
    assert done.code == 0, done.err
    assert "Stopped after 8 frames" in done.err
    summary = json.loads(done.out)
    assert summary["files"][0]["path"] == "webcam 0"
    assert frames_in(clips / "runs/detect/exp/0.mp4") == summary["frames"] == 8
    assert (clips / "runs/detect/exp/labels/0_8.txt").is_file()
    counts = expected(clips)
    assert summary["detections"] == sum(counts) + sum(counts[:2])
    refused = call("detect", "best.pt", "0", "--save-json", *SMALL, cwd=clips)
    assert (refused.code, "--save-json" in refused.err) == (2, True)


def test_a_live_source_that_cannot_be_opened_is_one_sentence(clips, call):
    for source in ("997", "rtsp://me:secret@127.0.0.1:9/x"):
        done = call("detect", "best.pt", source, *SMALL, cwd=clips)
        assert (done.code, done.out) == (2, "")
        assert "cannot be opened" in done.err
        assert "secret" not in done.err
    assert not (clips / "runs").exists()


def test_what_cannot_be_used_is_left_out_and_counted(clips, call):
    folder = clips / "images/val"
    names = ["n" * 236 + ".jpg", "wide.jpg", "x" * 251 + ".jpg", "huge.png", "empty.jpg", "half.mp4"]
    for name in names[:1] + names[2:3]:
        (folder / name).write_bytes((folder / "0.jpg").read_bytes())
    wide = cv2.imencode(".png", np.zeros((2, 70_000, 3), np.uint8))[1]
    (folder / "wide.jpg").write_bytes(wide.tobytes())  # a PNG file under another name; no JPEG is that wide
    huge = bytearray(cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    (folder / "huge.png").write_bytes(huge)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.mp4").write_bytes(b"\0" * 100)
    done = call("detect", "best.pt", "images", "--save-txt", "--out", "o", "--json", *SMALL, cwd=clips)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert {Path(s["path"]).name for s in summary["skipped"]} == {"wide.jpg", "huge.png", "empty.jpg", "half.mp4"}
    assert "4 images and videos were left out; the first: " in done.err
    assert summary["images"] == 6  # names of 240 and 255 bytes are as good as others
    assert {p.name for p in (clips / "o").glob("*.jpg")} == {*(f"{i}.jpg" for i in range(4)), names[0], names[2]}
    assert len(list((clips / "o/labels").iterdir())) == 6
    only = call("detect", "best.pt", *(folder / n for n in names[1:2] + names[3:]), "--out", "p", *SMALL, cwd=clips)
    assert (only.code, only.out) == (2, "")
    assert "None of the 4 images and videos could be used" in only.err
    assert not list(clips.glob("p/*.*"))


def test_a_video_that_is_cut_short_is_used_as_far_as_it_goes(clips, call):
    whole = write_video(clips / "whole.avi", [0, 100] * 20)
    (clips / "half.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    done = call("detect", "best.pt", "half.avi", "--json", *SMALL, cwd=clips)
    assert done.code == 0, done.err
    frames = json.loads(done.out)["frames"]
    assert 0 < frames < 38
    assert f"half.avi says it has 40 frames; {frames} could be read" in done.err
    assert frames_in(clips / "runs/detect/exp/half.mp4") == frames
    assert "says it has" not in call("detect", "best.pt", "whole.avi", *SMALL, cwd=clips).err


def test_a_label_whose_name_would_be_too_long_leaves_its_image_out(clips, call):
    for suffix in (".jpg", ".png"):  # the second's label keeps the suffix: 251 + 8 bytes
        cv2.imwrite(str(clips / "images/val" / ("y" * 251 + suffix)), np.zeros((8, 8, 3), np.uint8))
    done = call("detect", "best.pt", "images", "--save-txt", "--out", "o", "--json", *SMALL, cwd=clips)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert [s["reason"].rpartition(": ")[2] for s in summary["skipped"]] == ["File name too long."]
    assert summary["images"] == 5
    assert not (clips / "o" / ("y" * 251 + ".png")).exists()


def test_a_full_disk_is_no_odd_image(clips, call, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = call("detect", "best.pt", "images", *SMALL, cwd=clips)
    assert done.code == 2
    assert "0.jpg cannot be written: No space left on device" in done.err
    assert not (clips / "runs").exists()


def test_crops_are_cut_as_yolov5_cuts_them(clips, call):
    done = call("detect", "best.pt", "images/val/0.jpg", "--save-crop", "--nosave", "--out", "o", *SMALL, cwd=clips)
    assert done.code == 0, done.err
    image = read_image(clips / "images/val/0.jpg")
    found = find(load_candidate(clips / "best.pt", 64).predict, image, 64, DetectOptions())
    for kind, name in enumerate(("cat", "dog")):
        boxes = found[found[:, 5] == kind]
        files = [clips / "o/crops" / name / f"0{i if i > 1 else ''}.jpg" for i in range(1, len(boxes) + 1)]
        assert sorted((clips / "o/crops" / name).iterdir()) == sorted(files)
        for file, box in zip(files, boxes.tolist(), strict=True):
            assert read_image(file).shape == crop(image, box[:4]).shape
    again = call("detect", "best.pt", "images/val/1.jpg", "--save-crop", "--nosave", "--out", "o", *SMALL, cwd=clips)
    assert (again.code, "already holds crops" in again.err) == (2, True)


def test_a_crop_is_the_box_its_fiftieth_and_ten_pixels():
    image = np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3).astype(np.uint8)
    # 50 and 20 wide and high: 51 + 10 and 20.4 + 10 around (75, 50)
    np.testing.assert_array_equal(crop(image, [50, 40, 100, 60]), image[34:65, 44:105])
    np.testing.assert_array_equal(crop(image, [-5, 90, 2, 120]), image[84:100, 0:7])
    assert crop(image[:1, :1], [0, 0, 1, 1]).shape == (1, 1, 3)


def test_names_of_classes_lead_nowhere(clips, call, tiny):
    network, head = tiny
    (clips / "bad.pt").write_bytes(yolov5_bytes(network, replace(head, names=["../../x", "..  x"])))
    done = call("detect", "bad.pt", "images", "--save-crop", "--nosave", "--out", "o/p", *SMALL, cwd=clips)
    assert done.code == 0, done.err
    assert [p.name for p in (clips / "o").iterdir()] == ["p"]
    assert sorted(p.name for p in (clips / "o/p/crops").iterdir()) == ["_.._x", "x"]


def test_the_folder_is_named_as_yolov5_names_it(clips, call):
    def run(*options: str) -> int:
        return call("detect", "best.pt", "images/val/0.jpg", *SMALL, *options, cwd=clips).code

    assert [run("--name", "day"), run("--name", "day"), run("--project", "out"), run()] == [0] * 4
    for folder in ("runs/detect/day", "runs/detect/day2", "out/exp", "runs/detect/exp"):
        assert [p.name for p in (clips / folder).iterdir()] == ["0.jpg"]
    assert run("--name", "day", "--exist-ok") == 2  # 0.jpg is there
    assert run("--name", "day", "--exist-ok", "--force") == 0
    assert run("--name", "new", "--exist-ok") == 0
    assert not (clips / "runs/detect/day3").exists()
    for wrong in (["--out", "o", "--name", "x"], ["--out", "o", "--exist-ok"], ["--name", ".."], ["--name", ""]):
        assert run(*wrong) == 2


def _claim(gate, results) -> None:
    gate.wait()
    try:
        main(["detect", "best.pt", "images", "--imgsz", "64", "--threads", "1", "--quiet"])
        results.put(0)
    except SystemExit as end:
        results.put(end.code)


@pytest.mark.long
def test_several_at_once_each_have_a_folder(clips, monkeypatch):
    monkeypatch.chdir(clips)
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(3), context.Queue()
    several = [context.Process(target=_claim, args=(gate, results)) for _ in range(3)]
    for one in several:
        one.start()
    codes = [results.get() for _ in several]
    for one in several:
        one.join()
    assert codes == [0, 0, 0]
    for folder in ("exp", "exp2", "exp3"):
        assert sorted(p.name for p in (clips / "runs/detect" / folder).iterdir()) == [f"{i}.jpg" for i in range(4)]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_users_own_pictures_are_never_replaced(clips, call, force):
    def whole() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in clips.rglob("*") if p.is_file()}

    os.symlink("val", clips / "images/album")
    (clips / "images/list.txt").write_text("val/0.jpg\n")
    (clips / "other").mkdir()
    os.link(clips / "images/val/0.jpg", clips / "other/0.jpg")
    (clips / "detections.json").hardlink_to(clips / "best.pt")
    before = whole()
    for sources, out in [
        (["images/val"], "images/val"), (["images/val"], "images/album"), (["images/val/0.jpg"], "images/val"),
        (["images/val/0.jpg"], "images/album"), (["images/val/0.jpg"], "other"), (["images/list.txt"], "images/val"),
        (["images/val/*.jpg"], "images/val"), (["data.yaml"], "images/val"), (["images/val/0.jpg", "--save-json"], "."),
    ]:  # fmt: skip
        done = call("detect", "best.pt", *sources, "--out", out, *force, *SMALL, cwd=clips)
        assert done.code == 2, (sources, out)
        assert "is an input" in done.err, (sources, out)
        assert whole() == before


def test_nothing_but_an_ordinary_file_is_replaced(clips, call):
    (clips / "o").mkdir()
    os.mkfifo(clips / "o/0.jpg")
    done = call("detect", "best.pt", "images/val/0.jpg", "--out", "o", "--force", *SMALL, cwd=clips)
    assert (done.code, "not an ordinary file" in done.err) == (2, True)
    (clips / "o/1.jpg").symlink_to(clips / "somewhere")
    done = call("detect", "best.pt", "images/val/1.jpg", "--out", "o", "--force", *SMALL, cwd=clips)
    assert (done.code, "it is a link" in done.err) == (2, True)


WITH_VALUE = {"--classes", "--source", "--conf-thres", "--out"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("m x --classes 0 2", "m x --classes 0 --classes 2"),
        ("m x --classes 0 2 --nosave", "m x --classes 0 --classes 2 --nosave"),
        ("m x --classes person dog", "m x --classes person --classes dog"),
        ("m --classes 0 2 x", "m --classes 0 --classes 2 x"),
        ("--classes 0,1 2 m x", "--classes 0,1 --classes 2 m x"),
        ("m --classes person x", "m --classes person x"),
        ("--classes person m x", "--classes person m x"),
        ("m --classes person dog --source x", "m --classes person --classes dog --source x"),
        ("m --source=x --classes person dog", "m --source=x --classes person --classes dog"),
        ("m --source x --classes=0 2", "m --source x --classes=0 --classes 2"),
        ("m x --conf-thres 0.5 --classes 1", "m x --conf-thres 0.5 --classes 1"),
        ("m --out o --classes person x", "m --out o --classes person x"),
        ("m x --classes 0 -- 2", "m x --classes 0 -- 2"),
        ("m x --classes", "m x --classes"),
    ],
)
def test_classes_are_all_words_up_to_the_next_option(typed, meant):
    assert spread_classes(typed.split(), WITH_VALUE) == meant.split()


def test_classes_as_yolov5_takes_them(clips, call):
    def kinds(*options: str) -> set[str]:
        done = call("detect", "best.pt", *options, "--nosave", "--json", *SMALL, cwd=clips)
        assert done.code == 0, done.err
        return {c["name"] for c in json.loads(done.out)["classes"]}

    assert kinds("--source", "images", "--classes", "0", "1") == {"cat", "dog"}
    assert kinds("--source", "images", "--classes", "1") == {"dog"}
    assert kinds("images", "--classes", "cat", "dog") == {"cat", "dog"}
    assert kinds("--classes", "0", "--source", "images") == {"cat"}
    assert kinds("images", "--classes", "0", "--classes", "dog") == {"cat", "dog"}
    assert kinds("images", "--source", "clips/clip.avi", "--classes", "0,1") == {"cat", "dog"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--half"], "no float16 input"), (["--view-img"], "opens no windows"), (["--vid-stride", "0"], "--vid-stride"),
        (["--device", "cuda"], "--device cuda"), (["--augment"], "No such option"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_met_are_one_sentence(clips, call, monkeypatch, options, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = call("detect", "best.pt", "images", *options, *SMALL, cwd=clips)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_half_is_for_files_that_take_it_and_other_devices_for_checkpoints(clips, call, converted, monkeypatch):
    for name, kind in (("half", "float16"), ("plain", "float32")):
        made = export_quantized(converted, layout_named("packed"), 64, Ends(input_type=kind))
        (clips / f"{name}.onnx").write_bytes(made.SerializeToString())
    assert call("detect", "half.onnx", "images", "--half", "--nosave", cwd=clips).code == 0
    assert call("detect", "plain.onnx", "images", "--half", "--nosave", cwd=clips).code == 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    done = call("detect", "half.onnx", "images", "--device", "cuda", cwd=clips)
    assert (done.code, "runs on the CPU here" in done.err) == (2, True)


def test_the_help_lists_what_there_is_and_no_more(call, tmp_path):
    shown = call("detect", "--help", cwd=tmp_path).out
    listed = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.partition("Options:")[2]))
    there = {name for p in detect.params if isinstance(p, click.Option) and not p.hidden for name in p.opts}
    assert {n for n in there if n.startswith("--")} <= listed
    defaults = {"conf_thres": 0.25, "iou_thres": 0.45, "max_det": 1000, "line_thickness": 3, "vid_stride": 1}  # YOLOv5
    assert {p.name: p.default for p in detect.params if p.name in defaults} == defaults
    assert "--view-img" not in shown
