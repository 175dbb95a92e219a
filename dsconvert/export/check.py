"""Check an exported file's bytes before they are written to disk.

1. `check_accumulators` proves from the integers that no accumulator can leave int32, whatever the image.
2. `wrong_layer` (in `stored`) compares every stored number with the model, bit by bit.
3. `check_export` runs the file in ONNX Runtime on a few images. Its boxes must be what `yolo.decode` makes of its own
   raw maps, and the result must agree with torch's. If not, it names the first layer that differs.
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
from dsconvert.onnxfile.operators import quiet_options
from dsconvert.yolo.decode import decode

__all__ = ["check_accumulators", "check_export", "check_images", "float_reference", "reference_of"]

Array = NDArray[Any]
# Two libraries decode equal integers with a few roundings of float32 between them: some ten times 2^-24 of a number.
EXACT = (1e-5, 1e-6)
# Each library sums float convolutions in its own order, and the differences add up over 60 layers.
FLOAT = (1e-3, 1e-4)
# An engine may round a tie the other way: then one integer is off by one, and values behind it differ too. This is the
# share of a layer's integers that may be off; in the networks here up to 0.1 % are.
ROUNDED_SHARE = 0.01


def check_accumulators(model: Converted) -> None:
    """Raise CheckError, naming the layer, if an accumulator of the model could leave int32."""
    if found := largest_sum(model):
        raise CheckError(
            f"The sums of layer {found[0]} can reach {found[1]}, beyond 32-bit integers, so the file was not written."
        )


def check_images(imgsz: SizeLike, photographs: Sequence[Array] = ()) -> list[Array]:
    """Return images (3, h, w) uint8 to try a file on: the photographs, and a drawn one of smooth colours with noise."""
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
    """Run the file on the images and compare it with the reference.

    data: the file's bytes.
    reference: see `reference_of` and `float_reference`.
    ends: the options with which the file was written.
    images: (3, h, w) uint8 each, all of one size.
    named: the same file with the names of all its values, where `data` has lost some. A layer is found by these names.

    Raises CheckError when the file cannot be run, holds other numbers than the model, or gives another result than the
    reference.
    """
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
    """Return the layer that an image shows to be wrong, or None.

    First the file's boxes are compared with a decoding of its own raw maps. Then its result is compared with torch's,
    and only if they differ, its layers one by one: an engine may round single integers otherwise.
    """
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
    if INPUT not in values:  # a uint8 file has no quantized image of its own: its input bytes are the integers
        values[INPUT] = torch.from_numpy(feed).float() if reference.exact else real
    return first_wrong(values, reference.graph, reference.step, reference.exact, reference.inside)


@dataclass(frozen=True)
class _Run:
    """What a file gives for one image.

    boxes: the outputs, as `_compared` takes them.
    values: the requested values by their names in the graph, float, channels first.
    """

    boxes: list[Array]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class _File:
    """A file that can be run, with some inner values as additional outputs.

    data: the bytes of the file as it will be written.
    model, running: the file with the additional outputs, as a model and as a session.
    values: graph name -> place of each additional output.
    ends: how many outputs the file has by itself.
    suppressed: whether the file ends with non-maximum suppression. Then the suppression's inputs stand for the boxes:
        each row is the box, a 1 for objectness, and the class scores.
    """

    data: bytes
    model: onnx.ModelProto
    running: ort.InferenceSession
    values: Mapping[str, Place]
    ends: int
    suppressed: bool

    @staticmethod
    def of(data: bytes, wanted: Mapping[str, Place], ends: Ends) -> _File:
        """Open the file with the wanted values as additional outputs, as far as it has them."""
        _session(data)
        model = onnx.load_from_string(data)
        there = {name for node in model.graph.node for name in node.output}
        outputs = len(model.graph.output)
        values = {name: place for name, place in wanted.items() if place.name in there}
        model.graph.output.extend(onnx.ValueInfoProto(name=place.name) for place in values.values())
        if ends.nms:  # the inputs of the suppression: boxes and scores
            node = next(n for n in model.graph.node if n.op_type == "NonMaxSuppression")
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.input[:2])
        return _File(data, model, _session(model.SerializeToString()), values, outputs, ends.nms is not None)

    def run(self, feed: Array) -> _Run:
        """Run the file on one image."""
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
    """Return the image as the file takes it, and as the network sees it (float 0..1), both (1, 3, h, w)."""
    real = image[None].astype(np.float32) / np.float32(255)
    feed = {"uint8": image[None], "float16": real.astype(np.float16)}.get(ends.input_type, real)
    return feed, torch.from_numpy(real if ends.input_type == "uint8" else feed.astype(np.float32))


def _session(data: bytes) -> ort.InferenceSession:
    options = quiet_options()
    options.intra_op_num_threads = torch.get_num_threads()
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
    """Pair each output with its wanted value, in comparable units. Return None when shapes differ.

    Pixels become shares of the longer side (`side`). Objectness and class scores stay as they are; their products are
    compared too, and alone if `suppressed`. Mask coefficients and prototypes become shares of the largest wanted one.
    """
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
    """Return whether every pair is equal within the tolerances."""
    # a NaN is not <= atol
    return pairs is not None and all(np.max(np.abs(f - w) - rtol * np.abs(w)) <= atol for f, w in pairs)


def of_graph(value: Array, place: Place) -> Tensor:
    """Convert a value from the file's form at a place to the graph's form: float32, channels first, without padding."""
    first = value.transpose(0, 3, 1, 2) if place.last else value
    return torch.from_numpy(np.ascontiguousarray(first[:, : first.shape[1] - place.more])).float()


def first_wrong(
    got: Mapping[str, Tensor], graph: Graph, step: Callable[[Node, list[Tensor]], Tensor], exact: bool,
    inside: Collection[str],
) -> str | None:  # fmt: skip
    """Return the name of the first node whose output in the file differs from torch's, or None.

    Torch gets the file's own values as inputs, so an error does not spread to later nodes.

    got: graph name -> value in the file.
    step: a node and its inputs -> torch's output.
    exact: whether the values are integers.
    inside: values that engines compute in one step with their reader. The file does not have them, so torch's stand in.
    """
    got = dict(got)
    for node in graph.nodes:
        if (node.name not in got and node.name not in inside) or any(name not in got for name in node.inputs):
            continue
        with torch.no_grad():
            wanted = step(node, [got[name] for name in node.inputs])
        if node.name in inside:  # only its reader can be compared
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
