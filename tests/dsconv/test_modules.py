"""DSConv as a torch module against the equation in float64 loops, and in the place of a network's convolutions."""

from __future__ import annotations

import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
from formats import fit_weight
from torch.nn import functional as F

from dsconvert.dsconv.modules import DSConv, fitted_conv
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import ConvParams
from dsconvert.graph.run import run_float
from dsconvert.yolo.lower import lower


def filled(module: DSConv, seed: int = 0) -> DSConv:
    g = torch.Generator().manual_seed(seed)
    module.intweight.copy_(torch.randint(-8, 8, module.intweight.shape, generator=g))
    for name in ("alpha", "KDSb", "CDSw", "CDSb"):
        buffer = getattr(module, name)
        if buffer is not None:
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.1)
    if module.bias is not None:
        module.bias.data.copy_(torch.rand(module.bias.shape, generator=g))
    return module


def reference(module: DSConv, x: np.ndarray) -> np.ndarray:
    """out[o] = conv(x, CDSw (alpha VQK + KDSb)) + CDSb + bias, element by element in float64."""
    vqk, alpha = module.intweight.numpy().astype(np.float64), module.alpha.double().numpy()
    cho, chi, kh, kw = vqk.shape
    w = np.zeros_like(vqk)
    for o, i, y, k in itertools.product(range(cho), range(chi), range(kh), range(kw)):
        b = i // module.block_size
        value = alpha[o, b, y, k] * vqk[o, i, y, k]
        if module.KDSb is not None:
            value += module.KDSb[o, b, y, k].item()
        w[o, i, y, k] = value * (1.0 if module.CDSw is None else module.CDSw[o].item())
    (sy, sx), (py, px), (dy, dx) = module.stride, module.padding, module.dilation
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (py, py), (px, px)))
    rows = (padded.shape[2] - dy * (kh - 1) - 1) // sy + 1
    columns = (padded.shape[3] - dx * (kw - 1) - 1) // sx + 1
    out = np.zeros((x.shape[0], cho, rows, columns))
    per_group = cho // module.groups
    for n, o, r, c in itertools.product(range(x.shape[0]), range(cho), range(rows), range(columns)):
        first = (o // per_group) * chi
        for i, y, k in itertools.product(range(chi), range(kh), range(kw)):
            out[n, o, r, c] += w[o, i, y, k] * padded[n, first + i, r * sy + y * dy, c * sx + k * dx]
    for extra in (module.CDSb, module.bias):
        if extra is not None:
            out += extra.detach().double().numpy()[:, None, None]
    return out


@pytest.mark.parametrize(
    ("chi", "cho", "k", "stride", "dilation", "groups", "block", "kds_bias", "cds", "bias"),
    [
        (5, 3, 3, 1, 1, 1, 2, True, True, False),  # ragged: blocks of 2, 2, 1
        (6, 4, 3, 2, 1, 2, 2, False, True, True),  # groups: 3 channels each, blocks of 2 and 1
        (4, 4, 1, 1, 1, 4, 32, True, False, True),  # depthwise, one short block
        (3, 2, 3, 1, 2, 1, 32, False, False, False),  # dilation, block larger than the channels
    ],
)
def test_forward_is_the_equation(chi, cho, k, stride, dilation, groups, block, kds_bias, cds, bias):
    module = filled(DSConv(chi, cho, k, stride, None, dilation, groups, "zeros", bias, block, kds_bias, cds))
    x = torch.rand(2, chi, 6, 5, generator=torch.Generator().manual_seed(3))
    # float32 sums of at most 54 products of size < 100: error below 54 * 100 * 2^-24 * a few
    np.testing.assert_allclose(module(x).detach().numpy(), reference(module, x.numpy()), rtol=1e-5, atol=1e-3)


def test_alpha_is_really_used():
    module = filled(DSConv(4, 2, 1, block_size=2))
    x = torch.rand(1, 4, 3, 3)
    before = module(x)
    module.alpha.mul_(2)
    assert torch.equal(module(x), 2 * before)  # doubling is exact in binary


def test_other_padding_modes_pad_with_values():
    module = filled(DSConv(1, 1, 3, padding=1, padding_mode="replicate"))
    x = torch.ones(1, 1, 4, 4)
    inside = module(x)[0, 0, 1, 1]
    assert torch.allclose(module(x), inside.expand(1, 1, 4, 4))  # a constant image stays constant up to the border


def test_published_signature_and_buffers():
    names = list(inspect.signature(DSConv).parameters)
    assert names[:12] == [
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        "bias", "block_size", "KDSBias", "CDS",
    ]  # fmt: skip
    assert names[12:] == ["bits"]  # ours, behind the published ones
    shapes = {k: tuple(v.shape) for k, v in DSConv(48, 8, 3, KDSBias=True, CDS=True).named_buffers()}
    assert shapes == {
        "intweight": (8, 48, 3, 3), "alpha": (8, 2, 3, 3), "KDSb": (8, 2, 3, 3), "CDSw": (8,), "CDSb": (8,),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [{"groups": 3}, {"padding_mode": "mirror"}])
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must divide|unknown"):
        DSConv(4, 4, 3, **wrong)


def test_converted_network_computes_what_the_graph_does(tiny, picture):
    network = tiny[0].fused()
    graph, params = lower(network)
    names = [n.name for n in graph.convs() if ".m." in n.name and not n.name.startswith("model.8")]
    convs = {n: QConv(fit_weight(params[n].weight, 4, 32), params[n].bias + 0.1) for n in names}
    converted = copy.deepcopy(network)
    for name, c in convs.items():
        parent, _, last = name.rpartition(".")
        fitted = fitted_conv(converted.get_submodule(name), c.weight, c.bias)
        setattr(converted.get_submodule(parent), last, fitted)
    replaced = {**params, **{n: ConvParams(c.weight.weight(), c.bias) for n, c in convs.items()}}
    for ours, wanted in zip(converted(picture), run_float(graph, replaced, picture), strict=True):
        # the module multiplies CDSw after alpha, the graph before: float32 rounding through 12 layers
        assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(converted(picture)[0], network(picture)[0], atol=1e-3)  # and it did change something


def test_a_fitted_conv_keeps_geometry():
    conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, groups=2)
    fitted = fit_weight(conv.weight, 8, 2)
    module = fitted_conv(conv, fitted, torch.zeros(6))
    x = torch.rand(1, 4, 9, 9)
    assert torch.equal(module.real_weight(), fitted.weight())
    assert torch.allclose(module(x), F.conv2d(x, fitted.weight(), None, 2, 1, 1, 2), atol=1e-6)  # float32 rounding
