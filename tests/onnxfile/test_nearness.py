"""The last look at a converted file: scores and boxes that are far from the float file's are said, whatever their
units. A tail that computes something else is refused. The order of ranked rows does not count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from spellings import SIDE, Decoded, source_of
from torch import Tensor, nn

from dsconvert.base.errors import CheckError
from dsconvert.convert.onnx_int8 import taken_apart
from dsconvert.graph.run import run_float
from dsconvert.onnxfile.facts import Facts
from dsconvert.onnxfile.lower import Lowered
from dsconvert.onnxfile.meaning import Maps, in_steps, score_kinds
from dsconvert.onnxfile.nearness import Look, how_far_off

FAINT_LOGIT = -1.386  # of a score of 0.2
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class Pixels(Decoded):
    """Boxes in pixels beside scores, as YOLOv8's output has them: nearly all of its variance is boxes."""

    def forward(self, x):
        boxes, scores = super().forward(x).split([4, 3], 1)
        return torch.cat((boxes * 200, scores), 1)


class Scores(nn.Module):
    """A map of boxes and a map of scores, joined by a function.

    logit: of every score; None: random. White in the first colour of a pixel makes one score there 0.2.
    """

    def __init__(self, function, logit: float | None = None) -> None:
        super().__init__()
        self.boxes, self.scores, self.function = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3), function
        self.boxes.weight.data[:, 0] = 0
        if logit is not None:
            nn.init.constant_(self.scores.bias, logit)
            nn.init.zeros_(self.scores.weight)
            self.scores.weight.data[0, 0, 1, 1] = FAINT_LOGIT - logit

    def forward(self, x):
        return self.function(self.boxes(x).flatten(2) * 2000, self.scores(x).flatten(2).sigmoid())


def beside(boxes, scores):
    return torch.cat((boxes, scores), 1)


def ranked(boxes, scores):
    best, kind = scores.max(1)
    value, place = best.topk(20)
    rows = boxes.transpose(1, 2).gather(1, place.unsqueeze(2).expand(-1, -1, 4))
    return torch.cat((rows, value.unsqueeze(2), kind.gather(1, place).unsqueeze(2).float()), 2)


@dataclass
class Network:
    """A float file taken apart, and the images that it is looked at on."""

    facts: Facts
    low: Lowered
    maps: Maps
    images: list[Tensor]

    def look(self, image: Tensor, *maps: Tensor) -> Look:
        """What a file without any fault makes of such maps."""
        real = {n: e.real(x).numpy() for n, e, x in zip(self.low.exits, self.maps.exits, maps, strict=True)}
        real = {name: x.reshape(self.facts.shape(name)) for name, x in real.items()}
        outputs = [real.get(v.name, self.facts.compute(v.name, real)) for v in self.facts.source.model.graph.output]
        return Look(image.numpy(), list(maps), outputs)

    def looks(self, *changes) -> list[Look]:
        """With each of the maps of the float network changed by one function, in the order of exits."""
        made = [(image, run_float(self.low.graph, self.low.params, image)) for image in self.images]
        changes = changes or [lambda x: x] * len(self.maps.exits)
        return [self.look(x, *(f(y) for f, y in zip(changes, maps, strict=True))) for x, maps in made]

    def said(self, looks: list[Look]) -> str | None:
        return how_far_off(self.facts, self.low, self.maps, looks)


def network(module: nn.Module, folder: Path, images: int = 3) -> Network:
    source, x = source_of(module, folder)
    facts, low = taken_apart(source, x)
    torch.manual_seed(1)
    seen = [torch.rand(1, 3, SIDE, SIDE) for _ in range(images)]
    low, maps = in_steps(low, score_kinds(facts, low), seen)
    return Network(facts, low, maps, seen)


def same(x: Tensor) -> Tensor:
    return x


def elsewhere(x: Tensor) -> Tensor:
    """The same numbers at other cells: nothing is right but their spread."""
    return x.flip(2, 3).roll((1, 2), (2, 3))


def noisy(x: Tensor) -> Tensor:
    return x + 0.2 * x.std((2, 3), keepdim=True) * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_a_network_nearby_is_not_mentioned(tmp_path):
    net = network(Scores(beside), tmp_path)
    assert net.said(net.looks()) is None
    assert net.said(net.looks(noisy, noisy)) is None


@pytest.mark.parametrize("module", [Pixels, lambda: Scores(beside), lambda: Scores(ranked)])
@pytest.mark.parametrize("wrong", ["boxes", "scores"])
def test_wrong_scores_or_boxes_are_said_whatever_their_units(module, wrong, tmp_path):
    net = network(module(), tmp_path)
    are_scores = [bool(e.kinds.any()) for e in net.maps.exits]
    assert sorted(are_scores) == [False, True]
    said = net.said(net.looks(*(elsewhere if s == (wrong == "scores") else same for s in are_scores)))
    assert said is not None
    assert said.startswith(f"On calibration images, {wrong}")
    assert "dsconvert compare" in said


