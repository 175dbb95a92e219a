"""What compensation leaves of rounding errors: by hand, and against rounding itself."""

from __future__ import annotations

import pytest
import torch
from formats import free
from watching import watch

from dsconvert.fit.moments import damping_for
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.measure.importance import Part
from dsconvert.measure.leftover import Left, left_by, left_over

POINT = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def test_nothing_makes_up_for_columns_that_have_nothing_in_common():
    assert left_by(torch.diag(torch.tensor([3.0, 7.0, 1.0]).double())) == 1


def test_of_two_columns_the_first_keeps_what_the_second_cannot_make_up_for():
    """D is 1 - r^2 for the first, 1 for the second."""
    h = torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double()
    assert left_by(h) == pytest.approx((1 - 0.64 + 1) / 2)


def test_the_share_is_what_rounding_column_by_column_leaves():
    """Rounded to integers: 4000 rows of errors evenly within half a step, so both J are good to a few per cent."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(40, 12, generator=generator).double()
    h = factor.T @ factor / 40 + 0.9  # the rows' mean: columns alike
    h = h[torch.argsort(h.diagonal(), descending=True)][:, torch.argsort(h.diagonal(), descending=True)]
    w = torch.randn(4000, 12, generator=generator).double() * 10
    left, rounded = w.clone(), torch.empty_like(w)
    for j in range(12):
        rounded[:, j] = left[:, j].round()
        if j < 11:  # the rest moves to where J is least, given the error
            pull = torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j])
            left[:, j + 1 :] += (left[:, j] - rounded[:, j])[:, None] * pull

    def objective(made):
        error = w - made
        return float(((error @ h) * error).sum())

    assert left_by(h) == pytest.approx(objective(rounded) / objective(w.round()), rel=0.05)


def test_equal_inputs_of_a_layer_make_up_for_each_other():
    """Both channels of the input are the same x: H is var(x) everywhere, and more on the diagonal by the damping."""
    graph = Graph((Node("conv", "c", (INPUT,), POINT),), ("c",))
    params = {"c": ConvParams(torch.ones(2, 2, 1, 1), torch.zeros(2))}
    x = torch.randn(6, 1, 10, 10, generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1, -1)
    alone = torch.eye(2).double()

    drawn = watch(graph, params, list(x), 0)

    def found(images, first):
        part = Part(first, len(images), 6)
        return left_over(graph, params, lambda i: images[i : i + 1], drawn, {"c": alone}, part, 6)

    more = damping_for(6)
    d = 1 + more - 1 / (1 + more)
    left = found(x, 0)["c"]
    assert left.columns == pytest.approx((d + 1 + more) / (2 + 2 * more), rel=1e-3)  # x is kept as half
    assert left.channels == pytest.approx(1)
    assert left.of(free(4, 2)) == pytest.approx(left.columns)


def test_channels_of_8_bits_are_on_their_own():
    left = Left(0.5, 0.25)
    assert (left.of(free(8, 64)), left.of(free(4, 16))) == (0.5, 0.125)
