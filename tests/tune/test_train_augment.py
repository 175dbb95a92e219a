"""Training images: boxes follow what they hold, the choices follow the seed, epochs hold every image once."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.photos.images import letterbox
from dsconvert.photos.labels import LabelRules
from dsconvert.tune import photos as photos_module
from dsconvert.tune.augment import NOTHING, Augment, augmented, mirrored, moved, recoloured
from dsconvert.tune.photos import open_photos, order

PLAIN = Augment(hue=0, saturation=0, brightness=0)


def marked(h, w, box, value):
    """A black photo with one bright rectangle, and its box."""
    image = np.zeros((h, w, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = value
    return image, np.array([[value % 7, x1, y1, x2, y2]], float)


def extent(image, value, tolerance=40):
    """Box of the pixels of about that brightness."""
    ys, xs = np.nonzero((image.astype(int)[..., 0] > value - tolerance) & (image.astype(int)[..., 0] > 150))
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_their_rectangles_through_every_change(seed):
    photo = marked(80, 100, (20, 10, 70, 60), 255)
    image, boxes = augmented([photo], Size.of(100), replace(PLAIN, mosaic=0), np.random.default_rng(seed))
    assert image.shape == (100, 100, 3)
    assert len(boxes) == 1
    assert np.abs(np.array(extent(image, 255)) - boxes[0, 1:]).max() <= 1.5


@pytest.mark.parametrize("seed", range(12))
def test_a_mosaic_holds_four_photos_with_their_boxes(seed):
    values = (180, 205, 230, 255)
    four = [marked(70, 100, (10 + 10 * i, 5, 60 + 10 * i, 60), v) for i, v in enumerate(values)]
    image, boxes = augmented(four, Size.of(100), replace(PLAIN, scale=0, place=0), np.random.default_rng(seed))
    assert image.shape == (100, 100, 3)
    assert len(boxes) <= 4
    for kind, *box in boxes.tolist():
        value = next(v for v in values if v % 7 == kind)
        found = (np.abs(image[..., 0].astype(int) - value) < 3).nonzero()
        seen = [found[1].min(), found[0].min(), found[1].max() + 1, found[0].max() + 1]
        np.testing.assert_allclose(seen, box, atol=1.5)


def test_what_is_cut_away_is_left_out():
    boxes = np.array([[0, -50, 0, 10, 100], [1, -99, 10, 1, 20], [2, 10, 10, 60, 60], [3, 90, 90, 91.5, 99]], float)
    image = np.zeros((100, 100, 3), np.uint8)
    _, kept = moved((image, boxes), Size.of(100), NOTHING, np.random.default_rng(0))
    # 1/6 of the first lies inside; of the second a hundredth; the last is narrower than 2 pixels
    assert kept.tolist() == [[0, 0, 0, 10, 100], [2, 10, 10, 60, 60]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [Size(60, 120), Size(120, 60)])
def test_boxes_follow_their_rectangles_in_photos_that_are_no_squares(seed, size):
    gain = min(size.height / 60, size.width / 60)
    photo = marked(int(50 * gain), int(60 * gain), (20, 10, 50, 40), 255)
    image, boxes = augmented([photo], size, replace(PLAIN, mosaic=0), np.random.default_rng(seed))
    assert image.shape == (*size.pair, 3)
    assert np.abs(np.array(extent(image, 255)) - boxes[0, 1:]).max() <= 1.5
    image, boxes = augmented([photo] * 4, size, replace(PLAIN, scale=0), np.random.default_rng(seed))
    assert image.shape == (*size.pair, 3)
    assert (boxes[:, 1:] >= 0).all()
    assert (boxes[:, 3:] <= (size.width, size.height)).all()


def test_targets_are_shares_of_height_and_width(folder):
    """The photo, 80 high and 90 wide, becomes 32 and 36, in the middle of 128."""
    photos = open_photos([folder / "images/4.png"], LabelRules(2), Size(32, 128))
    images, targets = photos.batch([(0, 0)], NOTHING, [0])
    assert images.shape == (1, 3, 32, 128)
    np.testing.assert_allclose(targets, [[0, 1, 0.5, 0.5, 0.4 * 36 / 128, 0.4]], rtol=1e-6)


def test_without_changes_it_is_the_letterbox():
    image, boxes = marked(50, 100, (20, 10, 70, 30), 255)
    made, found = augmented([(image, boxes)], Size.of(100), NOTHING, np.random.default_rng(0))
    np.testing.assert_array_equal(made, letterbox(image, 100)[0])
    assert found.tolist() == [[3, 20, 35, 70, 55]]
    twice = mirrored(mirrored((image, boxes)))
    np.testing.assert_array_equal(twice[0], image)
    np.testing.assert_array_equal(twice[1], boxes)


def test_colours_change_by_their_factors():
    grey = np.full((4, 4, 3), 100, np.uint8)
    seen = {recoloured(grey, Augment(), np.random.default_rng(s))[0, 0, 0] for s in range(60)}
    assert 58 <= min(seen) < 80
    assert 120 < max(seen) <= 140
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    only = recoloured(red, replace(NOTHING, saturation=0.5), np.random.default_rng(1))[0, 0]
    assert only[0] == 200  # brightness is another matter
    assert only[1] == only[2]


@pytest.fixture
def folder(tmp_path):
    """Five labelled photos, one without an object, one that is no image."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), rng.integers(0, 256, (40 + 10 * i, 90, 3), dtype=np.uint8))
        (tmp_path / f"labels/{i}.txt").write_text("1 0.5 0.5 0.4 0.4\n" if i else "")
    (tmp_path / "images/bad.png").write_bytes(b"no picture")
    return tmp_path


