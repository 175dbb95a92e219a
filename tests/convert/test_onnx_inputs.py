"""quantize of ONNX files whose input is bytes, or has its channels last, or is several images: one network exported in
several ways becomes the same integers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from built import needs_ops
from spellings import Between, Heads
from test_anyonnx import run
from test_onnx_int8 import SIDE, Detector, off, photographs, picture
from torch import nn
from torch.nn import functional as F

from dsconvert.convert import onnx_int8
from dsconvert.convert.onnx import OnnxConverted, OnnxPlan, quantize_onnx
from dsconvert.convert.onnx_int8 import OnnxInt8
from dsconvert.onnxfile.images import as_input, pictures, probe_of
from dsconvert.onnxfile.source import ImageInput, read_source
from dsconvert.photos.form import PLAIN, InputForm

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
IMAGENET = InputForm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Behind(nn.Module):
    """The detector behind operators that bring its image into the form that it reads."""

    def __init__(self, before) -> None:
        super().__init__()
        self.before, self.net = before, Detector()

    def forward(self, x):
        return self.net(self.before(x))


def normal(x):
    mean, std = (torch.tensor(n).view(1, 3, 1, 1) for n in (IMAGENET.mean, IMAGENET.std))
    return (x - mean) / std


# what stands before the network, its input's type and shape, and the operators that stay in front: none where bytes
# are the integers that the graph reads
BYTES, LAST = (1, 3, SIDE, SIDE), (1, SIDE, SIDE, 3)
WAYS = {
    "bytes": (lambda x: x.float() / 255, torch.uint8, BYTES, {}),
    "bytes by a factor": (lambda x: x.float() * (1 / 255), torch.uint8, BYTES, {}),
    "channels last": (lambda x: x.permute(0, 3, 1, 2), torch.float32, LAST, {"Transpose": 1}),
    "bytes, channels last": (
        lambda x: x.permute(0, 3, 1, 2).float() / 255, torch.uint8, LAST, {}
    ),
    "bytes, channels last, scaled first": (
        lambda x: (x.float() / 255).permute(0, 3, 1, 2), torch.uint8, LAST, {}
    ),
    "half precision": (lambda x: x.float(), torch.float16, BYTES, {"Cast": 1}),
    "blue first": (lambda x: x.float().flip(1) / 255, torch.uint8, BYTES, {}),
}  # fmt: skip


def exported(module: nn.Module, path: Path, kind: torch.dtype = torch.float32, shape=BYTES) -> Path:
    """The file of a network, with the detector's own weights whatever stands before it."""
    torch.manual_seed(0)
    module.eval()
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.kaiming_normal_(m.weight)
            nn.init.normal_(m.bias, 0, 0.1)
    x = (torch.rand(shape) * 255).to(kind) if kind is torch.uint8 else torch.rand(shape).to(kind)
    torch.onnx.export(module, (x,), str(path), dynamo=False, opset_version=17)
    return path


def detector(before=None) -> nn.Module:
    torch.manual_seed(0)
    return Detector() if before is None else Behind(before)


def fed(path: Path, photos: Path, count: int = 1, form: InputForm = PLAIN) -> np.ndarray:
    """The first photographs as the file takes them."""
    source = read_source(path, None, 1)
    found, _ = pictures([photos / f"{i}.png" for i in range(count)], source.image, form)
    return as_input(found, source.image, form)


def converted(path: Path, photos: Path, **plan) -> OnnxInt8:
    made = quantize_onnx(path, photos, OnnxPlan(bits=8, finetune_steps=0, **plan))
    assert isinstance(made, OnnxInt8)
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory, photos) -> OnnxInt8:
    """The detector that reads one float image with channels first."""
    return converted(exported(detector(), tmp_path_factory.mktemp("usual") / "net.onnx"), photos)


@pytest.mark.parametrize("way", WAYS)
def test_one_network_becomes_the_same_integers_whatever_its_input(way, usual, tmp_path, photos):
    before, kind, shape, front = WAYS[way]
    path = exported(detector(before), tmp_path / "net.onnx", kind, shape)
    plan = {"form": InputForm(bgr=True)} if way == "blue first" else {}
    made = converted(path, photos, **plan)
    assert [n.type.tensor_type for n in made.model.graph.input] == [
        n.type.tensor_type for n in onnx.load(path).graph.input
    ]
    assert Counter(made.low.stayed) - Counter(usual.low.stayed) == front
    assert made.low.float_share == usual.low.float_share
    x = fed(path, photos, form=plan.get("form", PLAIN))
    (wanted,) = run(usual.model, picture(photos))
    (found,) = run(made.model, x)
    assert np.array_equal(found, wanted)


