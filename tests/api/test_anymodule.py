"""quantize_module: any module's Conv2d and Linear become DSConv, and stay integers in torch's ONNX export."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from torch import nn

from dsconvert.api.modules import DSLinear, ModulePlan, Rounded, quantize_module
from dsconvert.base.errors import InputError
from dsconvert.dsconv.modules import DSConv
from dsconvert.onnxfile.inspect import conv_weights


class Small(nn.Module):
    """Plain, grouped, depthwise, odd-shaped and shared layers, two Linears, and one layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.odd = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.shared = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.tokens, self.out = nn.Linear(8, 6), nn.Linear(6, 5, bias=False)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.stem(x))).relu()
        x = self.mirrored(self.odd(x)).relu()
        x = self.shared(self.shared(x)).relu()
        return self.out(self.tokens(x.flatten(2).transpose(1, 2)).relu().mean(1))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Small().eval(), [torch.rand(4, 3, 12, 12) for _ in range(2)]


def error(made, module, batches) -> float:
    wanted, got = (torch.cat([m(x) for x in batches]).detach() for m in (module, made))
    return float((got - wanted).square().mean() / wanted.square().mean())


def test_every_layer_is_converted_and_the_module_left_as_it_is(small):
    module, batches = small
    before = {n: v.clone() for n, v in module.state_dict().items()}
    made = quantize_module(module, batches, ModulePlan(bits=8, block_size=4))
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in made.modules())
    assert sum(isinstance(m, DSConv) for m in made.modules()) == 9
    assert sum(isinstance(m, DSLinear) for m in made.modules()) == 2
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    assert error(made, module, batches) < 1e-3


def test_fewer_bits_cost_more_and_the_fit_pays(small):
    module, batches = small
    errors = [error(quantize_module(module, batches, ModulePlan(b, 4)), module, batches) for b in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    plain = quantize_module(module, batches, ModulePlan(2, 4, fit="least_squares"))
    assert errors[0] < error(plain, module, batches)


def test_activations_are_rounded_within_what_was_seen(small):
    module, batches = small
    made = quantize_module(module, batches, ModulePlan(8, 4, activations=8))
    assert sum(isinstance(m, Rounded) for m in made.modules()) == 8  # all but the unused one
    inputs = torch.cat(batches)
    assert made.stem[0].scale == pytest.approx(float(inputs.max()) / 255)
    assert 0 < error(made, module, batches) < 0.01


@pytest.mark.parametrize("activations", [None, 8])
def test_torchs_export_keeps_integer_weights_and_numbers(small, tmp_path, activations):
    module, batches = small
    made = quantize_module(module, batches, ModulePlan(4, 4, activations, "least_squares"))
    path = tmp_path / "small.onnx"
    torch.onnx.export(made, (batches[0],), str(path), dynamo=False, opset_version=17, do_constant_folding=False)
    found = conv_weights(onnx.load(path))
    assert len(found) == 9  # the shared one twice, the unused one not at all
    assert {w.type for w in found} == {"int8"}
    session = onnxruntime.InferenceSession(str(path))
    (out,) = session.run(None, {session.get_inputs()[0].name: batches[0].numpy()})
    np.testing.assert_allclose(out, made(batches[0]).detach().numpy(), atol=1e-2 if activations else 1e-4)


PUBLISHED = {  # parameters of the published definitions, for ImageNet's 1000 classes
    zoo.resnet34: 21_797_672, zoo.resnet50: 25_557_032, zoo.alexnet: 61_100_840, zoo.mobilenet_v1: 4_231_976,
    zoo.mobilenet_v2: 3_504_872,
}  # fmt: skip


@pytest.mark.parametrize("network", PUBLISHED, ids=lambda n: n.__name__)
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_papers_networks_convert_and_export(network, tmp_path):
    """Parameters are counted at full width; an eighth of it, with random weights, is converted and exported."""
    with torch.device("meta"):
        assert sum(p.numel() for p in network().parameters()) == PUBLISHED[network]
    torch.manual_seed(0)
    module = network(width=1 / 8, classes=10).eval()
    images = torch.rand(1, 3, 64, 64)
    layers = sum(type(m) in (nn.Conv2d, nn.Linear) for m in module.modules())
    made = quantize_module(module, [images], ModulePlan(8, 32, fit="least_squares"))
    torch.testing.assert_close(made(images), module(images), rtol=0.1, atol=0.1)
    path = tmp_path / "net.onnx"
    torch.onnx.export(made, (images,), str(path), dynamo=False, opset_version=17, do_constant_folding=False)
    found = conv_weights(onnx.load(path))
    assert [w.type for w in found] == ["int8"] * layers


def test_bad_plans_are_one_sentence():
    for wrong in ({"bits": 9}, {"block_size": 0}, {"activations": 4}, {"fit": "magic"}):
        with pytest.raises(InputError):
            ModulePlan(**wrong)
    with pytest.raises(InputError, match="nothing to convert"):
        quantize_module(nn.ReLU(), [torch.rand(1)])
