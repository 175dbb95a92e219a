"""Label files: where they lie, what their rows are, and what is left out (docs/datasets.md)."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_images import text

from dsconvert.base.errors import InputError
from dsconvert.base.notes import DataWarning
from dsconvert.photos.dataset import read_data_yaml
from dsconvert.photos.labels import Labelled, LabelRules, read_labelled, read_labels
from dsconvert.yolo.classes import label_rules

BOX = "0 0.5 0.5 0.25 0.25\n"


@pytest.fixture(autouse=True)
def no_surprises():
    """Whatever is warned of has to be expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        yield


def labelled(folder: Path, *contents: str | bytes | None, rules: LabelRules | None = None, polygons=False) -> Labelled:
    """Images that need not be there, each with these labels (None: no file)."""
    images = [folder / f"images/{i}.jpg" for i in range(len(contents))]
    (folder / "labels").mkdir(exist_ok=True)
    for i, content in enumerate(contents):
        if content is not None:
            (folder / f"labels/{i}.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    return read_labelled(images, rules or LabelRules(2), polygons)


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    ["1 0.5 0.25 0.5 0.125", "1.0 .5 .25 5e-1 0.125 ", "\t1\t0.5\t0.25\t0.5\t0.125\r", "+1 0.50 0.250 0.5 0.125\n\n  "],
)
def test_ways_to_write_a_row(tmp_path, row):
    assert read_labels(text(tmp_path / "a.txt", row), 2).tolist() == [[1, 0.5, 0.25, 0.5, 0.125]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_number(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(BOX.encode(encoding))
    assert read_labels(tmp_path / "a.txt", 1).tolist() == [[0, 0.5, 0.5, 0.25, 0.25]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("0 1.02 0.5 0.1 0.1", "shares of the image"), ("0 0.5 -0.05 0.1 0.1", "shares of the image"),
        ("0 320 240 64 64", "shares of the image"), ("2 0.5 0.5 0.1 0.1", "class 2 is not one of the model's 2"),
        ("0 0.5 0.5 -0.005 0.1", "not negative"), ("0 0,5 0,5 0,1 0,1", "decimal points, no commas"),
        ("0,0.5,0.5,0.1,0.1", "decimal points, no commas"), ("0 0.5 0.5 0.1 0.1 0.9", "the line has 6 numbers"),
        ("cat 0.5 0.5 0.1 0.1", "a class and four numbers"),
    ],
)  # fmt: skip
def test_an_image_with_a_bad_row_is_left_out_and_named(tmp_path, row, words):
    with pytest.warns(DataWarning, match=rf"^2 of 4 images are left out, .*the first: .*1.txt, line 2: .*{words}"):
        found = labelled(tmp_path, BOX, f"{BOX}{row}\n", None, f"{row}\n")
    assert [p.name for p in found.paths] == ["0.jpg", "2.jpg"]
    assert [len(label.boxes) for label in found.labels] == [1, 0]
    with pytest.raises(InputError, match=f"1.txt, line 2: .*{words}"):
        labelled(tmp_path, BOX, f"{BOX}{row}\n", rules=LabelRules(2, strict=True))
    with pytest.raises(InputError, match=r"^None of the 1 label files can be used; the first: .*0.txt, line 1"):
        labelled(tmp_path, f"{row}\n")


def test_labels_that_stand_twice_count_once(tmp_path):
    with pytest.warns(DataWarning, match="^3 labels stand twice in their file; each counts once"):
        found = labelled(tmp_path, BOX * 3 + "1 0.5 0.5 0.25 0.25\n", "0 0.50 0.5 0.250 .25\n" + BOX)
    assert found.labels[0].boxes.tolist() == [[0, 0.5, 0.5, 0.25, 0.25], [1, 0.5, 0.5, 0.25, 0.25]]
    assert len(found.labels[1].boxes) == 1


def test_pipes_and_huge_files_are_left_out(tmp_path):
    rows = "".join(f"0 {i / 200000:.6f} 0.5 0.1 0.1\n" for i in range(100_001))
    with pytest.warns(DataWarning, match="1 of 2 images are left out, .*has more than 100000 labels"):
        labelled(tmp_path, BOX, rows)
    with pytest.warns(DataWarning, match="it is longer than 8 MiB"):
        labelled(tmp_path, BOX, "0 0.5 0.5 0.1 0.1\n" * 500_000)
    with pytest.warns(DataWarning, match="not a readable label file: it is not text"):
        labelled(tmp_path, BOX, bytes(100))


# --- where they lie ----------------------------------------------------------------------------------------------


def test_the_last_images_of_a_path_becomes_labels_also_behind_links(tmp_path):
    real = tmp_path / "store/images/part"
    real.mkdir(parents=True)
    text(tmp_path / "store/labels/part/a.txt", BOX)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/set").symlink_to(real)
    found = read_labelled([tmp_path / "images/set/a.jpg"], LabelRules(1))
    assert (found.files, len(found.labels[0].boxes)) == (1, 1)
    text(tmp_path / "labels/set/a.txt", BOX + "0 0.1 0.1 0.1 0.1\n")  # the path as it is comes first
    assert len(read_labelled([tmp_path / "images/set/a.jpg"], LabelRules(1)).labels[0].boxes) == 2


def test_labels_beside_the_images_count_where_there_are_no_others(tmp_path):
    images = [tmp_path / f"images/{name}.jpg" for name in ("a", "b")]
    text(tmp_path / "images/a.txt", BOX)
    assert [len(label.boxes) for label in read_labelled(images, LabelRules(1)).labels] == [1, 0]
    text(tmp_path / "labels/b.txt", BOX)
    assert [len(label.boxes) for label in read_labelled(images, LabelRules(1)).labels] == [0, 1]


# --- key points and polygons -------------------------------------------------------------------------------------


def pose(rng: random.Random, points: int, each: int) -> tuple[str, list[float]]:
    """A row of a box and points in it, and the box."""
    w, h = rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4)
    x, y = rng.uniform(w / 2, 1 - w / 2), rng.uniform(h / 2, 1 - h / 2)
    numbers = [x, y, w, h]
    for _ in range(points):
        place = [x + w * rng.uniform(-0.5, 0.5), y + h * rng.uniform(-0.5, 0.5)]
        numbers += place + [2.0] * (each - 2)
    return "0 " + " ".join(f"{v:.6f}" for v in numbers), [round(v, 6) for v in numbers[:4]]


