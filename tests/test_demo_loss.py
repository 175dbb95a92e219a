"""The training loss of the demo: known answers."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import DEMO

sys.path.insert(0, str(DEMO))
from loss import assign, complete_iou, detection_loss

ANCHORS = torch.tensor([[2.0, 2.0], [8.0, 8.0]])


def test_complete_iou_of_equal_and_of_shifted_boxes():
    box = torch.tensor([[5.0, 5.0, 4.0, 2.0]])
    assert complete_iou(box, box).item() == pytest.approx(1, abs=1e-6)  # the 1e-7 guards
    # shifted by half its width: IoU 1/3, centre distance 2, enclosing diagonal^2 = 6^2 + 2^2
    moved = torch.tensor([[7.0, 5.0, 4.0, 2.0]])
    assert complete_iou(box, moved).item() == pytest.approx(1 / 3 - 4 / 40, abs=1e-5)


def test_a_box_goes_to_its_cell_its_near_neighbours_and_its_like_anchors():
    # centre (3.2, 5.7) of 10 x 10 cells, 2.5 x 2.5 cells large: like anchor 0 (ratio 1.25) and 1 (ratio 3.2)
    found = assign(torch.tensor([[0, 4, 0.32, 0.57, 0.25, 0.25]]), ANCHORS, 10, 10)
    cells = {(a, r, c) for _, a, r, c in zip(*(i.tolist() for i in found.index), strict=True)}
    assert cells == {(a, r, c) for a in (0, 1) for r, c in ((5, 3), (5, 2), (6, 3))}
    assert set(found.kind.tolist()) == {4}
    # 0.4 cells: ratio 5 and 20: nobody's
    assert len(assign(torch.tensor([[0, 4, 0.32, 0.57, 0.04, 0.04]]), ANCHORS, 10, 10).box) == 0


def test_a_perfect_prediction_costs_almost_nothing_and_a_wrong_class_more():
    anchors = torch.tensor([[[2.0, 2.0]], [[200.0, 200.0]], [[200.0, 200.0]]])
    target = torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.2]])  # centre (5, 5) exactly between cells, 2 x 2 cells
    raw = [torch.full((1, 8, 10, 10), 0.0) for _ in range(3)]
    for level in raw:
        level[:, 4:] = -20.0
    for r, c in zip(*(i.tolist() for i in assign(target, anchors[0], 10, 10).index[2:]), strict=True):
        # xy = 2 sigmoid(t) - 0.5 = 5 - cell; wh = (2 sigmoid(0))^2 * 2 = 2
        for axis, cell in ((0, c), (1, r)):
            share = (5 - cell + 0.5) / 2
            raw[0][0, axis, r, c] = torch.logit(torch.tensor(share), eps=1e-6)
        raw[0][0, 4, r, c] = raw[0][0, 6, r, c] = 20.0
    right = detection_loss(raw, target, anchors, 3).item()
    assert right < 1e-3  # guards and clamped logits
    wrong = detection_loss(raw, torch.tensor([[0, 2, 0.5, 0.5, 0.2, 0.2]]), anchors, 3).item()
    assert wrong > 1


def test_no_objects_leaves_only_objectness():
    raw = [torch.full((1, 8, 4, 4), -20.0) for _ in range(3)]
    assert detection_loss(raw, torch.zeros(0, 6), torch.ones(3, 1, 2), 3).item() < 1e-6
