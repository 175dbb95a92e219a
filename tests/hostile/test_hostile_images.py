"""Broken and odd images: skipped with a reason, read as what they are, never a crash or a gigabyte."""

from __future__ import annotations

import io
import json
import os

import cv2
import numpy as np
import pytest
from case import Case
from photos import read, refused
from pictures import bad, noise, odd, saved
from PIL import Image
from pt_writer import yolov5_bytes
from watched import dsconvert, problems, run_child, write_cases

from dsconvert.base.errors import InputError
from dsconvert.photos import dataset
from dsconvert.photos.dataset import image_paths
from dsconvert.photos.images import letterbox, read_image
from dsconvert.scoring.accuracy import detect_all


def test_broken_images_are_refused_and_odd_ones_read(tmp_path):
    warm = tmp_path / "warm.png"
    warm.write_bytes(saved(noise(8, 8), "PNG"))
    shapes = {name: shape for name, _, shape in odd()}
    cases = write_cases(bad(), tmp_path / "bad", ".jpg")  # whatever it is: the suffix says nothing
    cases |= write_cases([Case(name, data, None) for name, data, _ in odd()], tmp_path / "odd", ".png")
    results = run_child([("image", warm)], [("image", path) for path in cases])
    found = problems(cases, results)
    assert not found, found
    for case, result in zip(cases.values(), results, strict=True):
        assert case.words is not None or result["text"] == [*shapes[case.name], 3], case.name


