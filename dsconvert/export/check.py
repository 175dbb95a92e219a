"""Does an exported file compute what it should? Asked before it is written, of the very bytes.

Two answers. By proof: no accumulator can leave int32, whatever the image, from the integers in the file. By trial: the
file in ONNX Runtime gives torch's numbers on a few images; where it does not, the first layer to blame is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.errors import CheckError
from dsconvert.export.lastchannels import LAST
from dsconvert.export.onnx import Ends
from dsconvert.graph.integer import grid_of, integer_step, real_params, run_integer
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import float_step, run_float
from dsconvert.model import DSModel, display_name
from dsconvert.yolo.decode import decode
from dsconvert.yolo.network import Head

Array = NDArray[Any]
# Decoding equal integers, two libraries differ by a few roundings of float32: 2^-24 of a number, some ten times.
EXACT = (1e-5, 1e-6)
# Float convolutions are summed in another order by each library; 60 layers of it.
FLOAT = (1e-3, 1e-4)
# An engine may round a tie the other way: then single integers are off by one, and what follows differs by less than
# an activation step on average. One share of a layer's integers, and the mean difference of scores and box shares.
ROUNDED_SHARE, NOISE = 0.01, 0.01


def check_accumulators(model: DSModel) -> None:
    """Raises CheckError naming the layer whose accumulator could leave int32."""
    if not model.activations:
        return
    grids = grid_of(model.graph, model.activations)
    for node in model.graph.convs():
        bound = int(model.convs[node.name].largest_sum(grids[node.inputs[0]].scale).max())
        if bound >= 1 << 31:
            raise CheckError(
                f"The sums of layer {display_name(node)} can reach {bound}, beyond 32-bit integers, so the file was "
                "not written."
            )


@dataclass(frozen=True)
class Reference:
    """What the file is held against: a graph, torch's way of running it (whole, and node by node on given inputs), and
    the suffix of a value's name in the file."""

    graph: Graph
    head: Head
    run: Callable[[Tensor], list[Tensor]]
    step: Callable[[Node, list[Tensor]], Tensor]
    exact: bool

    @property
    def suffix(self) -> str:
        """Of a value's name in the file: integers are the quantizers' outputs."""
        return ".q" if self.exact else ""


def reference_of(model: DSModel) -> Reference:
    """A converted model's integer arithmetic, or its weights in float when its activations are."""
    if not model.activations:
        params = real_params(model.convs)
        return float_reference(model.graph, params, model.head)
    grids = grid_of(model.graph, model.activations)
    return Reference(
        model.graph, model.head, lambda x: run_integer(model.graph, model.convs, model.activations, x),
        lambda node, inputs: integer_step(node, inputs, model.convs, grids), True,
    )  # fmt: skip


def float_reference(graph: Graph, params: Mapping[str, ConvParams], head: Head) -> Reference:
    """A float network."""
    return Reference(
        graph, head, lambda x: run_float(graph, params, x), lambda node, inputs: float_step(node, inputs, params), False
    )


