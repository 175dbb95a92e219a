"""What a tail makes of its maps: which channels are scores, and every channel's own steps."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from spellings import SIDE, Decoded, source_of
from torch import nn

from dsconvert.convert.onnx_int8 import taken_apart
from dsconvert.graph.run import run_float
from dsconvert.onnxfile.meaning import NOTHING, SIGMOID, SOFTMAX, STEPS, Exit, Maps, _ends, in_steps, score_kinds

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class Tail(nn.Module):
    """One convolution of nine channels, and something behind it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 9, 1), function

    def forward(self, x):
        return self.function(self.conv(x))


def some_are_scores(x):
    rows = x.flatten(2).transpose(1, 2)  # (n, cells, 9)
    return torch.cat((rows[..., :4], rows[..., 4:5].sigmoid(), rows[..., 5:].softmax(2)), 2)


TAILS = {
    "scores of two kinds": (some_are_scores, [NOTHING] * 4 + [SIGMOID] + [SOFTMAX] * 4),
    "a softmax over pixels is none": (lambda x: x.flatten(2).softmax(2), [NOTHING] * 9),
    "computed first": (lambda x: (x * x).sigmoid(), [NOTHING] * 9),
    "all of it": (lambda x: x.permute(0, 2, 3, 1).sigmoid(), [SIGMOID] * 9),
    "none": (lambda x: x.exp(), [NOTHING] * 9),
}


@pytest.mark.parametrize("what", TAILS)
def test_scores_are_found_by_what_reads_them(what, tmp_path):
    function, wanted = TAILS[what]
    source, x = source_of(Tail(function), tmp_path)
    facts, low = taken_apart(source, x)
    (kinds,) = score_kinds(facts, low).values()
    assert kinds.tolist() == wanted


def test_every_channel_is_in_steps_of_its_own_range(tmp_path):
    """Boxes reach as far as they were seen to, with a margin; a score's logit from unlikely to sure."""
    source, x = source_of(Decoded(), tmp_path)
    facts, low = taken_apart(source, x)
    images = [torch.rand(1, 3, SIDE, SIDE) for _ in range(3)]

    def run(image):
        return run_float(low.graph, low.params, image)

    stepped, maps = in_steps(low, score_kinds(facts, low), images)
    for image in images:
        before, after = run(image), run_float(stepped.graph, stepped.params, image)
        for e, value, made in zip(maps.exits, before, after, strict=True):
            assert torch.allclose(e.real(made), value, atol=1e-4)
            rounded = e.real(STEPS.dequantize(STEPS.quantize(made)))
            assert float(((rounded - value).abs() / e.step[:, None, None]).max()) <= 0.5 + 1e-3
    scores = next(e for e in maps.exits if (e.kinds == SIGMOID).all())
    ends = [scores.real(torch.full((1, 3, 1, 1), float(q - 128))).flatten() for q in (0, 255)]
    assert bool((ends[1] >= 5 - 0.1).all())
    assert bool((ends[0] >= -9 - 0.1).all())
    assert maps.pinned(stepped.graph) == dict.fromkeys(stepped.graph.outputs, STEPS)


def map_of(*channels: list[int], step: float = 1.0) -> Exit:
    kinds = torch.tensor(functools.reduce(operator.iadd, channels, []))
    return Exit("e", kinds, torch.full((len(kinds),), step), torch.full((len(kinds),), 128.0))


def test_boxes_count_where_the_best_score_is():
    """Of two cells one has a score of 0.9 and the other of almost none: a box's change counts there alone, by the root
    of the score; an objectness is multiplied with its classes."""
    exits = (map_of([NOTHING] * 4), map_of([SIGMOID] * 2), map_of([SIGMOID]))
    maps = Maps(exits)
    sure = torch.logit(torch.tensor(0.9))
    classes = torch.full((1, 2, 1, 2), 50.0)
    objectness = torch.tensor([sure, -50.0]).view(1, 1, 1, 2)
    boxes = torch.zeros(1, 4, 1, 2)
    reference = [boxes, classes, objectness]
    scores, before = maps.measure(reference, reference)
    assert torch.allclose(scores, torch.tensor([0.9, 0.0]).expand(1, 2, 1, 2), atol=1e-6)
    _, after = maps.measure([boxes + 25.5, classes, objectness], reference)
    assert torch.allclose((after - before)[0, 0, 0], torch.tensor([0.1 * 0.9**0.5, 0.0]), atol=1e-6)


def test_rows_of_boxes_and_scores_together_are_taken_apart():
    """Three anchors, all of whose channels go through a sigmoid, as YOLOv5-Lite's: boxes count by the root of the best
    product of objectness and class."""
    e = map_of([SIGMOID] * 21)
    raw = torch.zeros(1, 21, 1, 1)
    raw[0, 4], raw[0, 5:7] = 50.0, torch.tensor([0.0, 50.0]).view(2, 1, 1)  # the first anchor is sure of class 1
    scores, boxes = Maps((e,)).measure([raw], [raw])
    assert torch.allclose(scores[0, :2, 0, 0], torch.tensor([0.5, 1.0]))
    assert torch.allclose(scores[0, 2:, 0, 0], torch.full((4,), 0.25))
    assert torch.allclose(boxes[0, :4, 0, 0], torch.full((4,), 0.5))
    assert boxes.shape == (1, 12, 1, 1)
    assert torch.allclose(boxes[0, 4:, 0, 0], torch.full((8,), 0.5 * 0.5))


def test_of_a_softmax_only_what_makes_a_difference_needs_a_grid():
    """Two classes at three positions, and a channel beside them: the second class never matters below -9, and the first
    is as sure at 10 as at 30."""
    y = torch.tensor([[0.0, 30.0, -1.0], [-40.0, -2.0, -20.0], [-70.0, 3.0, 5.0]])
    least, most = _ends(y, torch.tensor([True, True, False]))
    assert (float(least[2]), float(most[2])) == (-70.0, 5.0)
    # the least of: 0 - 9, 30 - 9 or its -2 there, -1 - 9
    assert least[1] == pytest.approx(-10.0, abs=1e-3)
    assert float(least[0]) == -1.0
    assert float(most[1]) == -2.0
    # the most of: nine above -40, above -2, above -20; the float32 exponentials of a double
    assert most[0] == pytest.approx(7.0, abs=1e-3)
    clipped = y[:2].clamp(least[:2, None], most[:2, None])
    torch.testing.assert_close(clipped.softmax(0), y[:2].softmax(0), rtol=0, atol=2e-4)  # two shares of exp(-9)