def test_what_would_hold_the_machine_is_refused_and_what_goes_in_circles_read(tmp_path):
    """Lists, values and pieces that lie on each other, and pictures that take more memory than their pixels."""
    warm = tmp_path / "warm.png"
    warm.write_bytes(saved(noise(8, 8), "PNG"))
    sides = {name: sides for name, _, sides in read()}
    cases = write_cases(refused(), tmp_path / "bad", ".jpg")
    cases |= write_cases([Case(name, data, None) for name, data, _ in read()], tmp_path / "odd", ".jpg")
    results = run_child([("image", warm)], [("image", path) for path in cases])
    found = problems(cases, results)
    assert not found, found
    for case, result in zip(cases.values(), results, strict=True):
        if case.words is None:
            assert sorted(result["text"][:2]) == sorted(sides[case.name]), case.name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(tmp_path, orientation):
    """As YOLOv5 does, and as people see them."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)  # red at the top left
    turn = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn[orientation](upright)))
    path = tmp_path / "a.jpg"
    path.write_bytes(saved(stored, "JPEG", exif=exif, quality=95, subsampling=0))
    image = read_image(path)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 5  # JPEG's own loss


def test_colours_survive_every_way_of_storing_them(tmp_path):
    picture = Image.new("RGB", (16, 16), (200, 100, 50))
    stored = {"PNG": ("RGBA", 0), "TIFF": ("RGB", 0), "BMP": ("RGB", 0), "JPEG": ("CMYK", 6), "WEBP": ("RGBA", 6)}
    for kind, (mode, off) in stored.items():
        (tmp_path / "a.png").write_bytes(saved(picture.convert(mode), kind))
        assert np.abs(read_image(tmp_path / "a.png").astype(int) - (200, 100, 50)).max() <= off, kind
    deep = np.full((4, 4), 0xABCD, np.uint16)
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(deep), "PNG"))
    assert (read_image(tmp_path / "a.png") == 0xAB).all()  # the upper byte


def test_an_animation_is_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "WEBP"):
        (tmp_path / "a.webp").write_bytes(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(read_image(tmp_path / "a.webp").astype(int) - (255, 0, 0)).max() < 6, kind


def test_every_shape_fits_the_letterbox(tmp_path):
    for width, height in ((1, 1), (20000, 10), (10, 20000), (1, 4000)):
        square, placed = letterbox(np.full((height, width, 3), 7, np.uint8), 64)
        assert square.shape == (64, 64, 3)
        assert (square == 7).any()
        assert placed.gain == 64 / max(width, height)


def test_links_in_circles_and_names_of_any_kind(tmp_path):
    data = saved(noise(8, 8), "PNG")
    for name in ("ünï 字 🎉.png", "-rf.png", "$(touch x).png", "new\nline.png", "[0-9]*.png", "%s%n.png"):
        (tmp_path / name).write_bytes(data)
    os.makedirs(tmp_path / "sub")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "sub/self.png").symlink_to("self.png")
    (tmp_path / "sub/nowhere.png").symlink_to("nothing")
    (tmp_path / "sub/folder.png").mkdir()
    found = image_paths(tmp_path)
    assert len(found) == 6
    assert all(read_image(p).shape == (8, 8, 3) for p in found)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match="no file or folder"):
        image_paths(loop)


def test_a_whole_disk_is_not_looked_through(tmp_path, monkeypatch):
    """Files count, whatever they are called, in all folders together."""
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.png", "sub/c.txt"):
        (tmp_path / name).touch()
    monkeypatch.setattr(dataset, "MOST_FILES", 3)
    assert image_paths(tmp_path) == [tmp_path / "b.png"]
    monkeypatch.setattr(dataset, "MOST_FILES", 2)
    with pytest.raises(InputError, match="more than 2 files"):
        image_paths(tmp_path)


def test_what_may_not_be_read_is_skipped(tmp_path, monkeypatch):
    """Permissions do not bind root, under which this may run: the refusal is played."""
    good, secret, gone = (tmp_path / f"{n}.png" for n in ("good", "secret", "gone"))
    for path in (good, secret):
        path.write_bytes(saved(noise(32, 32), "PNG"))
    fromfile = np.fromfile

    def refuse(path, *args, **kwargs):
        if path == secret:
            raise PermissionError(13, "Permission denied")
        return fromfile(path, *args, **kwargs)

    monkeypatch.setattr(np, "fromfile", refuse)
    assert read_image(good).shape == (32, 32, 3)
    for path in (secret, gone):
        with pytest.raises(InputError, match=f"^{path} cannot be read.$"):
            read_image(path)
    with pytest.raises(InputError, match=r"None of the 2 images could be read; the first: .*secret"):
        detect_all([], [secret, gone], 32, 2)


def test_memory_that_runs_out_in_opencv_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(saved(noise(8, 8), "PNG"))

    def fail(*_):
        raise cv2.error("Insufficient memory")

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(InputError, match="or too large"):
        read_image(tmp_path / "a.png")


def test_commands_skip_count_and_say_why(tiny, tmp_path):
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(*tiny))
    broken = write_cases(bad(), tmp_path / "none", ".jpg")
    write_cases(bad(), tmp_path / "mixed", ".jpg")
    for i in range(2):
        (tmp_path / f"mixed/good{i}.jpg").write_bytes(saved(noise(90, 70), "JPEG"))
    code, _, err = dsconvert(
        tmp_path, "quantize", "best.pt", "--calib", "mixed", "--imgsz", "64", "--bits", "4", "--out", "q"
    )
    assert code == 0, err
    assert f"{len(broken)} images could not be read and were left out; the first: mixed/0.jpg is" in err
    assert json.loads((tmp_path / "q/quantize.json").read_text())["unreadable_images"] == len(broken)
    code, _, err = dsconvert(tmp_path, "eval", "best.pt", "--data", "mixed", "--imgsz", "64", "--json")
    assert code == 0, err
    for command in (["quantize", "best.pt", "--calib", "none"], ["eval", "best.pt", "--data", "none"]):
        code, _, err = dsconvert(tmp_path, *command, "--imgsz", "64")
        assert code == 2
        assert f"None of the {len(broken)} " in err
        assert "images could be read; the first: none/0.jpg is" in err
        assert "Traceback" not in err


def test_pillow_agrees_about_what_is_whole(tmp_path):
    """The end-of-image rule against another decoder: every cut of a JPEG that has lost rows is noticed."""
    data = saved(noise(64, 48), "JPEG", quality=90)
    for cut in range(200, len(data), 37):
        (tmp_path / "a.jpg").write_bytes(data[:cut])
        with pytest.raises(InputError):
            read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(data)
    wanted = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - wanted).max() <= 3  # two decoders' roundings