def check_images(side: int, photographs: Sequence[Array] = ()) -> list[Array]:
    """Images (3, side, side) uint8 to try a file on: the given ones, and one of smooth colours with grain."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 8, 8)).astype(np.float64)
    steps = np.linspace(0, 7, side)
    rows = np.stack([[np.interp(steps, np.arange(8), line) for line in plane] for plane in coarse])
    smooth = np.stack([np.stack([np.interp(steps, np.arange(8), c) for c in plane.T], 1) for plane in rows])
    drawn = (0.8 * smooth + 0.2 * rng.integers(0, 256, (3, side, side))).round().astype(np.uint8)
    return [*photographs, drawn]


def check_export(
    data: bytes, reference: Reference, ends: Ends, images: Sequence[Array], named: bytes | None = None
) -> None:
    """Raises CheckError when the file cannot be run, or gives other numbers than the reference.

    Layers are told by the names of their values: `named` is the same file with all of them, where `data` lacks some."""
    head = reference.head
    for image in images:
        feed, real = _inputs(image, ends)
        raw = reference.run(real)
        wanted = [decode(raw, head).numpy(), *(t.numpy() for t in raw[-1:] if head.nm)]
        pairs = _compared(_predictions(data, feed, ends), wanted, head.nc, image.shape[-1])
        rtol, atol = EXACT if reference.exact else FLOAT
        if _close(pairs, rtol, atol):
            continue
        layer = _first_wrong(named or data, reference, feed, real)
        if layer is None and not _close(pairs, 0, NOISE, np.mean):
            layer = "Detect"
        if layer is not None:
            raise CheckError(
                f"The exported file computes something else than it should at layer {layer}, so it was not written; "
                "please report it."
            )


def _inputs(image: Array, ends: Ends) -> tuple[Array, Tensor]:
    """The image as the file takes it, and as the network sees it: float 0..1, both (1, 3, side, side)."""
    real = image[None].astype(np.float32) / np.float32(255)
    feed = {"uint8": image[None], "float16": real.astype(np.float16)}.get(ends.input_type, real)
    return feed, torch.from_numpy(real if ends.input_type == "uint8" else feed.astype(np.float32))


def _session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises many kinds
        raise CheckError("ONNX Runtime cannot load the exported file, so it was not written.") from None


def _predictions(data: bytes, feed: Array, ends: Ends) -> list[Array]:
    """The file's outputs: (1, boxes, 5 + nc) as it decodes them; of a segmentation model with mask coefficients behind,
    then the prototypes. Of a file that ends with non-maximum suppression, what goes into that: box, 1 and the scores of
    each class."""
    if not ends.nms:
        return [np.asarray(output) for output in _run(_session(data), feed)]
    found = _run(_session(data), feed)[0]
    if found.ndim != 2 or found.shape[1] != 7 or not np.isfinite(found).all():
        raise CheckError("The exported file does not give detections (k, 7), so it was not written.")
    node = next(n for n in onnx.load_from_string(data).graph.node if n.op_type == "NonMaxSuppression")
    box, scores = _run(_session(_exposed(data, node.input[:2], onnx.TensorProto.FLOAT)), feed)[1:]
    return [np.concatenate((box, np.ones_like(box[..., :1]), scores.swapaxes(1, 2)), 2)]


def _run(running: ort.InferenceSession, feed: Array) -> list[Any]:
    try:
        return list(running.run(None, {INPUT: feed}))
    except Exception:  # onnxruntime raises many kinds
        raise CheckError("ONNX Runtime fails on the exported file, so it was not written.") from None


def _exposed(data: bytes, names: Sequence[str], kind: int) -> bytes:
    """The file with further outputs."""
    model = onnx.load_from_string(data)
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return bytes(model.SerializeToString())


def _compared(found: Sequence[Array], wanted: Sequence[Array], nc: int, side: int) -> list[tuple[Array, Array]] | None:
    """Numbers of the outputs beside those wanted: pixels as shares of the side, scores (objectness * class) as they
    are, mask coefficients and prototypes as shares of the largest wanted. None when shapes differ."""
    if [f.shape for f in found] != [w.shape for w in wanted]:
        return None
    (f, *protos), (w, *protos_wanted) = found, wanted
    pairs = [(f[..., :4] / side, w[..., :4] / side)]
    pairs.append((f[..., 4:5] * f[..., 5 : 5 + nc], w[..., 4:5] * w[..., 5 : 5 + nc]))
    if protos:
        for a, b in ((f[..., 5 + nc :], w[..., 5 + nc :]), (protos[0], protos_wanted[0])):
            largest = np.abs(b).max() or 1.0
            pairs.append((a / largest, b / largest))
    return pairs


def _close(
    pairs: Sequence[tuple[Array, Array]] | None, rtol: float, atol: float, over: Callable[[Array], Any] = np.max
) -> bool:
    """Whether all of them are equal."""
    return pairs is not None and all(over(np.abs(f - w) - rtol * np.abs(w)) <= atol for f, w in pairs)  # a NaN is not


def _first_wrong(data: bytes, reference: Reference, feed: Array, real: Tensor) -> str | None:
    """The first node that, given what the file gives it, does not make what torch makes of that."""
    kind = onnx.TensorProto.UINT8 if reference.exact else onnx.TensorProto.FLOAT
    there = {name for node in onnx.load_from_string(data).graph.node for name in node.output}
    # layout fused has maps with channels last, under names of their own
    names = [n if n in there else f"{n}{LAST}" for n in _value_names(reference) if {n, f"{n}{LAST}"} & there]
    values = _run(_session(_exposed(data, names, kind)), feed)[-len(names) :]
    got: dict[str, Tensor] = {}
    for name, value in zip(names, map(torch.from_numpy, values), strict=True):
        first = value.permute(0, 3, 1, 2) if name.endswith(LAST) else value
        got[name.removesuffix(LAST).removesuffix(reference.suffix)] = first.contiguous().float()
    if INPUT not in got:  # bytes are the integers of the image
        got[INPUT] = torch.from_numpy(feed).float() if reference.exact else real
    for node in reference.graph.nodes:
        if node.name not in got or any(name not in got for name in node.inputs):
            continue
        with torch.no_grad():
            wanted = reference.step(node, [got[name] for name in node.inputs])
        if not _same(got[node.name], wanted, reference.exact):
            return display_name(node)
    return None


def _value_names(reference: Reference) -> Iterator[str]:
    if reference.exact:
        yield f"{INPUT}{reference.suffix}"
    for node in reference.graph.nodes:
        yield f"{node.name}{reference.suffix}"


def _same(found: Tensor, wanted: Tensor, exact: bool) -> bool:
    if found.shape != wanted.shape:
        return False
    if not exact:
        return torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-6)
    off = (found - wanted).abs()
    return float(off.max()) <= 1 and float((off > 0).float().mean()) <= ROUNDED_SHARE
