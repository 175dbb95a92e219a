"""Images from BatchNorm statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from pt_writer import yolov5_bytes
from torch import nn

from dsconvert.base.size import Size
from dsconvert.fit import draws
from dsconvert.measure import calibration
from dsconvert.measure.calibration import FEW, beside_few, tiled
from dsconvert.measure.synthesize import _batch, _distance, _smooth_noise, synthesize
from dsconvert.measure.views import EACH
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.network import Head
from dsconvert.yolo.wishes import OBJECTS, wished


def network() -> nn.Sequential:
    """One BatchNorm that remembers darker, flatter images than noise."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)).eval()
    net[0].weight.data.copy_(torch.eye(3)[:, :, None, None])
    net[1].running_mean.copy_(torch.tensor([0.2, 0.3, 0.4]))
    net[1].running_var.copy_(torch.tensor([0.01, 0.01, 0.04]))
    return net


def test_pixels_take_on_the_remembered_statistics():
    images = torch.cat(synthesize(network(), 8, Size.of(32), 200, seed=0))
    # an optimiser's residue after 200 steps on a problem that can be solved exactly, and the 8-bit grid
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([0.2, 0.3, 0.4]), atol=0.02)
    assert torch.allclose(images.var((0, 2, 3)), torch.tensor([0.01, 0.01, 0.04]), rtol=0.2)


def test_distance_is_zero_at_the_statistics_and_known_elsewhere():
    net = network()
    images = torch.zeros(1, 3, 1, 2)
    images[0, :, 0, 0] = 0.1
    net[1].running_mean.copy_(torch.full((3,), 0.05))
    net[1].running_var.copy_(torch.full((3,), 0.005))  # unbiased variance of (0.1, 0)
    assert _distance(net, [net[1]], images)[0].item() == pytest.approx(0, abs=1e-6)  # float32 square roots
    net[1].running_mean.copy_(torch.full((3,), 0.05 + 0.005**0.5))  # one deviation off
    assert _distance(net, [net[1]], images)[0].item() == pytest.approx(1, rel=1e-4)


def test_same_seed_same_images_on_the_8_bit_grid():
    a, b, c = (torch.cat(synthesize(network(), 3, Size.of(32), 2, seed=s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert tuple(a.shape) == (8, 3, 32, 32)  # whole batches
    assert torch.allclose(a * 255, (a * 255).round(), atol=1e-4)  # float32 of k / 255
    assert a.min() >= 0
    assert a.max() <= 1


def head(nc: int) -> Head:
    anchors = tuple(tuple((w, w) for w in widths) for widths in ((8.0, 16.0, 24.0), (32.0, 48.0, 64.0)))
    return Head(tuple(map(str, range(nc))), (8, 16), anchors)


@pytest.mark.parametrize("nc", [1, 5])
def test_doubt_is_the_cross_entropy_of_the_wished_objects(nc):
    """Brute force: in maps of one number each, every wish costs softplus(-objectness) + softplus(-class)."""
    doubt = wished(head(nc), 4, Size.of(64), torch.Generator().manual_seed(0))
    raw = [torch.full((4, 3 * (5 + nc), n, n), -2.0) for n in (8, 4)]
    one = nn.functional.softplus(torch.tensor(2.0)).item()
    assert doubt(raw).item() == pytest.approx((1 if nc == 1 else 2) * one, rel=1e-6)
    for values in raw:
        values.requires_grad_(True)
    doubt(raw).backward()
    touched = [values.grad.unflatten(1, (3, 5 + nc)).nonzero() for values in raw]
    # of every image OBJECTS objectness and as many class scores (two wishes may meet, not with this seed)
    assert sum(int((t[:, 2] == 4).sum()) for t in touched) == 4 * OBJECTS
    assert sum(int((t[:, 2] > 4).sum()) for t in touched) == (0 if nc == 1 else 4 * OBJECTS)
    assert not any(int((t[:, 2] < 4).sum()) for t in touched)
    assert all(len(t) for t in touched)


def test_a_detector_is_surer_of_images_that_were_asked_for_objects(tiny):
    detector, its_head = tiny
    wish = partial(wished, its_head)
    asked = torch.cat(synthesize(detector, 8, Size.of(64), 20, 0, None, wish))
    plain = torch.cat(synthesize(detector, 8, Size.of(64), 20, 0))
    generator = torch.Generator().manual_seed(0)
    _smooth_noise(8, Size.of(64), generator)  # the numbers drawn before the wishes
    doubt = wish(8, Size.of(64), generator)
    with torch.no_grad():
        # little, as the scores of a network that was never trained hardly depend on the image
        assert doubt(detector(asked)) < 0.98 * doubt(detector(plain))


def test_without_batchnorm_there_is_nothing_to_start_from():
    with pytest.raises(ValueError, match="BatchNorm"):
        synthesize(nn.Conv2d(3, 3, 1), 1, Size.of(32), 1, 0)


def test_pictures_side_by_side():
    """Four of a side fill twice the side; of half as much again the last row and column are cut."""
    pictures = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 4, 4)
    made = tiled(pictures, Size.of(8))
    assert made.shape == (2, 3, 8, 8)  # the ninth has no company
    assert [int(made[1, 0, y, x]) for y in (0, 7) for x in (0, 7)] == [4, 5, 6, 7]
    cut = tiled(pictures, Size.of(6))
    assert cut.shape == (2, 3, 6, 6)
    assert [(cut[0, 0] == i).sum().item() for i in range(4)] == [16, 8, 8, 4]
    assert torch.equal(tiled(pictures, Size.of(4)), pictures)
    wide = tiled(pictures, Size(4, 10))  # three in a row, the last cut
    assert wide.shape == (3, 3, 4, 10)
    assert wide[1, 0, 0].tolist() == [3, 3, 3, 3, 4, 4, 4, 4, 5, 5]
    assert tiled(pictures[:2], Size.of(8))[0, 0, ::4, ::4].tolist() == [
        [0, 1],
        [0, 1],
    ]  # repeated where they are too few


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_made_at_the_same_time_are_those_made_alone(tiny, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        both = synthesize(tiny[0], 16, Size.of(32), 3, 0)
    finally:
        torch.set_num_threads(before)
    alone = [_batch(tiny[0], Size.of(32), 3, draws.of_image(0, index), None) for index in range(2)]
    for made, expected in zip(both, alone, strict=True):
        # sums over a batch run in another order on several threads
        torch.testing.assert_close(made, expected, rtol=0, atol=1.01 / 255)


def test_few_photographs_have_company(work, call):
    told = call("quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--bits", "4", "--json", cwd=work)
    found = json.loads(told.out)
    assert found["calibration_images"] == 4
    assert found["calibration_views"] == 4 * EACH
    assert found["synthesised_images"] == 2 * calibration.SYNTHETIC_IMAGES


def test_many_photographs_have_none(tiny, tmp_path):
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(*tiny))
    loaded = load_checkpoint(tmp_path / "best.pt")
    assert beside_few(loaded, FEW, Size.of(64), 0, lambda *told: None) is None
    beside = beside_few(loaded, FEW - 1, Size.of(64), 0, lambda *told: None)
    assert beside is not None
    assert beside.shape[1:] == (3, 64, 64)
    fused = replace(loaded, network=loaded.network.fused())  # nothing is left to make them from
    assert beside_few(fused, FEW - 1, Size.of(64), 0, lambda *told: None) is None
