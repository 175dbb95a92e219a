"""Sensitivity: squared effects against the change they predict."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from formats import free, nearest

from dsconvert.dsconv.codes.free import weight_error
from dsconvert.dsconv.codes.shrink import unshrunk
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import run_float
from dsconvert.measure.damage import Spots, damage_of, formats_of, squared_gradient
from dsconvert.measure.importance import measure_importance
from dsconvert.yolo.lower import lower

POINT = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def test_effect_is_the_mean_over_the_signs_of_the_error():
    """conv(x, D), its channel means taken out, times the gradient, summed and squared: by definition, for every sign
    that D's entries can have."""
    generator = torch.Generator().manual_seed(0)
    node = Node("conv", "c", (INPUT,), {"stride": 2, "padding": 1, "dilation": 1, "groups": 1})
    x, error = torch.randn(1, 1, 9, 9, generator=generator), torch.randn(1, 1, 3, 3, generator=generator)
    gradient = torch.randn(1, 1, 5, 5, generator=generator)
    squares = []
    for signs in itertools.product((-1.0, 1.0), repeat=9):
        moved = torch.nn.functional.conv2d(x, error * torch.tensor(signs).reshape(1, 1, 3, 3), stride=2, padding=1)
        squares.append(((moved - moved.mean((2, 3), keepdim=True)) * gradient).sum().square().item())
    wanted = sum(squares) / len(squares)
    found = (squared_gradient(node, x, gradient, error.shape) * error.square()).sum().item()
    assert found == pytest.approx(wanted, rel=1e-4)  # float32 sums


def test_a_map_of_one_position_is_judged_over_images():
    """An error of one weight on each image, with the bias taken out that makes up for most of it: by least squares."""
    generator = torch.Generator().manual_seed(0)
    node = Node("conv", "c", (INPUT,), POINT)
    xs, gradients = torch.randn(6, 1, 3, 1, 1, generator=generator) + 2, torch.randn(6, 1, 2, 1, 1, generator=generator)
    parts = [Spots.of(node, x, g, torch.Size((2, 3, 1, 1))) for x, g in zip(xs, gradients, strict=True)]
    found = functools.reduce(Spots.plus, parts, Spots.none(torch.zeros(2, 3, 1, 1))).centred()
    for o, i in itertools.product(range(2), range(3)):
        effect, slope = (xs[:, 0, i] * gradients[:, 0, o]).flatten(), gradients[:, 0, o].flatten()
        bias = torch.linalg.lstsq(slope[:, None].double(), effect[:, None].double()).solution
        wanted = (effect.double() - slope.double() * bias[0, 0]).square().sum().item()
        assert found[o, i, 0, 0].item() == pytest.approx(wanted, rel=1e-4)  # float32 sums


def test_importance_sees_what_a_global_mean_feeds(picture):
    """Squeeze and excite: a layer on a map of one position has a damage, and one of several images at that."""
    generator = torch.Generator().manual_seed(0)
    nodes = (Node("mean", "m", (INPUT,), {}), Node("conv", "c", ("m",), POINT))
    params = {"c": ConvParams(torch.randn(4, 3, 1, 1, generator=generator), torch.zeros(4))}
    images = [picture * share for share in (0.2, 0.6, 1.0)]
    squares = measure_importance(Graph(nodes, ("c",)), params, images, lambda raw, _: raw, 0, ["c"]).squares["c"]
    means = torch.stack([image.mean((2, 3))[0] for image in images])
    wanted = (means - means.mean(0)).square().sum(0)  # every output is a number of the result, so g^2 is 1
    assert torch.allclose(squares[:, :, 0, 0], wanted.expand(4, 3), rtol=1e-3)


