"""The model file: what goes in comes out, and damage is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from flips import refused
from safetensors.numpy import save_file

from dsconvert.base.errors import InputError
from dsconvert.model.file import load_model, model_bytes


@pytest.fixture
def model(converted):
    provenance = {"source": "best.pt", "options": {"calib": None}}
    return replace(converted, provenance=provenance)


def test_round_trip_and_equal_bytes(model, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(model_bytes(model))
    read = load_model(path)
    assert (read.graph, read.head, read.imgsz, read.provenance) == (
        model.graph, model.head, model.imgsz, model.provenance,
    )  # fmt: skip
    assert read.activations == model.activations
    for name, conv in model.convs.items():
        assert torch.equal(read.convs[name].weight.merged(), conv.weight.merged())
        assert torch.equal(read.convs[name].weight.vqk, conv.weight.vqk)
        assert torch.equal(read.convs[name].weight.cds_w, conv.weight.cds_w)
        assert torch.equal(read.convs[name].bias, conv.bias)
    assert model_bytes(read) == path.read_bytes() == model_bytes(model)


def test_storage_is_the_stated_bits(model):
    tensors = sum(c.weight.weight_bits * c.weight.vqk.numel() / 8 for c in model.convs.values())
    shifts = sum(8 * len(c.bias) for c in model.convs.values())
    header = len(json.dumps(model.graph.to_json()))
    # the rest of the header (layers, grids, tensor table) is a few hundred bytes a layer
    assert tensors + shifts < len(model_bytes(model)) < tensors + shifts + header + 600 * len(model.convs)


def test_damage_is_one_sentence(model, tmp_path):
    data = model_bytes(model)
    path = tmp_path / "m.safetensors"
    for broken in (b"", data[:100], data[:-1000], b"x" * 5000):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="not a readable safetensors"):
            load_model(path)
    with pytest.raises(InputError, match="no model file"):
        load_model(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1).numpy()}, path)
    with pytest.raises(InputError, match="not one made by dsconvert"):
        load_model(path)
    path.write_bytes(data.replace(b'\\"bits\\":4', b'\\"bits\\":5'))
    with pytest.raises(InputError, match="damaged"):
        load_model(path)
    path.write_bytes(data.replace(b'\\"version\\":3', b'\\"version\\":9'))
    with pytest.raises(InputError, match="format version 9"):
        load_model(path)


def test_any_one_bit_the_other_way_is_refused(model, tmp_path):
    """One bit of every 17th byte; `benchmarks/flips.py` turns every one."""
    data = model_bytes(model)
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert load_model(path).imgsz == model.imgsz
    places = [8 * byte + byte // 17 % 8 for byte in range(0, len(data), 17)]
    assert {bit % 8 for bit in places} == set(range(8))
    assert refused(path, places) == len(places)


def test_a_number_written_otherwise_is_refused(model, tmp_path):
    """1e-05 and 1E-05 are one number and one bit apart."""
    name = next(iter(model.convs))
    small = replace(model, activations={**model.activations, name: replace(model.activations[name], scale=1e-5)})
    data = model_bytes(small)
    assert data.count(b"[1e-05,") == 1
    path = tmp_path / "m.safetensors"
    path.write_bytes(data.replace(b"[1e-05,", b"[1E-05,"))
    with pytest.raises(InputError, match=r"is damaged: its content does not match its checksum\.$"):
        load_model(path)
