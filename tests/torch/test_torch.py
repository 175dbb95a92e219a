"""dsconvert.torch: published signatures, a forward pass that uses every part, training, state dicts, a YOLOv5 tree."""

from __future__ import annotations

import copy
import inspect
import io
import sys

import fake_yolov5
import pytest
import torch
from test_modules import reference
from torch import nn
from torch.nn import functional as F

from dsconvert.base.errors import InputError
from dsconvert.dsconv.tensor import expand_blocks
from dsconvert.torch import Bottleneck_DSConv2D, DSConv, DSConv2D, DSConv2D_C3, register
from dsconvert.yolo.checkpoint import load_checkpoint


def made(cls=DSConv, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return cls(*args, **kwargs)


def first(function, count: int) -> list[str]:
    return list(inspect.signature(function).parameters)[:count]


def test_signatures_are_the_published_ones():
    conv = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
            "bias", "block_size", "KDSBias", "CDS"]  # fmt: skip
    assert first(DSConv, 12) == conv
    defaults = {n: inspect.signature(DSConv).parameters[n].default for n in conv[3:]}
    assert list(defaults.values()) == [1, None, 1, 1, "zeros", False, 32, False, False]
    assert first(DSConv2D, 8) == ["inc", "ouc", "k", "s", "p", "g", "d", "act"]
    assert first(Bottleneck_DSConv2D, 5) == ["c1", "c2", "shortcut", "g", "e"]
    assert first(DSConv2D_C3, 6) == ["c1", "c2", "n", "shortcut", "g", "e"]
    full = DSConv(5, 6, 3, KDSBias=True, CDS=True, block_size=2)
    shapes = {name: tuple(value.shape) for name, value in full.named_buffers()}
    blocks = (6, 3, 3, 3)
    assert shapes == {"intweight": (6, 5, 3, 3), "alpha": blocks, "KDSb": blocks, "CDSw": (6,), "CDSb": (6,)}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_forward_is_the_equation_with_every_part_of_it(frozen, groups):
    module = made(DSConv, 6, 4, 3, 1, None, 1, groups, "zeros", True, 2, True, True).eval()
    module.CDSw.copy_(torch.tensor([0.5, 1.5, 2.0, 1.0]))
    module.CDSb.copy_(torch.tensor([3.0, -1.0, 0.0, 2.0]))
    module.refit()
    if frozen:
        module.freeze_vqk()
    x = torch.rand(2, 6, 5, 4)
    before = module(x).detach()
    # float32 sums of 54 products of numbers below 1
    torch.testing.assert_close(
        before.double(), torch.tensor(reference(frozen_copy(module), x.numpy())), atol=1e-5, rtol=0
    )
    for name in ("alpha", "KDSb", "CDSw", "CDSb", "intweight") if frozen else ("CDSb",):
        part = getattr(module, name).data
        part += 1
        assert not torch.allclose(module(x), before, atol=1e-3), name
        part -= 1


def frozen_copy(module: DSConv) -> DSConv:
    """Its state as plain tensors without gradients."""
    other = copy.deepcopy(module)
    other.freeze_vqk()
    return other.requires_grad_(False)


def test_the_fit_at_the_start_rounds_to_the_nearest_and_fills_the_bits():
    module = made(DSConv, 48, 8, 3)
    values = module.intweight.unique().tolist()
    assert values == list(range(-8, 8))
    steps = expand_blocks(module.alpha, 48, 32)
    inside = (module.intweight > -8) & (module.intweight < 7)
    error = (module.weight - steps * module.intweight).abs()
    assert bool((error <= 0.5001 * steps.abs())[inside].all())
    assert error.square().mean() < 0.01 * module.weight.square().mean()  # 20 dB: what 4 bits can
    assert set(DSConv(4, 4, 1, bits=2).intweight.unique().tolist()) <= {-2, -1, 0, 1}
    with pytest.raises(ValueError, match="2 to 8"):
        DSConv(4, 4, 1, bits=9)


