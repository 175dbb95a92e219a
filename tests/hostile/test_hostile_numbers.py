"""Numbers of a model file that nothing can be computed with: refused when it is read, in one sentence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import convert, smooth_picture, tiny_network, with_real_shifts
from fuzz_damage import resealed
from modelfiles import Opened, floats

from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv, grid_of
from dsconvert.model.check import check_model
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel


@pytest.fixture(scope="module")
def model() -> DSModel:
    return convert(*tiny_network(), smooth_picture())


@pytest.fixture(scope="module")
def reals() -> DSModel:
    """With the paper's real shifts."""
    return with_real_shifts(convert(*tiny_network(), smooth_picture()))


def test_real_shifts_are_read(reals, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(model_bytes(reals))
    read = load_model(path)
    assert all(torch.equal(read.convs[n].weight.weight(), c.weight.weight()) for n, c in reals.convs.items())


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int32])
def test_real_shifts_of_another_type_are_refused(reals, tmp_path, call, kind):
    refused_as_damaged(reals, tmp_path, call, lambda alpha: alpha.astype(kind))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e13])
def test_real_shifts_that_are_no_numbers_are_refused(reals, tmp_path, call, value):
    def put(alpha: np.ndarray) -> np.ndarray:
        made = alpha.copy()
        made.flat[-1] = value
        return made

    refused_as_damaged(reals, tmp_path, call, put)


def test_real_shifts_whose_weights_are_too_large_are_refused(reals, tmp_path, call):
    """Each number is in its range, their product is not."""
    refused_as_damaged(reals, tmp_path, call, lambda alpha: alpha * 0 + 9e11, cds=9e11)


def refused_as_damaged(model, tmp_path, call, change, cds: float | None = None) -> None:
    opened = Opened(model_bytes(model))
    name = next(n for n in opened.tensors if n.endswith(".alpha"))
    _, shape, data = opened.tensors[name]
    made = np.asarray(change(np.frombuffer(data, np.float32).reshape(shape)))
    kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "int32": "I32"}
    opened.tensors[name] = [kinds[str(made.dtype)], shape, made.tobytes()]
    if cds is not None:
        floats(name.replace(".alpha", ".cdsw"), cds)(opened)
    (tmp_path / "m.safetensors").write_bytes(resealed(opened.bytes(), opened.key))
    answer = call("info", "m.safetensors", cwd=tmp_path)
    assert answer.code == 2
    assert answer.err.startswith("Error: m.safetensors is damaged: its header and tensors do not fit (")
    assert answer.err.count("\n") == 1


def test_what_quantize_writes_is_within_the_table(model):
    """The ends that fits can reach: no weights, biases that leave no room for them, an empty range."""
    name = next(n for n, c in model.convs.items() if c.weight.bits == 4)
    conv, source = model.convs[name], model.graph.nodes[0]
    lost = QConv(replace(conv.weight, cds_w=torch.full_like(conv.weight.cds_w, 1e-12)), torch.full_like(conv.bias, 1e4))
    convs = {**model.convs, name: lost.with_room(QParams.of_range(0, 0).scale)}
    grids = {**model.activations, source.name: QParams.of_range(0, 0)}
    check_model(replace(model, activations=grids))
    roomy = {
        n: c.with_room(grid_of(model.graph, model.activations)[source_of(model, n)].scale) for n, c in convs.items()
    }
    check_model(replace(model, convs=roomy))


def source_of(model: DSModel, name: str) -> str:
    return next(node.inputs[0] for node in model.graph.nodes if node.name == name)