def test_batches_follow_from_seed_epoch_and_place_in_memory_or_not(folder, monkeypatch):
    paths = sorted((folder / "images").iterdir())
    kept = open_photos(paths, LabelRules(2), Size.of(64))
    assert len(kept) == 5
    assert len(kept.skipped) == 1
    monkeypatch.setattr(photos_module, "ROOM", 20000)
    read = open_photos(paths, LabelRules(2), Size.of(64))
    assert read.kept is None
    assert kept.kept is not None
    picks = order(5, 4, [0, 1])[0]
    images, targets = kept.batch(picks, Augment(), [0, 1])
    assert images.shape == (4, 3, 64, 64)
    for a, b in zip(read.batch(picks, Augment(), [0, 1]), (images, targets), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    # a process that makes the second half alone makes the same
    half, ours = kept.batch(picks[2:], Augment(), [0, 1])
    torch.testing.assert_close(half, images[2:], rtol=0, atol=0)
    torch.testing.assert_close(ours[:, 1:], targets[targets[:, 0] >= 2][:, 1:], rtol=0, atol=0)
    assert not torch.equal(kept.batch(picks, Augment(), [0, 2])[0], images)
    plain, labels = kept.batch([(0, 3)], NOTHING, [0, 1])
    assert labels.tolist() == [[0, 1, 0.5, 0.5, pytest.approx(0.4), pytest.approx(0.4 * 50 / 64, abs=0.01)]]
    assert (plain * 255 - (plain * 255).round()).abs().max() < 1e-4


def test_an_epoch_holds_every_image_once():
    batches = order(11, 4, [0, 3])
    assert [len(b) for b in batches] == [4, 4]
    assert len({i for b in batches for _, i in b}) == 8
    assert [place for b in batches for place, _ in b] == list(range(8))
    assert {i for _, i in order(3, 8, [0, 1])[0]} == {0, 1, 2}
    assert order(11, 4, [0, 3]) != order(11, 4, [0, 4])


def test_nothing_to_learn_from_is_one_sentence(folder):
    with pytest.raises(InputError, match="have no labels"):
        open_photos([folder / "images/0.png"], LabelRules(2), Size.of(64))
    with pytest.raises(InputError, match="None of the 1 training images"):
        open_photos([folder / "images/bad.png"], LabelRules(2), Size.of(64))
    with pytest.raises(InputError, match="class 1 is not one of the model's 1"):
        open_photos([folder / "images/1.png"], LabelRules(1), Size.of(64))