def learn(module: nn.Module, steps: int = 60) -> tuple[float, float]:
    """Loss of reproducing a random convolution, before and after."""
    torch.manual_seed(1)
    x, teacher = torch.rand(4, 6, 8, 8), nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), teacher(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_straight_through_training_moves_the_integers():
    module = made(DSConv, 6, 4, 3, block_size=4, KDSBias=True, bias=True).train()
    before = module.intweight.clone()
    start, end = learn(module)
    assert end < 0.1 * start
    assert (module.intweight != before).float().mean() > 0.2
    # training and evaluation convolve the same weight, up to the last step's move of alpha
    x = torch.rand(1, 6, 8, 8)
    module.train()
    for _ in range(20):
        module(x)  # the shifts settle on the weight
    trained = module(x)
    assert torch.allclose(module.eval()(x), trained, atol=1e-5)


def test_frozen_integers_stay_and_the_shifts_learn():
    module = made(DSConv, 6, 4, 3, block_size=4, KDSBias=True, CDS=True)
    module.freeze_vqk()
    assert {n for n, _ in module.named_parameters()} == {"alpha", "KDSb", "CDSw", "CDSb"}
    before = {n: v.detach().clone() for n, v in module.state_dict().items()}
    start, end = learn(module)
    assert end < 0.3 * start
    after = module.state_dict()
    assert torch.equal(after["intweight"], before["intweight"])
    assert all(not torch.equal(after[n], before[n]) for n in ("alpha", "KDSb", "CDSw", "CDSb"))
    module.thaw_vqk()
    assert {n for n, _ in module.named_parameters()} == {"weight"}


@pytest.mark.parametrize("frozen", [False, True])
def test_state_dict_and_pickle_round_trips(frozen):
    module = made(DSConv2D_C3, 8, 8, 2, block_size=4, KDSBias=True, CDS=True)
    if frozen:
        for part in module.modules():
            if isinstance(part, DSConv):
                part.freeze_vqk()
    module.eval()
    x = torch.rand(1, 8, 6, 6)
    other = made(DSConv2D_C3, 8, 8, 2, block_size=4, KDSBias=True, CDS=True, seed=5).eval()
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), module(x))


def test_a_float_convolutions_state_dict_is_fitted():
    conv = nn.Conv2d(6, 4, 3, bias=False)
    module = made(DSConv, 6, 4, 3, seed=7)
    module.load_state_dict(conv.state_dict())  # strict
    assert torch.equal(module.weight, conv.weight)
    assert torch.equal(module.intweight, DSConv.from_float(conv).intweight)
    assert (module.eval().real_weight() - conv.weight).square().mean() < 0.01 * conv.weight.square().mean()


def test_an_average_of_weights_is_converted_anew():
    """YOLOv5 keeps a moving average of everything in the state dict that is a float; the integers must follow."""
    average, newest = made(DSConv, 6, 4, 3).eval(), made(DSConv, 6, 4, 3, seed=9)
    with torch.no_grad():
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.mul_(0.5).add_(0.5 * newest.state_dict()[name])
    wanted = (average.weight / average.alpha).round().clamp(-8, 7)
    assert torch.equal(average.state_dict()["intweight"].float(), wanted)
    assert torch.equal(copy.deepcopy(average).intweight.float(), wanted)


def test_a_registered_tree_builds_trains_and_saves_dsconv_rows(tmp_path, picture):
    with fake_yolov5.tree() as yolo:
        with pytest.raises(NameError):
            yolo.DetectionModel(fake_yolov5.config())
        torch.manual_seed(0)
        plain = yolo.DetectionModel(fake_yolov5.config("C3"))
        register(yolo)
        register(yolo, block_size=8)  # again: the later one counts, and wraps once
        torch.manual_seed(0)
        model = yolo.DetectionModel(fake_yolov5.config())
        layer = model.model[7]
        assert isinstance(layer, DSConv2D_C3)
        assert [type(m).__name__ for m in layer.m] == ["Bottleneck_DSConv2D"] * 2
        assert type(layer.cv1).__module__ == "models.common"
        assert isinstance(layer.m[1].cv2.conv, DSConv)
        assert layer.m[0].cv2.conv.block_size == 8
        assert (layer.i, layer.f, layer.np) == (7, -1, plain.model[7].np)
        assert layer.type == "dsconvert.torch.blocks.DSConv2D_C3"
        assert model.save == plain.save
        assert model.yaml["head"][2][2] == "DSConv2D_C3"
        # same seed, same float weights: the parser ran once for each row
        assert plain.state_dict().keys() <= model.state_dict().keys()
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        before = layer.m[0].cv2.conv.weight.detach().clone()
        loss = sum(out.square().mean() for out in model.train()(picture))
        loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert not torch.equal(layer.m[0].cv2.conv.weight, before)
        model.eval()
        wanted = model(picture)
        torch.save({"model": model, "ema": None, "epoch": 0}, tmp_path / "trained.pt")
    loaded = load_checkpoint(tmp_path / "trained.pt")
    assert loaded.network.kinds[7] == "C3"
    for ours, theirs in zip(loaded.network(picture), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)  # the loader has W' for a weight, and CDSb in BatchNorm