def test_mean_and_deviation_inside_are_those_of_a_form(tmp_path, photos):
    """A file that normalises its image, and one that wants it normalised."""
    inside = exported(detector(lambda x: normal(x.float() / 255)), tmp_path / "in.onnx", torch.uint8)
    outside = exported(detector(), tmp_path / "out.onnx")
    made, wanted = converted(inside, photos), converted(outside, photos, form=IMAGENET)
    (a,), (b,) = run(made.model, fed(inside, photos)), run(wanted.model, fed(outside, photos, form=IMAGENET))
    assert off(a, b) < 1e-3


def test_bytes_that_the_network_takes_as_they_are_are_its_integers(tmp_path, photos):
    """YOLOX's scale: no division in the file, and nothing quantizes the image."""
    inside = exported(detector(lambda x: x.float()), tmp_path / "in.onnx", torch.uint8)
    outside, form = exported(detector(), tmp_path / "out.onnx"), InputForm(scale=1)
    made, wanted = converted(inside, photos), converted(outside, photos, form=form)
    (a,), (b,) = run(made.model, fed(inside, photos)), run(wanted.model, fed(outside, photos, form=form))
    assert np.array_equal(a, b)
    entries = [n.op_type for n in made.model.graph.node if made.model.graph.input[0].name in n.input]
    assert not {"Cast", "QuantizeLinear"} & {*entries}


@pytest.mark.parametrize("layout", ["fused", pytest.param("fast", marks=needs_ops), "int8", "blocked", "openvino"])
def test_every_layout_takes_bytes_with_channels_last(layout, tmp_path, photos):
    before, kind, shape, _ = WAYS["bytes, channels last"]
    path = exported(detector(before), tmp_path / "net.onnx", kind, shape)
    x = fed(path, photos)
    made = {name: converted(path, photos, layout=name).model for name in ("packed", layout)}
    (wanted,), (found,), (real,) = run(made["packed"], x), run(made[layout], x), run(path, x)
    if layout == "openvino":  # one rounding fewer
        assert off(found, real) < 0.05
    else:
        assert np.array_equal(found, wanted)


def test_an_open_batch_stays_open_with_channels_last(tmp_path, photos):
    path = tmp_path / "net.onnx"
    module = detector(WAYS["channels last"][0]).eval()
    torch.onnx.export(
        module, (torch.rand(LAST),), str(path), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
    )  # fmt: skip
    made = converted(path, photos)
    x = fed(path, photos, 3)
    (together,) = run(made.model, x)
    for i in range(3):
        np.testing.assert_allclose(together[i : i + 1], run(made.model, x[i : i + 1])[0], rtol=1e-5, atol=1e-6)


