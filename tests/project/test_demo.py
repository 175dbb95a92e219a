"""The embedded demo: drawn scenes, the data set made of them, the target assignment, the checkpoint."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
import scenes
import torch
from conftest import DEMO
from looks import LOOKS
from make_dataset import SPLITS, write_scene
from make_dataset import main as make_dataset
from train import batch_of, new_network

from dsconvert.photos.dataset import read_data_yaml
from dsconvert.photos.images import read_image
from dsconvert.photos.labels import label_path, read_labels
from dsconvert.scoring.accuracy import evaluate_predictors
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import decode

NOTHING = -1e6  # a canvas value no object has


def bounding_box(solid):
    """x1, y1, x2, y2 of the true pixels, the far edges exclusive."""
    ys, xs = np.nonzero(solid)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def pixel_boxes(labels):
    """Labels in 0..1 -> x1, y1, x2, y2 in pixels."""
    centre, half = labels[:, 1:3].astype(float), labels[:, 3:].astype(float) / 2
    return np.concatenate((centre - half, centre + half), 1) * scenes.SIDE


def test_a_scene_follows_from_its_seed_and_not_from_global_state():
    np.random.seed(1)
    first = scenes.draw_scene(41)
    np.random.seed(2)
    scenes.draw_scene(42)
    again, other = scenes.draw_scene(41), scenes.draw_scene(43)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_labels_lie_inside_the_image_and_every_class_is_drawn():
    seen = set()
    for seed in range(60):
        image, labels = scenes.draw_scene(seed)
        assert image.shape == (scenes.SIDE, scenes.SIDE, 3)
        assert image.dtype == np.uint8
        assert 1 <= len(labels) <= 7
        boxes = pixel_boxes(labels)
        np.testing.assert_allclose(boxes, np.rint(boxes), atol=1e-3)
        assert boxes.min() > -1e-3
        assert boxes.max() < scenes.SIDE + 1e-3
        sides = boxes[:, 2:] - boxes[:, :2]
        assert sides.min() >= 8  # a cone may be narrow, nothing vanishes
        assert sides.max() <= scenes.LARGEST + 1e-3
        seen.update(labels[:, 0].astype(int).tolist())
    assert seen == set(range(len(scenes.NAMES)))


def test_boxes_are_tight_on_what_was_drawn(monkeypatch):
    empty = np.full((scenes.SIDE, scenes.SIDE, 3), NOTHING, np.float32)
    monkeypatch.setattr(scenes, "_background", lambda rng: empty.copy())
    monkeypatch.setattr(scenes, "_shadow", lambda *args: None)
    monkeypatch.setattr(scenes, "_photograph", lambda canvas, rng: canvas)
    alone = 0
    for seed in range(120):
        canvas, labels = scenes.draw_scene(seed)
        solid = canvas[..., 0] > NOTHING / 2  # more object than background
        boxes = np.rint(pixel_boxes(labels)).astype(int)
        covered = np.zeros_like(solid)
        for x1, y1, x2, y2 in boxes:
            covered[y1:y2, x1:x2] = True
        assert not (solid & ~covered).any()
        together = [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]
        assert bounding_box(solid) == together  # nothing hides an outermost edge: what covers it is solid there
        alone += len(labels) == 1
    assert alone >= 5  # scenes whose one box was therefore compared exactly


def test_no_object_is_mostly_hidden(monkeypatch):
    flat = np.zeros((scenes.SIDE, scenes.SIDE, 3), np.float32)
    counter = iter(range(1, 10**6))

    def numbered(painter):
        def paint(size, rng):
            mask, colours = painter(size, rng)
            drawn = (mask > 0.5).astype(np.float32)
            number = next(counter)
            areas[number] = drawn.sum()
            return drawn, np.full_like(colours, number)

        return paint

    areas: dict[int, float] = {}
    monkeypatch.setattr(scenes, "_background", lambda rng: flat.copy())
    monkeypatch.setattr(scenes, "_shadow", lambda *args: None)
    monkeypatch.setattr(scenes, "_photograph", lambda canvas, rng: canvas)
    monkeypatch.setattr(scenes, "PAINTERS", tuple(numbered(p) for p in scenes.PAINTERS))
    for seed in range(40):
        canvas, labels = scenes.draw_scene(seed)
        numbers, counts = np.unique(np.rint(canvas[..., 0]), return_counts=True)
        visible = {int(n): c for n, c in zip(numbers, counts, strict=True) if n > 0}
        assert len(visible) == len(labels)
        assert all(c >= scenes.LEAST_VISIBLE * areas[n] for n, c in visible.items())


@pytest.mark.parametrize(("split", "index"), [("train", 0), ("train", 299), ("calib", 63), ("val", 0), ("val", 57)])
def test_the_committed_files_are_the_scenes_of_their_seeds(split, index):
    image, labels = scenes.draw_scene(SPLITS[split][0] + index)
    path = DEMO / "images" / split / f"{index:04d}.jpg"
    committed = read_image(path).astype(int)
    assert np.abs(committed - image.astype(int)).mean() < 6  # sensor noise is what JPEG loses
    smooth = [cv2.blur(i.astype(np.float32), (9, 9)) for i in (committed, image)]
    assert np.abs(smooth[0] - smooth[1]).mean() < 1
    np.testing.assert_allclose(read_labels(label_path(path), 6), labels, atol=1e-6)


def test_make_dataset_writes_the_splits_it_declares(tmp_path, monkeypatch):
    monkeypatch.setattr("make_dataset.SPLITS", {s: (first, 2) for s, (first, _) in SPLITS.items()})
    monkeypatch.setattr("sys.argv", ["make_dataset.py", "--out", str(tmp_path)])
    make_dataset()
    assert (tmp_path / "data.yaml").read_bytes() == (DEMO / "data.yaml").read_bytes()
    for split in SPLITS:
        for index in range(2):
            name = f"labels/{split}/{index:04d}.txt"
            assert (tmp_path / name).read_text() == (DEMO / name).read_text()
            assert (tmp_path / "images" / split / f"{index:04d}.jpg").stat().st_size > 0


def test_other_looks_are_the_same_scenes_with_less_contrast(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir(parents=True)
    means, spreads = {}, {}
    for look in LOOKS:
        write_scene(tmp_path, "val", 3, look)
        image = read_image(tmp_path / "images/val/0003.jpg").astype(float)
        means[look], spreads[look] = image.mean(), cv2.blur(image, (9, 9)).std()
        assert (tmp_path / "labels/val/0003.txt").read_text() == (DEMO / "labels/val/0003.txt").read_text()
    assert means["night"] < 0.6 * means["day"]
    assert means["fog"] > means["day"]
    assert spreads["night"] < spreads["day"]
    assert spreads["fog"] < 0.6 * spreads["day"]


def test_the_data_set_is_complete_and_its_splits_share_no_seed():
    data = read_data_yaml(DEMO / "data.yaml")
    assert data.names == scenes.NAMES
    assert (len(data.train), len(data.val)) == (300, 100)
    ranges = sorted((first, first + count) for first, count in SPLITS.values())
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    for split, (_, count) in SPLITS.items():
        images = sorted((DEMO / "images" / split).iterdir())
        assert len(images) == count
        assert all(len(read_labels(label_path(p), 6)) for p in images)
    files = [p for p in DEMO.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 15e6


def test_mirrored_batches_mirror_their_boxes():
    image, labels = scenes.draw_scene(5)
    images, boxes = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(0)
    mirrored = 0
    for _ in range(12):
        batch, targets = batch_of(images, [boxes], torch.tensor([0]), generator)
        straight = torch.allclose(targets[:, 2], boxes[:, 1])
        expected = boxes[:, 1] if straight else 1 - boxes[:, 1]
        torch.testing.assert_close(targets[:, 2], expected)
        torch.testing.assert_close(targets[:, 3:], boxes[:, 2:])
        shown = batch[0] if straight else batch[0].flip(2)
        gain = shown.mean((1, 2)) / (images[0].float() / 255).mean((1, 2))
        torch.testing.assert_close(shown, (images[0] / 255 * gain[:, None, None]), atol=0.08, rtol=0)
        mirrored += not straight
    assert 0 < mirrored < 12


def test_the_checkpoint_is_the_declared_network():
    loaded = load_checkpoint(DEMO / "demo.pt")
    assert loaded.head.names == scenes.NAMES
    assert loaded.head.strides == (8, 16, 32)
    fresh = new_network(loaded.network.config)
    torch.testing.assert_close(fresh.detect.anchors, loaded.network.detect.anchors, rtol=1e-3, atol=0)  # float16
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in loaded.network.state_dict().items()
    }


def test_the_checkpoint_finds_the_objects():
    loaded = load_checkpoint(DEMO / "demo.pt")

    def predict(batch):
        with torch.inference_mode():
            return decode(loaded.network(torch.from_numpy(batch)), loaded.head).numpy()

    paths = read_data_yaml(DEMO / "data.yaml").val[:30]
    (found,) = evaluate_predictors([predict], paths, scenes.SIDE, len(scenes.NAMES))
    assert found.map50_95 > 0.7  # 0.80 on all hundred when it was trained