def test_numbers_that_are_the_same_everywhere_may_be_off_by_a_step(tmp_path):
    """They have no variance that anything could be a share of. At twice their size they are far off."""
    constant = Scores(beside)
    nn.init.zeros_(constant.boxes.weight)
    net = network(constant, tmp_path)
    assert net.said(net.looks(lambda x: x + 1, same)) is None
    end = net.maps.exits[0]
    assert "boxes" in (net.said(net.looks(lambda x: end.raw(2 * end.real(x)), same)) or "")


def test_how_far_off_is_a_share_of_the_variance(tmp_path):
    """Twice the numbers too much of a map that is no score and no box: four times its variance, about a mean of its
    own in each channel, and four times the mean's square."""
    net = network(nn.Conv2d(3, 4, 3), tmp_path)
    (end,) = net.maps.exits
    real = torch.cat([run_float(net.low.graph, net.low.params, x)[0] for x in net.images])
    assert net.said(net.looks(lambda x: end.raw(3 * end.real(x)))) is not None
    spread = (real - real.mean((0, 2, 3), keepdim=True)).square().sum()
    wanted = 4 * (real + (128 - end.zero).view(-1, 1, 1)).square().sum() / spread
    said = net.said(net.looks(lambda x: end.raw(3 * end.real(x))))
    name = net.facts.source.model.graph.output[0].name
    assert f"numbers of output {name} are off by {100 * wanted:.0f} % of their variance" in said


def background(folder: Path, logit: float, spot: bool = False) -> Network:
    """A network that finds nothing, but for one score of 0.2 on the first image where there is a spot."""
    net = network(Scores(beside, logit), folder)
    for image in net.images:
        image[:, 0] = 0
    net.images[0][:, 0, 5, 9] = float(spot)
    return net


@pytest.mark.parametrize("logit", [-9.0, -3.1])
def test_scores_that_nobody_sees_may_be_anything(logit, tmp_path):
    """Of background alone, with scores of 0.0001 or 0.043, scores are lower by half, and boxes are elsewhere."""
    net = background(tmp_path, logit)
    end = net.maps.exits[1]
    assert net.said(net.looks(elsewhere, lambda x: end.raw(end.real(x) - 0.7))) is None


def test_one_faint_score_is_no_object(tmp_path):
    """It may vanish, and its box be elsewhere."""
    net = background(tmp_path, -9.0, spot=True)
    assert net.said(net.looks(elsewhere, lambda x: x.amin((2, 3), keepdim=True).expand_as(x))) is None


def test_scores_out_of_nothing_are_said(tmp_path):
    net = background(tmp_path, -9.0)
    assert "scores" in (net.said(net.looks(same, lambda x: x + 255)) or "")


def test_an_output_of_one_number_an_image_varies_between_channels(tmp_path):
    """Images that are nearly alike say little about how far a class's logit may move."""
    flat = nn.Sequential(nn.Conv2d(3, 50, SIDE), nn.Flatten())
    net = network(flat, tmp_path)
    net.images[:] = [net.images[0] + 0.001 * torch.rand(1, 3, SIDE, SIDE) for _ in range(3)]
    assert net.said(net.looks(lambda x: x + torch.linspace(-20, 20, 50).view(1, -1, 1, 1))) is None
    assert net.said(net.looks(lambda x: x.flip(1))) is not None


def test_a_tail_that_reads_the_wrong_map_is_refused(tmp_path):
    """Scores of the next class are a thousandth of the output's largest number away, and are noticed."""
    net = network(Scores(beside), tmp_path)
    looks = net.looks()
    looks[1].outputs[0][:, 4:] = np.roll(looks[1].outputs[0][:, 4:], 1, 1)
    with pytest.raises(CheckError, match="not what its layers lead to"):
        net.said(looks)


def test_the_largest_of_nearly_equal_numbers_may_be_another(tmp_path):
    """As ArgMax finds it in an engine that adds in another order: on one of 196 cells, but not on a tenth."""
    net = network(Scores(lambda boxes, scores: (scores.argmax(1), boxes)), tmp_path)
    looks = net.looks()
    looks[0].outputs[0][0, 3] += 1
    assert net.said(looks) is None
    looks[0].outputs[0][0, :20] += 1
    with pytest.raises(CheckError, match="not what its layers lead to"):
        net.said(looks)


def test_swapped_outputs_are_refused(tmp_path):
    net = network(Scores(lambda boxes, scores: (boxes[:, :3], scores)), tmp_path)
    assert net.said(net.looks()) is None
    with pytest.raises(CheckError, match="not what its layers lead to"):
        net.said([replace(look, outputs=look.outputs[::-1]) for look in net.looks()])


def test_the_order_of_ranked_rows_is_free_and_their_numbers_are_not(tmp_path):
    net = network(Scores(ranked), tmp_path)
    looks = net.looks(noisy, noisy)
    rows = looks[0].outputs[0]
    rows[:, [3, 4]] = rows[:, [4, 3]]
    assert net.said(looks) is None
    rows[:, :, 4] *= 0.5
    with pytest.raises(CheckError, match="not what its layers lead to"):
        net.said(looks)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_no_numbers_are_refused(number, tmp_path):
    net = network(Scores(beside), tmp_path)
    looks = net.looks()
    looks[2].outputs[0][0, 5, 7] = number
    with pytest.raises(CheckError, match="is no number"):
        net.said(looks)