class Seen(nn.Module):
    """A network whose output has the image beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2).float() / 255
        return torch.cat((x, self.last(F.relu(self.first(x)))), 1)


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_the_tail_may_read_what_the_graph_reads(kind, tmp_path, photos):
    path, form = exported(Seen(), tmp_path / "net.onnx", kind, LAST), InputForm(scale=1)
    made, x = converted(path, photos, form=form), fed(path, photos, form=form)
    assert made.low.stayed == {"Transpose": 1, "Cast": 1, "Div": 1, "Concat": 1}
    (found,), (wanted,) = run(made.model, x), run(path, x)
    assert x.max() > 1
    assert np.array_equal(found[:, :3], wanted[:, :3])
    assert off(found[:, 3:], wanted[:, 3:]) < 0.01


REFUSED = {
    "a table": (lambda x: (torch.arange(256.0) ** 2 / 65025)[x.long()], torch.uint8, BYTES, "not made a float32 map"),
    "columns apart": (lambda x: x.permute(0, 3, 1, 2).cumsum(2), torch.float32, LAST, "the operator CumSum"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_more_than_scale_stays_float_and_says_so(what, tmp_path, photos):
    before, kind, shape, why = REFUSED[what]
    path = exported(detector(before), tmp_path / "net.onnx", kind, shape)
    said: list[str] = []
    made = quantize_onnx(path, photos, OnnxPlan(bits=8, finetune_steps=0), note=said.append)
    assert isinstance(made, OnnxConverted)
    assert said[-1].startswith("Activations stay float")
    assert why in said[-1]


def test_the_command_says_that_activations_are_integers(tmp_path, photos, call):
    before, kind, shape, _ = WAYS["bytes, channels last"]
    path = exported(detector(before), tmp_path / "net.onnx", kind, shape)
    done = call("quantize", path, "--calib", photos, "--bits", 8, "--out", "made.onnx", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["activations"] == "int8"
    assert told["float_multiplications"] < 0.05


@pytest.mark.parametrize("layout", ["packed", "fused"])
@pytest.mark.parametrize("way", ["as it is", "bytes, channels last"])
def test_two_images_at_once_give_what_each_gives_alone(way, layout, usual, tmp_path, photos):
    """The detector has shapes of two images in its Reshapes, before and behind its layers."""
    before, kind, shape, _ = WAYS.get(way, (None, torch.float32, BYTES, None))
    path = exported(detector(before), tmp_path / "net.onnx", kind, (2, *shape[1:]))
    made = converted(path, photos, layout=layout)
    assert made.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert made.low.float_share == usual.low.float_share
    (found,) = run(made.model, fed(path, photos, 2))
    for i, x in enumerate(picture(photos, 2)):
        np.testing.assert_allclose(found[i : i + 1], run(usual.model, x[None])[0], rtol=1e-5, atol=1e-5)


def rows(x):
    """Half of each image's numbers below 0, by way of one row for an image."""
    n, c, h, w = x.shape
    return F.elu(x.reshape(n, -1), 0.7).reshape(n, c, h, w)


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, 4, 1), nn.Linear(16 * (SIDE // 4) ** 2, 5)

    def forward(self, x):
        return self.last(F.relu(self.first(x)).reshape(len(x), -1))


PIECES = {
    "an island": Between(rows, 16),
    "attention": Between(Heads(), 8, 4),
    "rows of a whole map": Classes(),
}


@pytest.mark.parametrize("what", PIECES)
def test_pieces_with_the_batch_in_their_shapes(what, tmp_path, photos):
    paths = [exported(PIECES[what], tmp_path / f"{n}.onnx", shape=(n, 3, SIDE, SIDE)) for n in (1, 3)]
    one, three = (converted(path, photos) for path in paths)
    assert one.low.stayed == three.low.stayed
    assert one.low.float_share == three.low.float_share
    (found,) = run(three.model, fed(paths[1], photos, 3))
    for i, x in enumerate(picture(photos, 3)):
        np.testing.assert_allclose(found[i : i + 1], run(one.model, x[None])[0], rtol=1e-4, atol=1e-4)


MIXED = {
    "the other image": (Between(lambda x: x.flip(0)), "it computes something else"),
    "the mean image": (Between(lambda x: x + x.mean(0, keepdim=True)), "the operator ReduceMean"),
    "one image of all": (Between(lambda x: x.reshape(1, -1, SIDE, SIDE), 8, 16), "the operator Reshape"),
}


@pytest.mark.parametrize("what", MIXED)
def test_images_that_are_mixed_stay_float(what, tmp_path, photos):
    net, why = MIXED[what]
    path = exported(net, tmp_path / "net.onnx", shape=(2, 3, SIDE, SIDE))
    said: list[str] = []
    made = quantize_onnx(path, photos, OnnxPlan(bits=8, finetune_steps=0), note=said.append)
    assert isinstance(made, OnnxConverted)
    assert why in said[-1]


def test_a_probe_has_different_images_however_few_there_are():
    wanted = ImageInput("x", np.float32, 5, 3, 8, 8)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(2)]
    made = probe_of(images, wanted, PLAIN)
    assert len({x.tobytes() for x in made}) == 5


def test_a_batch_that_takes_too_much_memory_stays_float(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(onnx_int8, "MOST_TOGETHER", 2 * SIDE * SIDE)
    path = exported(Between(nn.ReLU()), tmp_path / "net.onnx", shape=(3, 3, SIDE, SIDE))
    said: list[str] = []
    assert isinstance(quantize_onnx(path, photos, OnnxPlan(bits=8), note=said.append), OnnxConverted)
    assert "its 3 images at once" in said[-1]
