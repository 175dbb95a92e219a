"""What finetune learns: zero change is the model, bounds hold, the simulation is the integer network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import convert, smooth_picture, tiny_network, widen
from formats import fit_weight_real, free, largest_pair

from dsconvert.dsconv.format import PAIR_MAX
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv, grid_of, integer_step, real_params, run_integer
from dsconvert.graph.ir import INPUT, Node
from dsconvert.graph.run import execute, float_step, run_float
from dsconvert.model.file import model_bytes
from dsconvert.model.model import DSModel
from dsconvert.tune.latents import TRAINED, hold, learned, share, start
from dsconvert.tune.simulate import on_grid, simulate, step
from dsconvert.yolo.decode import decode, whole_maps


@pytest.fixture(scope="module")
def model() -> DSModel:
    return convert(*tiny_network(), smooth_picture())


@pytest.fixture(scope="module")
def widened(model) -> DSModel:
    return widen(model)


def real_model(model: DSModel) -> DSModel:
    """The same with real alpha and float activations."""
    convs = {
        name: c if c.weight.is_plain_int8 else QConv(fit_weight_real(c.weight.weight(), 4, 16), c.bias)
        for name, c in model.convs.items()
    }
    return replace(model, convs=convs, activations={})


def stirred(latents, size, seed=0):
    """The latents moved at random by up to `size` of their kind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for u in latents.values():
            u += size * (2 * torch.rand(u.shape, generator=generator) - 1)
    return latents


@pytest.mark.parametrize("train", TRAINED)
def test_no_change_is_the_same_file(model, widened, train):
    for m in (model, real_model(model), widened):
        layers, latents = start(m, train, "cpu")
        assert all(not u.any() for u in latents.values())
        assert model_bytes(learned(m, layers, latents)) == model_bytes(m)


def test_only_what_is_named_changes(model):
    wanted = {"shifts": {"cdsw", "m"}, "shifts+bias": {"cdsw", "m", "cdsb"}, "all": {"cdsw", "m", "cdsb", "vqk"}}
    for train, names in wanted.items():
        layers, latents = start(model, train, "cpu")
        assert {key.rsplit(".", 1)[1] for key in latents} == names
        changed = learned(model, layers, stirred(latents, 2.0))
        for name, conv in model.convs.items():
            new, plain = changed.convs[name], conv.weight.is_plain_int8
            assert not torch.equal(new.weight.cds_w, conv.weight.cds_w)
            assert torch.equal(new.bias, conv.bias) == ("cdsb" not in names)
            assert torch.equal(new.weight.vqk, conv.weight.vqk) == ("vqk" not in names)
            assert torch.equal(new.weight.m, conv.weight.m) == plain
            assert (new.weight.cds_w > 0).all()
        assert changed.activations == model.activations
    assert share(model, start(model, "all", "cpu")[1]) > 1
    real = real_model(model)
    layers, latents = start(real, "shifts", "cpu")
    assert {key.rsplit(".", 1)[1] for key in latents} == {"cdsw", "alpha"}
    changed = learned(real, layers, stirred(latents, 2.0))
    for name, conv in real.convs.items():
        if conv.weight.format.code.real:
            assert torch.equal(changed.convs[name].weight.m.sign(), conv.weight.m.sign())


@pytest.mark.parametrize("train", TRAINED)
def test_whatever_is_learned_no_engine_saturates(model, widened, train):
    for m in (model, widened):
        layers, latents = start(m, train, "cpu")
        stirred(latents, 20.0)
        hold(layers, latents)
        for u in latents.values():
            assert torch.isfinite(u).all()
        changed = learned(m, layers, latents)  # DSTensor refuses what leaves its bits or int8
        for name, conv in changed.convs.items():
            before = largest_pair(m.convs[name].weight.merged())
            assert largest_pair(conv.weight.merged()) <= max(PAIR_MAX, before if conv.weight.is_plain_int8 else 0)
        raised = [k[:-2] for k in latents if k.endswith(".m")]
        assert train == "all" or any(
            int(changed.convs[k].weight.m.max()) > int(m.convs[k].weight.m.max()) for k in raised
        )


def test_the_multiplier_rounds_half_way_and_stops_at_its_bound():
    vqk = torch.tensor([[[[7]], [[-8]]], [[[2]], [[1]]]], dtype=torch.int8)
    weight = DSTensor(vqk, torch.tensor([[[[4]]], [[[4]]]], dtype=torch.int8), torch.ones(2), free(4, 2))
    conv = QConv(weight, torch.zeros(2))
    model = DSModel(None, {"c": conv}, {}, None, 0, {})
    layers, latents = start(model, "shifts", "cpu")
    for factor, wanted in ((1.12, [4, 4]), (1.13, [5, 5]), (100.0, [8, 15]), (0.01, [1, 1])):
        latents["c.m"] = torch.full((2, 1, 1, 1), factor).log()
        assert learned(model, layers, latents).convs["c"].weight.m.flatten().tolist() == wanted