@pytest.mark.parametrize(("points", "each"), [(4, 2), (5, 2), (5, 3), (17, 3), (1, 3), (68, 2)])
@pytest.mark.parametrize("rows", [10, 100])
def test_boxes_with_key_points_are_boxes(tmp_path, points, each, rows):
    rng = random.Random(points * each)
    made = [pose(rng, points, each) for _ in range(rows)]
    with pytest.warns(DataWarning, match=f"boxes with {points} key points of {each} numbers"):
        found = labelled(tmp_path, *(row for row, _ in made))
    np.testing.assert_allclose([label.boxes[0, 1:] for label in found.labels], [box for _, box in made], atol=1e-9)


def test_points_that_are_missing_are_zeros_or_negative(tmp_path):
    face = "0 0.5 0.4 0.2 0.3 0.45 0.35 0.55 0.35 0.5 0.4 -1 -1 -1 -1\n"
    with pytest.warns(DataWarning, match="5 key points of 2"):
        assert labelled(tmp_path, face).labels[0].boxes.tolist() == [[0, 0.5, 0.4, 0.2, 0.3]]
    person = "0 0.5 0.4 0.2 0.3" + " 0.45 0.35 2" * 9 + " 0 0 0" * 8 + "\n"
    with pytest.warns(DataWarning, match="17 key points of 3"):
        assert labelled(tmp_path, person).labels[0].boxes.tolist() == [[0, 0.5, 0.4, 0.2, 0.3]]


