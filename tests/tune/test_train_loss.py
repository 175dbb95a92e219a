"""The training loss: known answers, and brute force in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dsconvert.base.size import Size
from dsconvert.tune.loss import Gains, assign, complete_iou, detection_loss, level_balance

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


def learning_cells(box, anchors, rows, columns):
    """(anchor, row, column) of every cell that learns a box x, y, w, h in cells, found by looking at each."""
    x, y, w, h = box
    for a, (aw, ah) in enumerate(anchors):
        if max(w / aw, aw / w, h / ah, ah / h) >= 4:
            continue
        for row, column in itertools.product(range(rows), range(columns)):
            own = column <= x < column + 1 and row <= y < row + 1
            # half a cell around the cell, and the centre in its row or column
            beside = row <= y < row + 1 and (column - 0.5 < x < column or column + 1 < x < column + 1.5)
            above = column <= x < column + 1 and (row - 0.5 < y < row or row + 1 < y < row + 1.5)
            if own or beside or above:
                yield a, row, column


def test_assignment_equals_a_loop_over_every_cell():
    rng = np.random.default_rng(3)
    rows, columns = 6, 9
    anchors = [(1.5, 1.0), (3.0, 4.0), (8.0, 2.0)]
    targets = np.concatenate((rng.integers(0, 2, (30, 2)), rng.uniform(0.02, 0.98, (30, 4))), 1).astype(np.float32)
    wanted = []
    for image, kind, x, y, w, h in targets.tolist():
        x, y, w, h = x * columns, y * rows, w * columns, h * rows
        for a, row, column in learning_cells((x, y, w, h), anchors, rows, columns):
            wanted.append((image, kind, a, row, column, x - column, y - row, w, h))
    found = assign(torch.from_numpy(targets), torch.tensor(anchors), rows, columns)
    image, anchor, row, column = found.index
    parts = (image, found.kind, anchor, row, column, *found.box.T)
    given = sorted(zip(*(p.tolist() for p in parts), strict=True))
    np.testing.assert_allclose(np.array(given), np.array(sorted(wanted)), atol=1e-5)
    np.testing.assert_array_equal(found.anchor_size.numpy(), np.array(anchors, np.float32)[anchor.numpy()])


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


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def entropy(logit, wanted):
    p = sigmoid(logit)
    return -(wanted * math.log(p) + (1 - wanted) * math.log(1 - p))


def plain_ciou(a, b):
    """Of boxes x, y, w, h, in plain Python, from the definition (arXiv 1911.08287)."""
    corners = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b)]
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = corners
    inside = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    iou = inside / (a[2] * a[3] + b[2] * b[3] - inside)
    diagonal = (max(ax2, bx2) - min(ax1, bx1)) ** 2 + (max(ay2, by2) - min(ay1, by1)) ** 2
    v = 4 / math.pi**2 * (math.atan(a[2] / a[3]) - math.atan(b[2] / b[3])) ** 2
    alpha = v / (1 - iou + v)
    return iou - ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / diagonal - alpha * v


def plain_loss(raw, targets, anchors, nc, gains):
    """The loss, cell by cell and box by box."""
    whole = 0.0
    for level, sizes, balance in zip(raw, anchors, level_balance(len(raw)), strict=True):
        n, _, rows, columns = level.shape
        p = level.view(n, len(sizes), nc + 5, rows, columns)
        boxes, kinds, reached = [], [], {}
        for image, kind, x, y, w, h in targets.tolist():
            x, y, w, h = x * columns, y * rows, w * columns, h * rows
            for a, row, column in learning_cells((x, y, w, h), sizes.tolist(), rows, columns):
                aw, ah = sizes[a].tolist()
                t = p[int(image), a, :, row, column].tolist()
                mine = (
                    2 * sigmoid(t[0]) - 0.5 + column, 2 * sigmoid(t[1]) - 0.5 + row,
                    (2 * sigmoid(t[2])) ** 2 * aw, (2 * sigmoid(t[3])) ** 2 * ah,
                )  # fmt: skip
                iou = plain_ciou(mine, (x, y, w, h))
                boxes.append(1 - iou)
                kinds += [entropy(t[5 + k], float(k == kind)) for k in range(nc)]
                cell = (int(image), a, row, column)
                reached[cell] = max(reached.get(cell, 0.0), iou)
        if boxes:
            whole += gains.box * sum(boxes) / len(boxes) + gains.kind * sum(kinds) / len(kinds)
        cells = [
            entropy(float(p[i, a, 4, r, c]), reached.get((i, a, r, c), 0.0))
            for i in range(n) for a in range(len(sizes)) for r in range(rows) for c in range(columns)
        ]  # fmt: skip
        whole += gains.objectness * balance * sum(cells) / len(cells)
    return whole


def case(seed=0, images=2):
    """Two levels, random maps and boxes: two of them share cells."""
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(images, 2 * 8, s, s + 1, generator=generator, dtype=torch.float64) for s in (6, 3)]
    anchors = torch.tensor([[[1.0, 1.5], [2.0, 2.0]], [[1.0, 1.0], [2.0, 1.0]]], dtype=torch.float64)
    low, high = torch.tensor([0.05, 0.05, 0.05, 0.05]), torch.tensor([0.9, 0.9, 0.4, 0.4])
    boxes = low + high * torch.rand(12, 4, generator=generator)
    boxes[1] = boxes[0] + torch.tensor([0.01, 0.0, 0.02, 0.0])
    kinds = torch.randint(3, (12, 1), generator=generator)
    whose = torch.arange(12)[:, None] % images
    whose[1] = whose[0]
    return raw, torch.cat((whose, kinds, boxes), 1).double(), anchors


def test_the_loss_is_that_of_a_loop_over_every_cell_in_float64():
    raw, targets, anchors = case()
    gains = Gains(0.3, 0.5, 0.2)
    given = detection_loss([r.float() for r in raw], targets.float(), anchors.float(), 3, gains).item()
    assert given == pytest.approx(plain_loss(raw, targets, anchors, 3, gains), rel=1e-5)


def test_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole():
    raw, targets, anchors = case(images=3)
    leaf = [r.float().requires_grad_() for r in raw]
    whole = detection_loss(leaf, targets.float(), anchors.float(), 3)
    wanted = torch.autograd.grad(whole, leaf)
    parts = []
    for first, last in ((0, 1), (1, 3)):
        mine = targets[(targets[:, 0] >= first) & (targets[:, 0] < last)].clone().float()
        mine[:, 0] -= first
        parts.append(([r[first:last] for r in leaf], mine))
    seen = []
    for maps, mine in parts:
        detection_loss(maps, mine, anchors.float(), 3, total=lambda counts: seen.append(counts) or counts)
    everyone = sum(seen)
    losses = [detection_loss(maps, mine, anchors.float(), 3, total=lambda counts: everyone) for maps, mine in parts]
    assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(sum(losses), leaf), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_perfect_boxes_cost_nothing():
    raw, targets, anchors = case()
    for level, sizes in zip(raw, anchors, strict=True):
        p = level.view(2, 2, 8, *level.shape[2:])
        found = assign(targets[:1], sizes, *level.shape[2:])
        for i, a, r, c, (x, y, w, h), size in zip(*found.index, found.box, found.anchor_size, strict=True):
            p[i, a, 0, r, c], p[i, a, 1, r, c] = torch.logit((x + 0.5) / 2), torch.logit((y + 0.5) / 2)
            p[i, a, 2:4, r, c] = torch.logit((torch.stack((w, h)) / size).sqrt() / 2)
    only_boxes = Gains(1.0, 0.0, 0.0)
    assert abs(detection_loss(raw, targets[:1], anchors, 3, only_boxes).item()) < 1e-5
    assert detection_loss(raw, targets[1:], anchors, 3, only_boxes).item() > 0.5


def test_the_published_gains():
    assert Gains.usual(80, Size.of(640)) == Gains(0.05, 1.0, 0.5)
    assert Gains.usual(8, Size.of(320)) == Gains(0.05, 0.25, 0.05)
