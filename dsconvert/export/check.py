"""Does an exported file compute what it should? Asked before it is written, of the very bytes.

Three answers. By proof: no accumulator can leave int32, whatever the image, from the integers in the file. By reading:
what is stored is what the model holds, bit by bit (see `stored`). By trial: on a few images, the boxes of the file in
ONNX Runtime are its own raw maps as `yolo.decode` decodes them, and its layers give torch's numbers; where they do not,
the first layer to blame is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.base.errors import CheckError
from dsconvert.base.size import Size, SizeLike
from dsconvert.export.onnx import Ends
from dsconvert.export.reference import Reference, float_reference, reference_of
from dsconvert.export.stored import DETECT, wrong_layer
from dsconvert.export.written import Place
from dsconvert.graph.ir import INPUT, Graph, Node, display_name
from dsconvert.model.check import largest_sum
from dsconvert.model.model import Converted
from dsconvert.onnxfile.operators import with_operators
from dsconvert.yolo.decode import decode

__all__ = ["check_accumulators", "check_export", "check_images", "float_reference", "reference_of"]

Array = NDArray[Any]
# Decoding equal integers, two libraries differ by a few roundings of float32: 2^-24 of a number, some ten times.
EXACT = (1e-5, 1e-6)
# Float convolutions are summed in another order by each library; 60 layers of it.
FLOAT = (1e-3, 1e-4)
# An engine may round a tie the other way: then single integers are off by one, and what follows differs. The share of a
# layer's integers that may be so: in the networks here up to one in a thousand are.
ROUNDED_SHARE = 0.01


def check_accumulators(model: Converted) -> None:
    """Raises CheckError naming the layer whose accumulator could leave int32."""
    if found := largest_sum(model):
        raise CheckError(
            f"The sums of layer {found[0]} can reach {found[1]}, beyond 32-bit integers, so the file was not written."
        )


def check_images(imgsz: SizeLike, photographs: Sequence[Array] = ()) -> list[Array]:
    """Images (3, h, w) uint8 to try a file on: the given ones, and one of smooth colours with grain."""
    rng, size = np.random.default_rng(0), Size.of(imgsz)
    coarse = rng.integers(0, 256, (3, 8, 8)).astype(np.float64)
    down, along = (np.linspace(0, 7, n) for n in size.pair)
    rows = np.stack([[np.interp(along, np.arange(8), line) for line in plane] for plane in coarse])
    smooth = np.stack([np.stack([np.interp(down, np.arange(8), c) for c in plane.T], 1) for plane in rows])
    drawn = (0.8 * smooth + 0.2 * rng.integers(0, 256, size.image)).round().astype(np.uint8)
    return [*photographs, drawn]


def check_export(
    data: bytes, reference: Reference, ends: Ends, images: Sequence[Array], named: bytes | None = None
) -> None:
    """Raises CheckError when the file cannot be run, holds other numbers than the model, or gives other ones than the
    reference.

    Layers are told by the names of their values: `named` is the same file with all of them, where `data` lacks some."""
    file = _File.of(data, {}, ends)
    found = [file.run(_inputs(image, ends)[0]).boxes for image in images]
    again = reference.again(Size(*images[0].shape[-2:]), ends)
    wrong = wrong_layer(data, named, reference, again)
    if wrong is None:
        outputs = {name: place for name, place in again.places.items() if name in reference.graph.outputs}
        every = _File.of(named or data, outputs, ends)
        for image, boxes in zip(images, found, strict=True):
            wrong = wrong or _wrong_on(image, boxes, every, again.places, reference, ends)
    if wrong is not None:
        raise CheckError(
            f"The exported file computes something else than it should at layer {wrong}, so it was not written; "
            "please report it."
        )


def _wrong_on(
    image: Array, found: Sequence[Array], every: _File, places: Mapping[str, Place], reference: Reference, ends: Ends
) -> str | None:  # fmt: skip
    """The layer that an image shows to be wrong. What the file makes of its own maps must be what they are decoded to
    here; its layers may differ by what an engine rounds otherwise."""
    graph, head = reference.graph, reference.head

    def alike(boxes: Sequence[Array], raw: list[Tensor], rtol: float, atol: float) -> bool:
        wanted = [decode(raw, head).numpy(), *(t.numpy() for t in raw[-1:] if head.nm)]
        return _close(_compared(boxes, wanted, head.nc, max(image.shape[-2:]), ends.nms is not None), rtol, atol)

    feed, real = _inputs(image, ends)
    own = every.run(feed)
    if missing := next((n for n in graph.nodes if n.name in graph.outputs and n.name not in own.values), None):
        return display_name(missing)
    if not alike(own.boxes, [reference.real(name, own.values[name]) for name in graph.outputs], *EXACT):
        return DETECT
    if alike(found, reference.run(real), *(EXACT if reference.exact else FLOAT)):
        return None
    values = _File.of(every.data, places, ends).run(feed).values
    if INPUT not in values:  # bytes are the integers of the image
        values[INPUT] = torch.from_numpy(feed).float() if reference.exact else real
    return first_wrong(values, reference.graph, reference.step, reference.exact, reference.inside)


@dataclass(frozen=True)
class _Run:
    """What a file gives: boxes as `_compared` takes them, and the values asked for by their names in the graph, float,
    channels first."""

    boxes: list[Array]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class _File:
    """A file that is run, with `values` behind its `ends` own outputs, by their names in the graph. `suppressed`: it
    ends with non-maximum suppression; what goes into that stands for its boxes then: box, 1 and the scores of each
    class."""

    data: bytes
    model: onnx.ModelProto
    running: ort.InferenceSession
    values: Mapping[str, Place]
    ends: int
    suppressed: bool

    @staticmethod
    def of(data: bytes, wanted: Mapping[str, Place], ends: Ends) -> _File:
        """The file, giving those of the values that it has."""
        _session(data)
        model = onnx.load_from_string(data)
        there = {name for node in model.graph.node for name in node.output}
        outputs = len(model.graph.output)
        values = {name: place for name, place in wanted.items() if place.name in there}
        model.graph.output.extend(onnx.ValueInfoProto(name=place.name) for place in values.values())
        if ends.nms:  # what goes into the suppression: boxes and scores
            node = next(n for n in model.graph.node if n.op_type == "NonMaxSuppression")
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.input[:2])
        return _File(data, model, _session(model.SerializeToString()), values, outputs, ends.nms is not None)

    def run(self, feed: Array) -> _Run:
        """Of one image."""
        outputs = [np.asarray(value) for value in _run(self.running, feed)]
        boxes, rest = outputs[: self.ends], outputs[self.ends :]
        got = {name: of_graph(value, place) for (name, place), value in zip(self.values.items(), rest, strict=False)}
        if not self.suppressed:
            return _Run(boxes, got)
        (found,), (box, scores) = boxes, rest[len(self.values) :]
        if found.ndim != 2 or found.shape[1] != 7 or not np.isfinite(found).all():
            raise CheckError("The exported file does not give detections (k, 7), so it was not written.")
        return _Run([np.concatenate((box, np.ones_like(box[..., :1]), scores.swapaxes(1, 2)), 2)], got)


def _inputs(image: Array, ends: Ends) -> tuple[Array, Tensor]:
    """The image as the file takes it, and as the network sees it: float 0..1, both (1, 3, h, w)."""
    real = image[None].astype(np.float32) / np.float32(255)
    feed = {"uint8": image[None], "float16": real.astype(np.float16)}.get(ends.input_type, real)
    return feed, torch.from_numpy(real if ends.input_type == "uint8" else feed.astype(np.float32))


def _session(data: bytes) -> ort.InferenceSession:
    options = with_operators(ort.SessionOptions())
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises many kinds
        raise CheckError("ONNX Runtime cannot load the exported file, so it was not written.") from None


def _run(running: ort.InferenceSession, feed: Array) -> list[Any]:
    try:
        return list(running.run(None, {INPUT: feed}))
    except Exception:  # onnxruntime raises many kinds
        raise CheckError("ONNX Runtime fails on the exported file, so it was not written.") from None


def _compared(
    found: Sequence[Array], wanted: Sequence[Array], nc: int, side: int, suppressed: bool = False
) -> list[tuple[Array, Array]] | None:
    """Numbers of the outputs beside those wanted: pixels as shares of the side, objectness and class scores as they
    are (where `suppressed` follows, their products), mask coefficients and prototypes as shares of the largest wanted.
    None when shapes differ."""
    if [f.shape for f in found] != [w.shape for w in wanted]:
        return None
    (f, *protos), (w, *protos_wanted) = found, wanted
    last = 5 + nc
    pairs = [(f[..., :4] / side, w[..., :4] / side), (f[..., 4:5] * f[..., 5:last], w[..., 4:5] * w[..., 5:last])]
    if not suppressed:
        pairs.append((f[..., 4:last], w[..., 4:last]))
    if protos:
        for a, b in ((f[..., last:], w[..., last:]), (protos[0], protos_wanted[0])):
            largest = np.abs(b).max() or 1.0
            pairs.append((a / largest, b / largest))
    return pairs


def _close(pairs: Sequence[tuple[Array, Array]] | None, rtol: float, atol: float) -> bool:
    """Whether all of them are equal."""
    return pairs is not None and all(np.max(np.abs(f - w) - rtol * np.abs(w)) <= atol for f, w in pairs)  # a NaN is not


def of_graph(value: Array, place: Place) -> Tensor:
    """A value as the file has it at a place -> as the graph has it, float32."""
    first = value.transpose(0, 3, 1, 2) if place.last else value
    return torch.from_numpy(np.ascontiguousarray(first[:, : first.shape[1] - place.more])).float()


def first_wrong(
    got: Mapping[str, Tensor], graph: Graph, step: Callable[[Node, list[Tensor]], Tensor], exact: bool,
    inside: Collection[str],
) -> str | None:  # fmt: skip
    """The first node that, given what the file gives it (`got`, by name in the graph), does not make what torch makes
    of that by `step`. What is `inside` engines compute together with what reads it."""
    got = dict(got)
    for node in graph.nodes:
        if (node.name not in got and node.name not in inside) or any(name not in got for name in node.inputs):
            continue
        with torch.no_grad():
            wanted = step(node, [got[name] for name in node.inputs])
        if node.name in inside:  # what reads it is held against torch's
            got[node.name] = wanted
        elif not _same(got[node.name], wanted, exact):
            return display_name(node)
    return None


def _same(found: Tensor, wanted: Tensor, exact: bool) -> bool:
    if found.shape != wanted.shape:
        return False
    if not exact:
        return torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-6)
    off = (found - wanted).abs()
    return float(off.max()) <= 1 and float((off > 0).float().mean()) <= ROUNDED_SHARE