def test_the_gradient_of_the_shifts_is_that_of_the_real_equation(model):
    """d loss / d log CDSw = CDSw * sum(dL/dW' * W' / CDSw): against autograd through the weights themselves."""
    real = replace(model, activations={})
    x = smooth_picture()
    layers, latents = start(real, "shifts+bias", "cpu")
    parts = {name: layer.parts(name, latents) for name, layer in layers.items()}
    out = simulate(real.graph, parts, {}, x)
    loss = sum(t.square().mean() for t in out)
    grads = dict(zip(latents, torch.autograd.grad(loss, list(latents.values())), strict=True))
    params = real_params(real.convs)
    for p in params.values():
        p.weight.requires_grad_()
        p.bias.requires_grad_()
    loss = sum(t.square().mean() for t in execute(real.graph, x, lambda node, xs: float_step(node, xs, params)))
    loss.backward()
    for name, p in params.items():
        w = real.convs[name].weight
        torch.testing.assert_close(
            grads[f"{name}.cdsw"], (p.weight.grad * p.weight).sum((1, 2, 3)), rtol=2e-3, atol=1e-5
        )
        torch.testing.assert_close(grads[f"{name}.cdsb"], p.bias.grad, rtol=2e-3, atol=1e-5)
        if f"{name}.m" in grads:  # straight through the rounding, m = 1..15 one block of 16 channels each
            by_channel = p.weight.grad * p.weight
            blocks = torch.stack([c.sum(1) for c in by_channel.split(w.block_size, 1)], 1)
            free = w.m < layers[name].m_most  # at its bound a multiplier may still come down
            torch.testing.assert_close(grads[f"{name}.m"][free], blocks[free].detach(), rtol=2e-3, atol=1e-5)


def test_the_simulation_is_the_integer_network(model):
    layers, latents = start(model, "shifts+bias", "cpu")
    stirred(latents, 0.2)
    hold(layers, latents)
    changed = learned(model, layers, latents)
    parts = {name: layer.parts(name, latents) for name, layer in layers.items()}
    grids = grid_of(model.graph, model.activations)
    values = {INPUT: grids[INPUT].quantize(smooth_picture())}
    off, count = 0, 0
    with torch.no_grad():
        for node in model.graph.nodes:
            given = [values[name] for name in node.inputs]
            exact = values[node.name] = integer_step(node, given, changed.convs, grids)
            real = [grids[name].dequantize(q) for name, q in zip(node.inputs, given, strict=True)]
            mine = grids[node.name].quantize(step(node, real, parts, grids))
            assert (mine - exact).abs().max() <= 1
            off += int((mine != exact).sum())
            count += exact.numel()
        assert off / count < 2e-3
        whole = simulate(model.graph, parts, model.activations, smooth_picture())
    exact = run_integer(model.graph, changed.convs, model.activations, smooth_picture())
    for a, b, name in zip(whole, exact, model.graph.outputs, strict=True):
        # a value that is rounded the other way early moves all behind it: the finest output by a step and a quarter
        assert (a - b).abs().mean() < 2 * grids[name].scale


def test_float_activations_are_the_float_network(model):
    real = real_model(model)
    layers, latents = start(real, "shifts", "cpu")
    stirred(latents, 0.1)
    parts = {name: layer.parts(name, latents) for name, layer in layers.items()}
    x = smooth_picture()
    wanted = run_float(real.graph, real_params(learned(real, layers, latents).convs), x)
    for a, b in zip(simulate(real.graph, parts, {}, x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_whole_maps_decode_as_split_ones_do(model):
    raw = run_integer(model.graph, model.convs, model.activations, smooth_picture())
    assert len(raw) == 3 * len(model.head.strides)
    whole = whole_maps(raw, model.head)
    assert len(whole) == len(model.head.strides)
    torch.testing.assert_close(decode(whole, model.head), decode(raw, model.head), rtol=0, atol=0)
    assert whole_maps(whole, model.head) is whole


def test_grids_round_and_pass_gradients_as_torch_s_own_fake_quantizer():
    grid = QParams(0.03, 100)
    x = torch.linspace(-6, 8, 5001)
    x = x[((x / 0.03) % 1 - 0.5).abs() > 1e-3].requires_grad_()  # ties may fall to either side
    other = x.detach().clone().requires_grad_()
    slope = torch.linspace(1, 2, len(x))
    mine, torchs = on_grid(x, grid), torch.fake_quantize_per_tensor_affine(other, 0.03, 100, 0, 255)
    torch.testing.assert_close(mine, torchs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad((mine * slope).sum(), x), torch.autograd.grad((torchs * slope).sum(), other)
    )
    node = Node("act", "a", ("x",), {"kind": "SiLU"})
    grids = {"x": grid, "a": QParams(0.02, 14)}
    out = step(node, [x], {}, grids)
    sigmoid = torch.fake_quantize_per_tensor_affine(other.sigmoid(), 1 / 255, 0, 0, 255)
    rough = torch.fake_quantize_per_tensor_affine(other * sigmoid, 0.02, 14, 0, 255)
    torch.testing.assert_close(out, rough, rtol=0, atol=0.0201)
    assert (out - rough).abs().mean() < 1e-3
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(rough.sum(), other)[0], rtol=0, atol=0.02
    )
