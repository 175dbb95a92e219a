"""quantize of ONNX files to integers throughout: the file written computes what the integer reference does, near the
float file, with its names, batch and outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from built import needs_ops
from spellings import Between, Decoded, Gate, Heads, Shuffle
from test_anyonnx import exported as plainly_exported
from test_anyonnx import run
from torch import nn
from torch.nn import functional as F

from dsconvert.base.errors import CheckError, InputError
from dsconvert.convert import onnx_int8
from dsconvert.convert.onnx import OnnxConverted, OnnxPlan, quantize_onnx
from dsconvert.convert.onnx_int8 import OnnxInt8, Prepared
from dsconvert.graph.activations import activation_table
from dsconvert.graph.gates import is_limit
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import grid_of
from dsconvert.graph.ir import INPUT, Node
from dsconvert.model.model import Converted
from dsconvert.onnxfile.meaning import SIGMOID

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
SIDE = 32


class Detector(nn.Module):
    """Some of everything, with a head like YOLOv8's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.SiLU())
        self.shuffle, self.down = Shuffle(), nn.Conv2d(16, 8, 1)
        self.gate, self.head = Gate(), Decoded()
        self.head.trunk = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.1))

    def forward(self, x):
        x = self.stem(x)
        x = self.shuffle(x + self.deep(x))
        return self.head(self.gate(self.down(x)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of pictures."""
    return photographs(tmp_path_factory.mktemp("photos"))


def photographs(folder: Path) -> Path:
    """Put 64 small pictures into a folder, smooth as photographs are: as many as need no views."""
    rng = np.random.default_rng(0)
    for i in range(64):
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (SIDE, SIDE)))
    return folder


def exported(module: nn.Module, path: Path, **how) -> Path:
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.kaiming_normal_(m.weight)  # values that grids have to hold
    return plainly_exported(module, path, (1, 3, SIDE, SIDE), **how)


def picture(photos: Path, count: int = 1) -> np.ndarray:
    found = [cv2.imread(str(photos / f"{i}.png"))[..., ::-1].transpose(2, 0, 1) for i in range(count)]
    return np.stack(found).astype(np.float32) / 255


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found - wanted).mean() / np.square(wanted - wanted.mean()).mean())


@pytest.fixture(scope="module")
def detector(tmp_path_factory, photos) -> tuple[Path, OnnxInt8]:
    """The detector with an open batch, and its conversion; `_check` in it held every layer against the reference."""
    path = tmp_path_factory.mktemp("detector") / "net.onnx"
    names = {"input_names": ["pixels"], "output_names": ["found"]}
    exported(Detector(), path, **names, dynamic_axes={"pixels": {0: "n"}, "found": {0: "n"}})
    made = quantize_onnx(path, photos, OnnxPlan(bits=8))
    assert isinstance(made, OnnxInt8)
    return path, made


def test_the_file_is_near_the_float_one_with_its_names_and_any_batch(detector, photos):
    path, made = detector
    assert [v.name for v in (*made.model.graph.input, *made.model.graph.output)] == ["pixels", "found"]
    (wanted,), (found,) = run(path, picture(photos, 3)), run(made.model, picture(photos, 3))
    assert found.shape == wanted.shape == (3, 7, 256)
    # eight bits everywhere: some tenths of a per cent of the outputs' variance
    assert max(off(found[:, :4], wanted[:, :4]), off(found[:, 4:], wanted[:, 4:])) < 0.02
    assert made.warnings == ()


def of_scores(model: Converted, network: Prepared) -> Converted:
    """The model with the weights of its scores in other places: integers as good as any, and wrong."""
    (name,) = (e.name for e in network.maps.exits if (e.kinds == SIGMOID).all())
    conv = model.convs[name]
    wrong = replace(conv.weight, stored=conv.weight.stored.flip(0, 1))
    return replace(model, convs={**model.convs, name: replace(conv, weight=wrong)})


def test_wrong_scores_beside_right_boxes_are_said(tmp_path, photos, monkeypatch):
    fitted = onnx_int8._fitted
    monkeypatch.setattr(onnx_int8, "_fitted", lambda network, *rest: of_scores(fitted(network, *rest), network))
    path, said = exported(Detector(), tmp_path / "net.onnx"), list[str]()
    made = quantize_onnx(path, photos, OnnxPlan(bits=8, finetune_steps=0), note=said.append)
    assert said == list(made.warnings)
    assert any(sentence.startswith("On calibration images, scores are off by") for sentence in said)


def test_a_tail_that_reads_its_maps_in_another_order_is_refused(tmp_path, photos, monkeypatch):
    written = onnx_int8._written

    def turned(*given):
        made = written(*given)
        last = next(n for n in reversed(made.model.graph.node) if n.op_type == "Concat")
        last.input[:] = reversed(last.input)
        return made

    monkeypatch.setattr(onnx_int8, "_written", turned)
    path = exported(Detector(), tmp_path / "net.onnx")
    with pytest.raises(CheckError, match="not what its layers lead to"):
        quantize_onnx(path, photos, OnnxPlan(bits=8, finetune_steps=0))


class Ranked(Detector):
    """Thirty rows of a box in pixels and its score, the best first."""

    def forward(self, x):
        boxes, scores = super().forward(x).split([4, 3], 1)
        value, place = scores.amax(1).topk(30)
        rows = (boxes * 100).transpose(1, 2).gather(1, place.unsqueeze(2).expand(-1, -1, 4))
        return torch.cat((rows, value.unsqueeze(2)), 2)


@pytest.mark.parametrize("layout", ["packed", "fused"])
def test_rows_in_another_order_are_not_mentioned(layout, tmp_path, photos):
    path = exported(Ranked(), tmp_path / "net.onnx")
    made = quantize_onnx(path, photos, OnnxPlan(bits=8, layout=layout, finetune_steps=0))
    (wanted,), (found,) = (run(file, picture(photos)) for file in (path, made.model))
    assert off(found[..., 4], wanted[..., 4]) < 0.05
    assert off(found[..., :4], wanted[..., :4]) > 0.1  # other rows; a box by itself is off by a fiftieth at most
    assert made.warnings == ()


def test_only_the_decoding_is_float(detector):
    """Every convolution but the mean over bins reads quantized values, and engines find their own kernels for it."""
    _path, made = detector
    convs = [n for n in made.model.graph.node if n.op_type == "Conv"]
    makers = {out: n.op_type for n in made.model.graph.node for out in n.output}
    quantized = [n for n in convs if makers.get(n.input[0]) == makers.get(n.input[1]) == "DequantizeLinear"]
    assert len(quantized) == len(made.converted.graph.convs()) == len(convs) - 1
    assert made.low.stayed["Softmax"] == 1
    assert 0 < made.low.float_share < 0.05


def test_a_relu_costs_nothing(detector):
    """The grid of what it reads ends where it does."""
    _, made = detector
    grids = grid_of(made.converted.graph, made.converted.activations)
    relus = [n for n in made.converted.graph.nodes if n.op == "relu"]
    assert relus
    assert all(is_limit(n, grids[n.name]) for n in relus)
    assert not any(n.op_type == "Relu" for n in made.model.graph.node)


@pytest.mark.parametrize("layout", ["fused", pytest.param("fast", marks=needs_ops), "int8", "blocked", "openvino"])
def test_every_layout_gives_the_numbers_of_packed(layout, tmp_path, photos):
    both = Between(lambda x: torch.cat((F.silu(x), F.hardswish(x)), 1), 16, 32)  # fast joins what it looks up
    path = exported(both, tmp_path / "net.onnx")
    x = picture(photos)
    made = {name: quantize_onnx(path, photos, OnnxPlan(bits=4, layout=name)).model for name in ("packed", layout)}
    (wanted,), (found,), (real,) = run(made["packed"], x), run(made[layout], x), run(path, x)
    if layout == "openvino":  # one rounding fewer
        assert off(found, real) < 0.05
    else:
        assert np.array_equal(found, wanted)
    if layout == "int8":
        assert made[layout].opset_import[0].version == 17  # that of the file


def test_attention_is_float_between_grids(tmp_path, photos):
    path = exported(Between(Heads(), 8, 4), tmp_path / "net.onnx")
    made = quantize_onnx(path, photos, OnnxPlan(bits=8))
    assert isinstance(made, OnnxInt8)
    (wanted,), (found,) = run(path, picture(photos)), run(made.model, picture(photos))
    assert off(found, wanted) < 0.05


@pytest.mark.parametrize("layout", ["packed", "int8", "openvino"])
def test_an_unknown_operator_stays_float_and_its_neighbours_are_integers(layout, tmp_path, photos):
    path = exported(Between(nn.ELU(0.7), 16), tmp_path / "net.onnx")
    made = quantize_onnx(path, photos, OnnxPlan(bits=8, layout=layout))
    assert isinstance(made, OnnxInt8)
    assert made.low.stayed == {"Elu": 1}
    (wanted,), (found,) = run(path, picture(photos)), run(made.model, picture(photos))
    assert off(found, wanted) < 0.01
    operators = [n.op_type for n in made.model.graph.node]
    assert operators.count("Elu") == 1
    assert operators.count("Conv") == 2


def test_what_cannot_be_lowered_keeps_float_activations_and_says_why(tmp_path, photos):
    path = exported(Between(lambda x: x.cumsum(2)), tmp_path / "net.onnx")
    said: list[str] = []
    made = quantize_onnx(path, photos, OnnxPlan(), note=said.append)
    assert isinstance(made, OnnxConverted)
    assert said == list(made.warnings)
    assert "the operator CumSum" in said[0]
    with pytest.raises(InputError, match="give layout packed or int8"):
        quantize_onnx(path, photos, OnnxPlan(layout="openvino"))


def test_a_file_may_have_the_names_that_the_writer_gives(tmp_path, photos):
    """Our own exports do. Every value is called as the writer calls its constants, one as it calls the image."""
    path = exported(Detector(), tmp_path / "net.onnx")
    model = onnx.load(path)
    given = [model.graph.input[0].name, *(t.name for t in model.graph.initializer)]
    given += [out for node in model.graph.node for out in node.output]
    names = {name: f"c{i}" for i, name in enumerate(given)} | {given[-2]: INPUT}
    for node in model.graph.node:
        node.input[:], node.output[:] = ([names[name] for name in values] for values in (node.input, node.output))
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = names[value.name]
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "renamed.onnx")
    (found,), (wanted,) = (
        run(quantize_onnx(file, photos, OnnxPlan(bits=8)).model, picture(photos))
        for file in (tmp_path / "renamed.onnx", path)
    )
    assert np.array_equal(found, wanted)


def test_a_target_size_is_kept(tmp_path, photos):
    path = exported(Between(nn.Sequential(nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1)), 32), tmp_path / "net.onnx")
    whole = quantize_onnx(path, photos, OnnxPlan()).model.ByteSize()
    made = quantize_onnx(path, photos, OnnxPlan(target_bytes=int(0.75 * whole)))
    assert 0.5 * whole < made.model.ByteSize() <= 0.75 * whole
    with pytest.raises(InputError, match="out of reach"):
        quantize_onnx(path, photos, OnnxPlan(target_bytes=100))


def test_the_same_file_comes_out_twice(tmp_path, photos):
    path = exported(Between(nn.Hardswish(), 16), tmp_path / "net.onnx")
    made = [quantize_onnx(path, photos).model.SerializeToString(deterministic=True) for _ in range(2)]
    assert made[0] == made[1]


def test_the_command_says_what_stayed_float(tmp_path, photos, call):
    path = exported(Detector(), tmp_path / "net.onnx")
    done = call("quantize", path, "--calib", photos, "--bits", 8, "--out", "made.onnx", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["activations"] == "int8"
    assert told["float_operators"]["Sigmoid"] == 1
    assert 0 < told["float_multiplications"] < 0.05
    assert len(told["layers"]) == 9


@pytest.mark.parametrize("kind", ["SiLU", "Hardswish"])
def test_gated_activations_are_onnx_runtimes_own_integers(kind):
    """All 256 inputs, by the operators that ONNX Runtime makes of a file's quantize and dequantize pairs."""
    source, target = QParams.of_range(-7.3, 5.9), QParams.of_range(-0.4, 5.9)
    from dsconvert.base.builder import OnnxBuilder
    from dsconvert.export.quantized import PlainForm
    from dsconvert.export.weights.layouts import PACKED
    from dsconvert.graph.ir import Graph
    from dsconvert.model.model import Converted

    graph = Graph((Node("act", "a", (INPUT,), {"kind": kind}),), ("a",))
    b = OnnxBuilder(21)
    form = PlainForm(b, Converted(graph, {}, {INPUT: source, "a": target}), PACKED, "float32")
    form.add(graph.nodes[0])
    b.node("Cast", [form.place("a").name], "out", to=1)
    model = b.model({INPUT: (1, 1, 16, 16)}, {"out": (1, 1, 16, 16)}, {})
    q = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    (found,) = run(model, (q - source.zero_point) * np.float32(source.scale))
    assert np.array_equal(found.reshape(-1).astype(np.uint8), activation_table(kind, source, target))