@pytest.mark.parametrize("corners", [4, 6, 7, 12])
def test_polygons_of_one_length_stay_polygons(tmp_path, corners):
    """Hexagons have 13 columns, as boxes with four key points do."""
    rng = np.random.default_rng(corners)
    rows, wanted = [], []
    for _ in range(40):
        radius, turn = rng.uniform(0.03, 0.2), rng.uniform(0, 6)
        centre = rng.uniform(radius, 1 - radius, 2)
        angles = turn + np.arange(corners) * 2 * np.pi / corners
        points = np.round(centre + radius * np.stack((np.cos(angles), np.sin(angles)), 1), 6)
        low, high = points.min(0), points.max(0)
        rows.append("0 " + " ".join(map(str, points.flatten().tolist())))
        wanted.append([*(low + high) / 2, *(high - low)])
    found = labelled(tmp_path, *rows)
    np.testing.assert_allclose([label.boxes[0, 1:] for label in found.labels], wanted, atol=1e-9)
    kept = labelled(tmp_path, *rows, polygons=True)
    assert [len(label.rows[0]) for label in kept.labels] == [1 + 2 * corners] * 40


def test_polygons_of_many_lengths_and_boxes_among_them(tmp_path):
    triangle, square = "0 0.25 0.5 0.75 0.25 0.5 1.0", "1 0.1 0.1 0.3 0.1 0.3 0.2 0.1 0.2"
    found = labelled(tmp_path, f"{triangle}\n{BOX}", square, polygons=True)
    assert found.has_polygons
    assert [len(row) for row in found.labels[0].rows] == [7, 5]
    np.testing.assert_allclose(found.labels[1].boxes, [[1, 0.2, 0.15, 0.2, 0.1]])


def test_kpt_shape_decides_and_other_rows_are_neither(tmp_path):
    rules = LabelRules(1, key_points=(4, 2))
    row = "0 0.5 0.5 0.4 0.4" + " 0.4 0.4" * 4 + "\n"
    with pytest.warns(DataWarning) as heard:
        found = labelled(tmp_path, row, BOX, "0 0.1 0.1 0.2 0.1 0.2 0.2\n", rules=rules)
    assert [len(label.boxes) for label in found.labels] == [1, 1]
    assert found.labels[0].boxes.tolist() == [[0, 0.5, 0.5, 0.4, 0.4]]
    said = " ".join(str(w.message) for w in heard)
    assert "2.txt, line 1: a label here is a class, four numbers and 4 key points of 2 numbers each" in said


def test_rows_that_are_neither_are_refused(tmp_path):
    rng = random.Random(0)
    faces = [pose(rng, 5, 2)[0] for _ in range(20)]
    with pytest.warns(DataWarning) as heard:
        found = labelled(tmp_path, *faces, faces[0] + " 0.5")
    assert len(found.paths) == 20
    assert "has 16 numbers" in " ".join(str(w.message) for w in heard)


# --- names of classes --------------------------------------------------------------------------------------------


def rules_for(folder: Path, content: str, names: tuple[str, ...]) -> LabelRules:
    return label_rules(read_data_yaml(text(folder / "d.yaml", content)), names, "best.pt")


def test_the_same_names_in_another_order_are_matched(tmp_path):
    with pytest.warns(DataWarning, match="in another order than best.pt; its labels are matched by name"):
        rules = rules_for(tmp_path, "names: [cat, Traffic_light, dog]\n", ("dog", "cat", "traffic light"))
    assert rules.renumber == (1, 2, 0)
    found = labelled(tmp_path, "0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n", rules=rules)
    assert found.labels[0].boxes[:, 0].tolist() == [1, 0, 2]


def test_other_names_are_said_and_numbers_compared(tmp_path):
    with pytest.warns(DataWarning, match="other classes than best.pt, class 1 cow instead of dog; class numbers are"):
        assert rules_for(tmp_path, "names: [cat, cow]\n", ("cat", "dog")).renumber is None


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("names: [cat, dog]", ("Cat", "dog ")), ("nc: 2", ("cat", "dog")), ("names: ['0', '1']", ("cat", "dog")),
        ("names: [cat, dog]", ("class0", "class1")), ("names: [cat, dog]", ()),
    ],
)  # fmt: skip
def test_the_same_names_and_no_names_are_nothing_to_say(tmp_path, content, names):
    assert rules_for(tmp_path, content + "\n", names).renumber is None
