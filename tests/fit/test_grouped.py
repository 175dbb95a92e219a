"""Grouped convolutions in every driver: the parts fitted group by group are joined with all that they are stored by."""

from __future__ import annotations

from functools import partial

import cv2
import numpy as np
import pytest
import torch
from formats import along, fit_weight, free
from test_anyonnx import exported, run
from torch import nn
from torch.nn import functional as F

from dsconvert.api.modules import ModulePlan, quantize_module
from dsconvert.convert.onnx import OnnxPlan, quantize_onnx
from dsconvert.dsconv.codes import REAL, TRELLIS
from dsconvert.dsconv.codes import trellis_table as trellis
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.layer import GPTQ
from dsconvert.fit.seen import seen_evenly
from dsconvert.graph.ir import Node

weights_only = partial(OnnxPlan, activations="float")
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (40, 30)))
    return folder


def real(weight: DSTensor) -> torch.Tensor:
    """W' one number at a time, from what is stored: the code's string of bits, the shift of the block, CDSw."""
    cho, chi, kh, kw = weight.vqk.shape
    size, out = min(weight.block_size, chi), torch.zeros(weight.vqk.shape)
    for o in range(cho):
        seen = 0
        for first in range(0, chi, size):
            for y in range(kh):
                for x in range(kw):
                    for i in range(first, min(first + size, chi)):
                        integer = int(weight.vqk[o, i, y, x])
                        if weight.format.code == TRELLIS:
                            seen = (seen << weight.bits | int(weight.stored[o, i, y, x])) & 255
                            integer = int(trellis.table(weight.bits)[seen])
                        out[o, i, y, x] = weight.cds_w[o] * (int(weight.m[o, first // size, y, x]) * integer)
    return out


@pytest.mark.parametrize(
    ("channels", "groups", "bits", "block", "coded"),
    [
        (32, 2, 4, 32, True),  # the case that ended in a fault: 16 channels a group
        (32, 2, 3, 8, True),
        (32, 4, 2, 32, True),  # 8 a group
        (48, 2, 4, 16, False),  # blocks of 16 and 8
        (12, 2, 4, 32, False),  # 6 a group: no trellis
        (24, 3, 5, 8, False),
        (32, 2, 8, 32, False),
    ],
)
def test_an_onnx_file_with_grouped_convolutions(photos, tmp_path, channels, groups, bits, block, coded):
    torch.manual_seed(1)
    first, grouped = nn.Conv2d(3, channels, 3, stride=4), nn.Conv2d(channels, channels, 3, groups=groups)
    path = exported(
        nn.Sequential(first, nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(channels, 64, 1)), tmp_path / "n.onnx"
    )
    made = quantize_onnx(path, photos, weights_only(bits, block, samples=2))
    weight = made.fitted[made.layers[1].index].weight
    assert (weight.format.code == TRELLIS) == coded
    assert weight.vqk.shape == (channels, channels // groups, 3, 3)
    x = np.random.default_rng(4).random((1, 3, 32, 32), np.float32)
    y = torch.from_numpy(x)
    for layer in made.layers:
        conv = made.fitted[layer.index]
        if layer is made.layers[1]:
            before, wanted = y, F.conv2d(y, real(conv.weight), conv.bias, groups=groups)
        y = F.conv2d(y, real(conv.weight), conv.bias, layer.stride, groups=layer.groups)
        y = y if layer is made.layers[-1] else y.relu()
    # float32 sums in another order
    np.testing.assert_allclose(run(made.model, x)[0], y.numpy(), rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    kept = F.conv2d(before, grouped.weight, grouped.bias, groups=groups)
    # 2 bits leave a tenth of the power at most, and each further bit a quarter of that; nothing exact is claimed
    assert (wanted - kept).square().mean() / kept.var() < {2: 0.3, 3: 0.1, 4: 0.03, 5: 0.02, 8: 0.01}[bits]


def test_each_group_is_stored_as_if_it_were_alone(photos, tmp_path):
    torch.manual_seed(3)
    whole = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 24, 3, groups=2))
    made = quantize_onnx(exported(whole, tmp_path / "whole.onnx"), photos, weights_only(bits=3))
    half = nn.Sequential(whole[0], whole[1], Half(whole[2]))
    one = quantize_onnx(exported(half, tmp_path / "half.onnx"), photos, weights_only(bits=3))
    grouped, alone = (m.fitted[m.layers[1].index].weight for m in (made, one))
    assert grouped.format.code == TRELLIS
    for part in ("stored", "vqk", "m"):
        assert torch.equal(getattr(grouped, part)[12:], getattr(alone, part)), part
    # the float outputs are those of one grouped convolution, whose sums run in another order
    torch.testing.assert_close(grouped.cds_w[12:], alone.cds_w, rtol=1e-6, atol=0)


class Half(nn.Module):
    """The second group of a convolution of 32 channels in two."""

    def __init__(self, both: nn.Conv2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, 3)
        self.conv.weight, self.conv.bias = (nn.Parameter(p.detach()[12:]) for p in (both.weight, both.bias))

    def forward(self, x):
        return self.conv(x[:, 16:])


@pytest.mark.parametrize(("groups", "bits"), [(2, 4), (4, 2), (2, 3)])
def test_a_checkpoints_layer_and_a_torch_modules_take_groups_too(groups, bits):
    torch.manual_seed(2)
    conv = nn.Conv2d(32, 32, 3, padding=1, groups=groups).eval().requires_grad_(False)
    x = torch.rand(2, 32, 9, 9)
    node = Node("conv", "c", ("x",), {"stride": 1, "padding": 1, "dilation": 1, "groups": groups})
    fitted = GPTQ().layer(node, conv.weight, along(bits, 16), lambda: seen_evenly(x, conv(x), 0)).weight
    assert fitted.format == along(bits, 16)
    assert torch.allclose(real(fitted), fitted.weight(), atol=1e-6)
    made = quantize_module(conv, [x], ModulePlan(bits, 16))
    assert torch.isfinite(made(x)).all()
    assert made(x).shape == conv(x).shape


@pytest.mark.parametrize(("bits", "block", "coded"), [(2, 8, True), (4, 16, True), (4, 6, False), (8, 24, False)])
def test_what_is_cut_into_channels_and_joined_is_the_same_weight(bits, block, coded):
    torch.manual_seed(0)
    whole = fit_weight(torch.randn(10, 24 if not coded else 16, 3, 1), bits, block, coded)
    parts = [whole.rows(torch.arange(*ends)) for ends in ((0, 3), (3, 4), (4, 10))]
    again = DSTensor.joined(parts)
    assert (again.format, again.weight_bits) == (whole.format, whole.weight_bits)
    for part in ("stored", "vqk", "m", "cds_w"):
        assert torch.equal(getattr(again, part), getattr(whole, part)), part
    turned = whole.rows(torch.arange(9, -1, -1))
    assert torch.equal(turned.weight(), whole.weight().flip(0))


def test_real_shifts_are_joined_too_and_unlike_parts_are_not():
    vqk, m = torch.ones(2, 4, 1, 1, dtype=torch.int8), torch.ones(2, 1, 1, 1, dtype=torch.int8)
    plain = DSTensor(vqk, m, torch.ones(2), free(4, 4))
    scaled = DSTensor(vqk, 0.5 * m.float(), torch.ones(2), WeightFormat(4, 4, REAL))
    assert DSTensor.joined([scaled, scaled]).weight().flatten().tolist() == [0.5] * 16
    with pytest.raises(ValueError, match="stored differently"):
        DSTensor.joined([plain, scaled])
    with pytest.raises(ValueError, match="stored differently"):
        DSTensor.joined([DSTensor(vqk, m, torch.ones(2), free(b, 4)) for b in (4, 5)])
