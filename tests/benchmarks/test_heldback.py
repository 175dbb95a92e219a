"""J by layer against brute force and known answers, sets of held-back images, and fits by name."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import cv2
import heldback
import named_fits as fits
import numpy as np
import pytest
import torch
from conftest import SIDE, smooth_picture
from formats import fit_weight
from layer_error import layer_error, layer_sums, watched

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.fit.layer import GPTQ
from dsconvert.graph.integer import QConv, grid_of, real_params, run_integer
from dsconvert.graph.run import run_float
from dsconvert.yolo.lower import lower, split_detect

LAYER = "model.7.m.0.cv2.conv"  # 3x3 on 16x16 positions, all of which are looked at


@pytest.fixture
def network(tiny, converted):
    """Graph, float parameters and head of the network that `converted` was made of."""
    return *split_detect(*lower(tiny[0].fused()), tiny[1]), tiny[1]


@pytest.fixture
def photographs(tmp_path):
    """Three files of 64x64 pixels."""
    pictures = [smooth_picture(), smooth_picture().flip(3), smooth_picture().flip(2)]
    for index, picture in enumerate(pictures):
        data = (picture[0] * 255).round().byte().permute(1, 2, 0).flip(2).contiguous()
        cv2.imwrite(str(tmp_path / f"{index}.png"), data.numpy())
    return [tmp_path / f"{index}.png" for index in range(len(pictures))]


def test_j_of_a_layer_is_that_of_brute_force(network, converted, photographs):
    graph, params, head = network
    on = watched(graph, params, head, photographs, Size.of(SIDE), 0)
    found = layer_sums(converted, params, on)
    assert set(found) == set(converted.convs)
    (node,) = (n for n in graph.convs() if n.name == LAYER)
    made, grid = converted.convs[LAYER], grid_of(graph, converted.activations)[node.inputs[0]]
    weight, bias = made.weight.weight().double().numpy(), made.bias.double().numpy()
    for index in range(3):
        values, wanted = {}, {}
        x = on.images.one(index, "cpu")
        run_integer(graph, converted.convs, converted.activations, x, values.__setitem__)
        run_float(graph, params, x, wanted.__setitem__)
        q = np.pad(grid.dequantize(values[node.inputs[0]])[0].double().numpy(), ((0, 0), (1, 1), (1, 1)))
        y = wanted[LAYER][0].half().double().numpy()
        error = square = 0.0
        picks, weights = on.drawn[LAYER].get(index)
        for pick, w in zip(picks.tolist(), weights.tolist(), strict=True):
            row, column = divmod(pick, 16)
            output = (weight * q[:, row : row + 3, column : column + 3]).sum((1, 2, 3)) + bias
            error += w * np.square(output - y[:, row, column]).sum()
            square += w * np.square(y[:, row, column]).sum()
        # convolutions in float32, some outputs of which are halves
        assert found[LAYER][index].tolist() == pytest.approx([error, square, float(weights.sum())], rel=1e-4)


def test_eight_bits_are_near_the_float_network_and_four_are_not(network, converted, photographs):
    graph, params, head = network
    on = watched(graph, params, head, photographs, Size.of(SIDE), 0)

    def shares(bits):
        convs = {n: QConv(fit_weight(p.weight, bits, p.weight.shape[1]), p.bias) for n, p in params.items()}
        sums = layer_sums(replace(converted, convs=convs, activations={}), params, on)
        return {name: layer_error(s).share for name, s in sums.items()}

    eight, four = shares(8), shares(4)
    assert max(eight.values()) < 0.01
    assert all(four[name] > 10 * eight[name] for name in eight)


def test_of_the_network_itself_nothing_is_left_but_what_a_bias_adds(network, converted, photographs):
    graph, _, head = network
    own = real_params(converted.convs)
    on = watched(graph, own, head, photographs, Size.of(SIDE), 0)
    moved = converted.convs[LAYER]
    for shift in (0.0, 3.0):
        convs = {**converted.convs, LAYER: replace(moved, bias=moved.bias + shift)}
        found = layer_error(layer_sums(replace(converted, convs=convs, activations={}), own, on)[LAYER])
        # the float network's outputs are kept as halves
        assert found.j == pytest.approx(len(moved.bias) * shift**2, rel=1e-3, abs=1e-4)


def test_the_standard_error_is_over_images():
    found = layer_error(torch.tensor([[1.0, 10.0, 1.0], [3.0, 10.0, 1.0]]))
    assert (found.j, found.share) == (2, 0.2)
    assert found.uncertainty == pytest.approx(0.5**0.5)


def test_no_image_is_held_back_twice_and_none_by_its_own_fit(photographs):
    paths = [photographs[0].with_name(f"{i}.png") for i in range(20)]
    made = heldback.folds(paths, 4, 3)
    away = [path for _, held in made for path in held]
    assert len(away) == len(set(away)) == 12
    for rest, held in made:
        assert sorted(rest + held) == sorted(paths)
    for held, count in ((4, 5), (1, 2), (30, 1)):
        with pytest.raises(InputError, match="too few"):
            heldback.folds(paths, held, count)


FIT = """
from named_fits import Nearest

class Fit(Nearest):
    def __init__(self, channels, photographs):
        pass

    def layer(self, node, weight, format, batches):
        print("fitted", node.name)
        return super().layer(node, weight, format, batches)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with fits/mine.py and fits/empty.py, as the current one."""
    (tmp_path / "fits").mkdir()
    (tmp_path / "fits/mine.py").write_text(FIT)
    (tmp_path / "fits/empty.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_fit_is_a_name_or_a_file(mine):
    assert fits.named("product") is GPTQ
    assert fits.named("mine").__module__ == "mine"
    with pytest.raises(InputError, match="no class Fit"):
        fits.named("empty")
    with pytest.raises(InputError, match=r"no fit yours: neither a file .*least-squares"):
        fits.named("yours")


def test_the_script_has_a_row_for_every_layer_and_the_error_of_v(work, mine, monkeypatch, capsys):
    line = ["heldback.py", "best.pt", "images/val", "--fit", "mine", "--held", "2", "--imgsz", "64", "--samples", "2"]
    monkeypatch.setattr(sys, "argv", line)
    heldback.main()
    shown = capsys.readouterr().out
    fitted, rows = re.findall(r"^fitted (\S+?)(?:\.conv)?$", shown, re.M), re.findall(r"^(model\S+) .*", shown, re.M)
    assert rows == fitted
    assert len(rows) > 12
    assert re.search(r"^mean share over layers: [\d.]+ on the images of the fit, [\d.]+ held back$", shown, re.M)
    assert re.search(r"^mine, 2 images, seed 0: error [\d.]+ \+- [\d.]+, median .*; no fine-tune$", shown, re.M)