@pytest.mark.parametrize(("name", "args", "kind"), [("DSConv2D", [96, 3], DSConv2D),
                                                    ("Bottleneck_DSConv2D", [96], Bottleneck_DSConv2D)])  # fmt: skip
def test_other_rows_that_repeat_become_sequences(name, args, kind):
    with fake_yolov5.tree() as yolo:
        register(yolo)
        rows = fake_yolov5.config()
        rows["head"][2] = [-1, 1, "Conv", [96]]
        rows["head"].insert(3, [-1, 2, name, args])
        rows["head"][4] = [[8, 4], 1, "Detect", ["nc", "anchors"]]
        rows["width_multiple"] = 1.0
        made = yolo.DetectionModel(rows).model[8]
        assert [type(m) for m in made] == [kind, kind]
        assert made.np == sum(p.numel() for p in made.parameters())


def test_register_says_what_it_needs():
    with pytest.raises(InputError, match=r"models\.yolo"):
        register(object())


def test_a_published_checkpoint_loads_as_what_its_forward_pass_computes(tmp_path, picture):
    """The published DSConv convolves its float weight; intweight and alpha are memory nobody wrote, kept as plain
    attributes (or, in other copies, as buffers). So such a file is a C3 with float weights."""
    with fake_yolov5.tree() as yolo:
        register(yolo, block_size=8, KDSBias=True)
        model = yolo.DetectionModel(fake_yolov5.config()).eval()
        for name in ("DSConv2D", "Bottleneck_DSConv2D", "DSConv2D_C3", "DSConv"):
            base = nn.Conv2d if name == "DSConv" else nn.Module
            setattr(sys.modules["models.common"], name,
                    type(name, (base,), {"__module__": "models.common"}))  # fmt: skip
        common = sys.modules["models.common"]
        for part in list(model.modules()):
            if type(part).__module__.startswith("dsconvert.torch"):
                if isinstance(part, DSConv):
                    for junk in ("intweight", "alpha"):
                        part.__dict__[junk] = part._buffers.pop(junk) * float("nan")
                    part._buffers["KDSb"] *= float("nan")
                part.__class__ = getattr(common, type(part).__name__)
        torch.save({"model": model, "ema": None, "epoch": 0}, tmp_path / "published.pt")
        weights = {n: v for n, v in model.state_dict().items() if n.endswith("conv.weight")}
    network = load_checkpoint(tmp_path / "published.pt").network
    for name, value in weights.items():
        assert torch.equal(network.state_dict()[name], value)


@pytest.mark.parametrize("shifts", [{}, {"KDSBias": True}, {"CDS": True}])
def test_a_layer_without_some_shift_freezes_and_thaws(shifts):
    module = made(DSConv, 6, 4, 3, block_size=4, **shifts).eval()
    x = torch.rand(1, 6, 5, 5)
    wanted = module(x).detach()
    module.freeze_vqk()
    torch.testing.assert_close(module(x), wanted)
    module.thaw_vqk()
    assert module(x).shape == wanted.shape


@pytest.mark.parametrize("shifts", [{"KDSBias": True}, {"KDSBias": True, "CDS": True}])
def test_a_half_checkpoint_loads_as_what_its_float_model_computes(shifts, tmp_path, picture):
    """YOLOv5 stores float16 and computes in float32: the same integers, and products that nobody rounded to 11 bits."""
    with fake_yolov5.tree() as yolo:
        register(yolo, block_size=8, **shifts)
        model = yolo.DetectionModel(fake_yolov5.config()).eval()
        if "CDS" in shifts:
            for part in model.modules():
                if isinstance(part, DSConv):
                    part.CDSw.uniform_(0.5, 2)
                    part.CDSb.uniform_(-1, 1)
                    part.refit()
        torch.save({"model": model.half(), "ema": None, "epoch": 0}, tmp_path / "half.pt")
        stored = {n: v.clone() for n, v in model.state_dict().items() if n.endswith("intweight")}
        wanted = model.float()(picture)
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in stored.items())
    loaded = load_checkpoint(tmp_path / "half.pt")
    assert loaded.stored_bits == 16
    for ours, theirs in zip(loaded.network(picture), wanted, strict=True):
        close = 2e-6 * float(theirs.detach().abs().max())
        assert float((ours - theirs.detach()).abs().max()) < close
