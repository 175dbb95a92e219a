"""YOLOv7's blocks: what fusing makes of them, against sums by hand; arguments of rows."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY, randomise

from dsconvert.base.errors import InputError
from dsconvert.yolo.ghost import GhostBottleneck
from dsconvert.yolo.modules import Conv
from dsconvert.yolo.network import Network
from dsconvert.yolo.yolov7 import MP, SP, IDetect, RepConv


@pytest.mark.parametrize(("c1", "c2", "s", "g"), [(6, 6, 1, 1), (6, 6, 1, 3), (6, 8, 1, 2), (6, 6, 2, 1), (4, 4, 1, 4)])
def test_repconv_fuses_to_one_convolution(c1, c2, s, g):
    """With and without the identity branch; in groups, where the identity is each group's own."""
    module = RepConv(c1, c2, 3, s, None, g).eval()
    randomise(module, seed=c2)
    assert (module.rbr_identity is not None) == (c1 == c2 and s == 1)
    x = torch.randn(2, c1, 7, 7, generator=torch.Generator().manual_seed(0))
    before, bounds = module(x), module.fused_bounds()
    module.fuse()
    assert [name for name, _ in module.named_parameters()] == ["rbr_reparam.weight", "rbr_reparam.bias"]
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.fused_bounds(), bounds)
    weight = module.rbr_reparam.weight
    module.fuse()  # nothing is left to do
    assert module.rbr_reparam.weight is weight


def test_repconv_by_hand():
    """One channel: y = 2 (3x3 of ones) + 3 x / 2 + (x - 1), BatchNorms without epsilon."""
    module = RepConv(1, 1).eval()
    for bn in (module.rbr_dense[1], module.rbr_1x1[1], module.rbr_identity):
        bn.eps = 0.0
    module.rbr_dense[0].weight.data.fill_(1.0)
    module.rbr_1x1[0].weight.data.fill_(3.0)
    module.rbr_dense[1].weight.data.fill_(2.0)
    module.rbr_1x1[1].running_var.fill_(4.0)
    module.rbr_identity.running_mean.fill_(1.0)
    module.fuse()
    assert module.rbr_reparam.weight.flatten().tolist() == [2, 2, 2, 2, 2 + 1.5 + 1, 2, 2, 2, 2]
    assert module.rbr_reparam.bias.tolist() == [-1]


def test_implicit_layers_by_hand():
    """im (W (x + ia) + b): W = (3, 5), b = 1, ia = (10, 100), im = 2 gives the weight (6, 10), the bias 2 * 531."""
    detect = IDetect(1, [2], 1)
    conv = detect.m[0]
    conv.weight.data.zero_()
    conv.bias.data.zero_()
    conv.weight.data[0, :, 0, 0] = torch.tensor([3.0, 5.0])
    conv.bias.data[0] = 1.0
    detect.ia[0].implicit.data[0, :, 0, 0] = torch.tensor([10.0, 100.0])
    detect.im[0].implicit.data[0, 0] = 2.0
    x = torch.rand(1, 2, 3, 3)
    (before,) = detect([x])
    detect.fuse()
    assert conv.weight[0].flatten().tolist() == [6, 10]
    assert conv.bias[0].item() == 1062
    torch.testing.assert_close(detect([x])[0], before)
    assert not len(detect.ia)
    assert not len(detect.im)


def test_pools_of_both_kinds():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert MP()(x).flatten().tolist() == [5, 7, 13, 15]
    assert SP(3)(x)[0, 0, 1].tolist() == [9, 10, 11, 11]


def test_a_ghost_bottleneck_of_stride_2_halves_the_size():
    module = GhostBottleneck(8, 16, 3, 2).eval()
    assert module(torch.rand(1, 8, 6, 6)).shape == (1, 16, 3, 3)
    assert [m.conv.groups for m in module.modules() if isinstance(m, Conv)] == [1, 4, 8, 1, 8, 8, 1]


def with_conv(*args) -> Conv:
    config = copy.deepcopy(TINY)
    config["backbone"][1][3] = list(args)
    return Network(config, 2, 3, "ReLU").model[1]


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ((64, 3, 2), "ReLU"),
        ((64, 3, 2, "None", 1, "nn.LeakyReLU(0.1)"), "LeakyReLU"),
        ((64, 3, 2, "None", 1, "nn.SiLU()"), "SiLU"),
        ((64, 3, 2, "None", 1, "nn.Identity()"), "Identity"),
        ((64, 3, 2, "None", 1, True), "ReLU"),
        ((64, 3, 2, "None", 1, False), "Identity"),
        ((64, 3, 2, "None", 1, 1), "ReLU"),  # a dilation of 1, as YOLOv5 v7.0 has it there
        ((64, 3, 2, "None", 1, 1, "nn.Hardswish()"), "Hardswish"),
    ],
)
def test_a_row_may_name_its_activation(args, kind):
    assert type(with_conv(*args).act).__name__ == kind


@pytest.mark.parametrize(
    "args", [(64, 3, "nn.SiLU()"), (64, 3, 2, "None", 1, 2), (64, 3, 2, "None", 1, 2, "nn.SiLU()")]
)
def test_an_activation_elsewhere_or_a_dilation_is_refused(args):
    with pytest.raises(InputError, match="cannot be used"):
        with_conv(*args)


def test_channels_of_detects_maps_are_not_scaled():
    """Both trees leave na (nc + 5) channels as they are: 64 = 4 (11 + 5), where the width would make 16 of it."""
    assert with_conv(64, 3, 2).conv.out_channels == 16
    config = copy.deepcopy(TINY)
    assert Network(config, 11, 4).model[1].conv.out_channels == 64
