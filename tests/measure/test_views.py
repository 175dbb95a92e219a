"""Views of few photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.kept import Room
from dsconvert.base.size import Size
from dsconvert.measure.calibration import decoded, with_views
from dsconvert.measure.views import WANTED, view, wanted
from dsconvert.photos.images import letterbox, read_image


def photographs(count: int, side: int) -> torch.Tensor:
    """Smooth pictures, each of one colour that says which it is, brighter to the right."""
    across = torch.linspace(0, 40, side).expand(count, 3, side, side)
    return (across + 50 * torch.arange(count)[:, None, None, None]).to(torch.uint8)


def test_a_mirrored_photograph():
    own = photographs(3, 32)
    for index in range(3):
        assert torch.equal(view(own.__getitem__, 3, index, 0), own[index].flip(2))


@pytest.mark.parametrize("side", [32, 33])
def test_four_photographs_from_afar(side):
    """The first quarter is the view's own photograph at half its size, mirrored or not; the others are photographs."""
    own = photographs(4, side)
    made = view(own.__getitem__, 4, 6, 0)
    assert made.shape == own[0].shape
    assert made.dtype == torch.uint8
    half = side // 2
    quarters = [made[:, a : a + half, b : b + half].float() for a in (0, half) for b in (0, half)]
    assert float(quarters[0].mean()) == pytest.approx(float(own[2].float().mean()), abs=2)
    for quarter in quarters:
        assert any(float(quarter.mean()) == pytest.approx(float(o.float().mean()), abs=2) for o in own)
        assert float(quarter.amax() - quarter.amin()) == pytest.approx(40, abs=6)  # a whole photograph


def test_a_part_from_close_by():
    own = photographs(1, 64)
    made = view(own.__getitem__, 1, 2, 0).float()
    assert 16 <= float(made.amax() - made.amin()) <= 41  # half of the photograph at least
    steps = made[0, 0].diff()
    assert bool((steps >= 0).all()) or bool((steps <= 0).all())


@pytest.mark.parametrize("size", [(32, 64), (33, 20)])
def test_views_of_rectangles_have_their_shape(size):
    own = torch.randint(256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for index in range(12):
        assert view(own.__getitem__, 4, index, 0).shape == (3, *size)


def test_views_follow_from_the_seed():
    own = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    every = [torch.stack([view(own.__getitem__, 2, i, seed) for i in range(12)]) for seed in (0, 0, 1)]
    assert torch.equal(every[0], every[1])
    assert not torch.equal(every[0], every[2])


def test_few_photographs_are_made_up_for():
    paths = demo_photographs(5)
    found = decoded(paths, Size.of(64), 0, lambda *_: None, Room())
    assert found.photographs == 5
    assert found.part.mine == found.part.all == 40
    for index, path in enumerate(paths):
        assert torch.equal(
            found.pixels.get(index), torch.from_numpy(letterbox(read_image(path), 64)[0]).permute(2, 0, 1)
        )
    assert torch.equal(found.pixels.get(5), view(found.pixels.get, 5, 0, 0))


@pytest.mark.parametrize(("photographs", "images"), [(1, 8), (5, 40), (8, 64), (20, 64), (64, 64), (100, 100)])
def test_how_many_images_few_photographs_are_made_up_to(photographs, images):
    assert wanted(photographs) == images


def test_enough_photographs_stay_as_they_are():
    kept = Room().kept(WANTED, (3, 8, 8), torch.uint8)
    assert with_views(kept, WANTED, range(WANTED), 0, Room()) is kept


def demo_photographs(count: int) -> list[Path]:
    """Of the demo's, which are as many as are wanted."""
    return sorted((ROOT / "calib" / "demo" / "images" / "calib").iterdir())[:count]


@pytest.mark.parametrize("count", [5, WANTED // 2])
def test_processes_share_photographs_and_views(monkeypatch, count):
    """The second of two may have as many views as there are photographs: its own are views all the same."""
    paths = demo_photographs(count)
    whole = decoded(paths, Size.of(32), 0, lambda *_: None, Room())
    total = wanted(count)
    mine = {number: range(total)[number * total // 2 : (number + 1) * total // 2] for number in (0, 1)}
    monkeypatch.setattr(workers, "count", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(workers, "number", lambda number=number: number)
        monkeypatch.setattr(workers, "gathered", lambda item: [item, item])
        found = decoded(paths, Size.of(32), 0, lambda *_: None, Room())
        assert found.part.mine == len(mine[number])
        assert found.photographs == sum(index < count for index in mine[number])
        for place, index in enumerate(mine[number]):
            assert torch.equal(found.pixels.get(place), whole.pixels.get(index))


def test_more_processes_than_images_are_refused(monkeypatch):
    monkeypatch.setattr(workers, "count", lambda: 9)
    monkeypatch.setattr(workers, "number", lambda: 0)
    monkeypatch.setattr(workers, "gathered", lambda item: [item, *[1] * 8])  # an image each for the others
    with pytest.raises(InputError, match="too few for 9 processes"):
        decoded(demo_photographs(1), Size.of(32), 0, lambda *_: None, Room())