def test_expected_damage_of_a_linear_layer_is_its_noise_at_the_output(picture):
    """Of a 1x1 convolution: every error's square times its input's energy around the mean. One pass of random signs
    gives it right in the mean: 200 passes, each with a relative deviation of at most sqrt(2)."""
    generator = torch.Generator().manual_seed(0)
    graph = Graph((Node("conv", "c", (INPUT,), POINT),), ("c",))
    params = {"c": ConvParams(torch.randn(4, 3, 1, 1, generator=generator), torch.zeros(4))}
    weight, widths = params["c"].weight, formats_of(3, (2, 4, 8), (2, 3))
    assert set(widths) == {free(*w) for w in ((2, 2), (2, 3), (4, 2), (4, 3), (8, 3))}
    # what columns and channels make up for is no concern of it
    squares = measure_importance(graph, params, [picture] * 200, lambda raw, _: raw, 0, ["c"]).squares["c"]
    found = damage_of(weight, widths, squares)
    energy = (picture - picture.mean((2, 3), keepdim=True)).square().sum((0, 2, 3))
    for width in widths:
        wanted = float((weight_error(weight, width).flatten(1).square() * energy).sum())
        assert found[width] / 200 == pytest.approx(wanted, rel=4 * (2 / 200) ** 0.5)  # four sigma
    assert found[free(2, 3)] > found[free(4, 3)] > found[free(8, 3)] > 0


def test_errors_shrink_about_by_four_with_every_bit():
    """From 4 bits on, where rounding is all the error there is; 8 bits are one scale an output channel."""
    weight = torch.randn(16, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    squares = [float(weight_error(weight, free(bits, 16)).square().sum()) for bits in (4, 5, 6)]
    for more, less in itertools.pairwise(squares):
        assert 2.5 < more / less < 5  # m has fewer values at more bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_damage_along_a_trellis_is_about_that_of_the_nearest_strings(bits):
    """What blocks of a size let expect, against the errors of strings that were really searched."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, 3, 3, generator=generator) * (0.3 + torch.rand(16, 64, 1, 1, generator=generator))
    squares = torch.rand(weight.shape, generator=generator)
    width = free(bits, 16, True)
    error = unshrunk(weight, nearest(weight, width).weight()) - weight
    wanted = float((squares * error.square()).sum())
    # measured with numbers of longer tails
    assert damage_of(weight, [width], squares)[width] == pytest.approx(wanted, rel=0.2)


def test_fitted_channels_are_made_as_long_as_they_were():
    weight = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]).reshape(3, 2, 1, 1)
    fitted = torch.tensor([[0.0, 5.0], [0.1, 0.0], [-1.0, 0.0]]).reshape(3, 2, 1, 1)
    made = unshrunk(weight, fitted).flatten(1)
    # <(0, 5), (3, 4)> = 20 of 25; at most four times; nothing to make of what points the other way
    assert made.flatten().tolist() == pytest.approx([0, 6.25, 0.4, 0, -1, 0])  # float32


def test_damage_foretells_what_replacing_the_weight_does(tiny, picture):
    """Through sigmoids and SiLUs, for small errors: 8 bits. A random sign pass is right to a factor, so sums are."""
    network, _ = tiny
    graph, params = lower(network.fused())
    names = [n.name for n in graph.convs()]

    def measure(raw, reference):
        return [t.sigmoid() for t in raw]

    widths = {name: formats_of(params[name].weight.shape[1], (8,), (16,)) for name in names}
    squares = measure_importance(graph, params, [picture] * 30, measure, 0, names).squares
    found = {name: damage_of(params[name].weight, widths[name], squares[name]) for name in names}
    before = measure(run_float(graph, params, picture), None)
    values: dict[str, torch.Tensor] = {}
    run_float(graph, params, picture, values.__setitem__)
    total = 0.0
    for node in graph.convs():
        moved = {
            **params,
            node.name: ConvParams(
                params[node.name].weight + weight_error(params[node.name].weight, widths[node.name][0]),
                params[node.name].bias,
            ),
        }
        changed: dict[str, torch.Tensor] = {}
        run_float(graph, moved, picture, changed.__setitem__)
        shift = (values[node.name] - changed[node.name]).mean((0, 2, 3))  # channel means are corrected
        moved[node.name] = ConvParams(moved[node.name].weight, params[node.name].bias + shift)
        after = measure(run_float(graph, moved, picture), None)
        total += sum((a - b).double().square().sum().item() for a, b in zip(after, before, strict=True))
    # 12 layers x 30 passes: a deviation of about sqrt(2 / 30) for the layers that dominate, three sigma
    assert sum(sum(d.values()) for d in found.values()) / 30 == pytest.approx(total, rel=0.8)
