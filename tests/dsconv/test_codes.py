"""A code is one file and one line: a toy one, in this file alone, goes through fit, model file, export and engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import SIDE, grids_of, lockstep
from formats import free, nearest

from dsconvert.base.size import Size
from dsconvert.dsconv.codes import CODES, format_of
from dsconvert.dsconv.format import Code, Parts, WeightFormat
from dsconvert.dsconv.packing import pack_bits, unpack_bits
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.fit.gptq import fit_weight_gptq
from dsconvert.fit.layer import GPTQ
from dsconvert.fit.moments import Moments
from dsconvert.graph.integer import run_integer
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel
from dsconvert.yolo.decode import decode
from dsconvert.yolo.lower import lower, split_detect

BOOK = torch.tensor([-9, -5, -3, -1, 1, 3, 5, 9], dtype=torch.int8)


class Book(Code):
    """Three bits are a place in a list of eight integers."""

    name = "book"
    stored_as = torch.uint8
    has_zero = False

    def limits(self, bits):
        if bits != 3:
            raise ValueError("a book has 3 bits")
        return -9, 9

    def fits(self, bits, chi, block_size):
        return bits == 3

    def values(self, stored, format):
        return BOOK[stored.long()]

    def quiet(self, shape, format):
        return torch.full(tuple(shape), 3, dtype=torch.uint8)

    def order(self, shape, format, energy):
        _, chi, kh, kw = shape
        columns = torch.arange(chi * kh * kw).reshape(chi, kh * kw)
        return [block[:, tap] for block in columns.split(format.size(chi)) for tap in range(kh * kw)]

    def start(self, target, format):
        return target.flatten(1).abs().amax(1).double().clamp_min(1e-12) / (9 * format.most_m)

    def round(self, target, cds, upper, lengths, format):
        w, book = torch.from_numpy(target / cds[:, None]), BOOK.double()
        stored, chosen = torch.zeros(w.shape, dtype=torch.uint8), torch.ones(len(lengths), len(w), dtype=torch.float64)
        first = 0
        for group, length in enumerate(lengths):
            part = w[:, first : first + length]
            tried = torch.arange(1, format.most_m + 1).double()[:, None, None, None] * book
            chosen[group] = (part[..., None] - tried).abs().amin(-1).square().sum(-1).argmin(0) + 1.0
            for column in range(first, first + length):
                levels = chosen[group][:, None] * book
                stored[:, column] = (w[:, column, None] - levels).abs().argmin(1).to(torch.uint8)
                made = levels.gather(1, stored[:, column, None].long())[:, 0]
                error = (w[:, column] - made) / upper[column, column]
                w[:, column + 1 :] -= error[:, None] * torch.from_numpy(upper[column, column + 1 :])
            first += length
        return stored, chosen

    def nearest(self, weight, format):
        flat = weight.detach().double().flatten(1)
        groups = self.order(weight.shape, format, flat[0])
        order, cds = torch.cat(groups), self.start(weight, format)
        given = flat[:, order].numpy(), cds.numpy(), np.eye(len(order)), [len(g) for g in groups], format
        stored, m = self.round(*given)
        taps = weight.shape[2] * weight.shape[3]
        m = m.T.reshape(len(weight), -1, taps).reshape(len(weight), -1, *weight.shape[2:])
        return Parts(stored[:, order.argsort()].reshape(weight.shape), m.to(torch.int8), cds.float())

    def damage(self, weight, format, squares):
        return float((squares * (DSTensor.nearest(weight, format).weight() - weight).square()).sum())

    def pack(self, stored, format):
        return pack_bits(stored.numpy(), 3)

    def unpack(self, packed, shape, format):
        return torch.from_numpy(unpack_bits(packed, 3, tuple(shape), signed=False).view(np.uint8))

    def spell(self, b, name, weight, by_blocks):
        places = b.node("Cast", [b.tensor(f"{name}.vqk", weight.stored.numpy())], f"{name}.places", to=6)  # INT32
        vqk = b.node("Gather", [b.constant(BOOK.numpy().astype(np.int32)), places], f"{name}.vqk32")
        m = b.node("Cast", [b.tensor(f"{name}.kds", weight.m.numpy())], f"{name}.kds32", to=6)
        blocks = b.constant(np.arange(weight.stored.shape[1]) // weight.block_size)
        spread = b.node("Gather", [m, blocks], f"{name}.spread", axis=1)
        return b.node("Cast", [b.node("Mul", [vqk, spread], f"{name}.scaled")], f"{name}.weight", to=3)  # INT8


@pytest.fixture
def book(monkeypatch) -> WeightFormat:
    """The format, its code in the list for as long as the test runs."""
    monkeypatch.setitem(CODES, "book", Book())
    return format_of(3, 16, "book")


def test_a_toy_code_goes_all_the_way(book, tiny, picture, tmp_path):
    network, head = tiny
    graph, params = split_detect(*lower(network.fused()), head)
    batches = [picture, picture.flip(3)]
    own = grids_of(graph, params, batches)
    plain = {graph.convs()[0].name, *graph.outputs}
    formats = {n: free(8, p.weight.shape[1]) if n in plain else book for n, p in params.items()}
    model = DSModel(graph, lockstep(graph, params, GPTQ(), own, batches, formats=formats), own, head, Size.of(SIDE), {})
    assert {c.weight.format for n, c in model.convs.items() if n not in plain} == {book}

    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(model))
    read = load_model(path)
    assert model_bytes(read) == path.read_bytes()

    data = export_quantized(read, layout_named("packed"), SIDE).SerializeToString()
    (found,) = ort.InferenceSession(data).run(None, {"images": picture.numpy()})
    wanted = decode(run_integer(read.graph, read.convs, read.activations, picture), head)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=2e-5)  # two libraries' sigmoids


def test_gptq_of_a_toy_code_is_no_worse_than_its_nearest_weight(book):
    """On J, and much better where inputs go together."""
    generator = torch.Generator().manual_seed(0)
    weight, q = torch.randn(6, 16, 3, 3, generator=generator), torch.randn(144, 600, generator=generator).double()
    q[1:] += 0.7 * q[:-1]
    hessian, flat = q @ q.T / 600, weight.double().flatten(1)
    moments = Moments(hessian, flat @ hessian)
    damped = moments.damped(flat).hessian
    errors = []
    for made in (fit_weight_gptq(weight, moments, book), nearest(weight, book)):
        d = (weight - made.weight()).double().flatten(1)
        errors.append(((d @ damped) * d).sum(1))
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())  # CDSw is rounded to float32
    assert float(errors[0].sum()) < 0.8 * float(errors[1].sum())


def test_a_file_with_a_code_that_is_not_listed_is_refused(book, converted, tmp_path, monkeypatch):
    name, conv = next((n, c) for n, c in converted.convs.items() if not c.weight.is_plain_int8)
    made = replace(conv, weight=nearest(conv.weight.weight(), book))
    path = tmp_path / "m.safetensors"
    path.write_bytes(model_bytes(replace(converted, convs={**converted.convs, name: made})))
    assert load_model(path).convs[name].weight.format == book
    monkeypatch.delitem(CODES, "book")
    with pytest.raises(ValueError, match="is damaged"):
        load_model(path)
