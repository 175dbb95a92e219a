"""The ways in which operators of an ONNX file become operations of the graph: a new one is a function here.

Each takes the walk, a node, and the name of a value that it makes; it adds to the graph and says True, or says False.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from torch import Tensor

from dsconvert.graph.ir import ConvParams, Node
from dsconvert.onnxfile.heads import SCALING, find_attention
from dsconvert.onnxfile.layers import Layer
from dsconvert.onnxfile.recognise import ELEMENTWISE, MOVING, activation_named, moved, places, points
from dsconvert.onnxfile.source import attribute
from dsconvert.onnxfile.walk import Walk, mode

POOLING = ("GlobalAveragePool", "ReduceMean", "Resize", "Upsample", "MaxPool", "AveragePool")
AT_EVERY_PIXEL = {"stride": 1, "dilation": 1, "groups": 1}


def weights(w: Walk, layer: Layer, output: str) -> bool:
    """A convolution, or a product of rows with a matrix: a convolution of maps of one pixel, or of a whole map."""
    given, shape, weight = w.known(layer.value), w.facts.shape(layer.value), layer.weight
    if layer.adder is not None:
        output = w.facts.source.nodes[layer.adder].output[0]
    if given is None and layer.linear:
        given, weight = _of_whole_map(w, layer)
    if given is None or (layer.linear and len(shape) != 2):
        return False
    pads = (0, 0, 0, 0) if layer.linear else layer.pads_of(shape[2:])
    square = len(set(layer.stride)) == len(set(layer.dilation)) == len(set(pads)) == 1
    if not square:
        return False
    attrs = {
        "stride": layer.stride[0], "padding": pads[0], "dilation": layer.dilation[0], "groups": layer.groups,
    }  # fmt: skip
    name = w.layer_name(layer)
    before = w.nodes.get(given)
    if before is not None and before.op == "space_to_depth" and attrs == {**attrs, **AT_EVERY_PIXEL}:
        given, weight = before.inputs[0], _at_full_size(weight)
        attrs |= {"stride": 2, "padding": 2 * pads[0]}
    w.put(Node("conv", name, (given,), attrs), output)
    w.params[name] = ConvParams(weight, layer.bias)
    return True


def _of_whole_map(w: Walk, layer: Layer) -> tuple[str | None, Tensor]:
    """The map (n, c, h, w) whose numbers are the rows that a layer reads, in order, and the layer's weight for it,
    (cho, c, h, w); None and the weight as it is where there is no such map."""
    root = w.origin(layer.value)
    shape = w.facts.shape(root) if root is not None else ()
    numbers = places(shape) if len(shape) == 4 else None
    found = w.facts.compute(layer.value, {root: numbers}) if root is not None and numbers is not None else None
    if root is None or numbers is None or found is None or found.shape != (shape[0], layer.weight.shape[1]):
        return None, layer.weight
    if not np.array_equal(found.reshape(-1), numbers.reshape(-1)):
        return None, layer.weight
    return w.place[root], layer.weight.reshape(len(layer.weight), *shape[1:])


def concat(w: Walk, node: onnx.NodeProto, output: str) -> bool:
    """A Concat of channels; of choices from one value, another choice."""
    if node.op_type != "Concat" or attribute(node, "axis") not in (1, -3):
        return False
    given = [w.known(name) for name in node.input]
    if any(name is None for name in given) or len(w.facts.shape(output)) != 4:
        return False
    names = [str(name) for name in given]
    parts = [w.as_choice(name) for name in names]
    if len({base for base, _ in parts}) == 1 and all(chosen is not None for _, chosen in parts):
        w.choose(parts[0][0], [i for _, chosen in parts for i in chosen or ()], output)
    else:
        w.new("concat", names, {}, output)
    return True


def activation(w: Walk, node: onnx.NodeProto, output: str) -> bool:
    """The end of a chain of elementwise operators that does what an activation does."""
    if node.op_type not in ELEMENTWISE:
        return False
    for root in w.roots(output):
        found = w.facts.compute(output, {root: points()})
        named = activation_named(found) if found is not None else None
        if named is None:
            continue
        kind, top = named
        given = w.place[root]
        if kind == "same":
            w.place[output] = given
        elif kind == "ReLU":
            w.new("relu", [given], {"top": top}, output)
        else:
            w.new("act", [given], {"kind": kind}, output)
        return True
    return False


def moving(w: Walk, node: onnx.NodeProto, output: str) -> bool:
    """The end of a chain that only moves numbers of one map."""
    root = w.origin(output) if node.op_type in MOVING else None
    if root is None:
        return False
    own = w.facts.shape(root)
    shape = own if len(own) == 4 else (*own, 1, 1)
    numbers = places(own)
    found = w.facts.compute(output, {root: numbers}) if numbers is not None else None
    what = moved(found, shape) if found is not None else None
    if what is None:
        return False
    given, chosen = w.place[root], list(what.channels)
    if what.kind == "upsample":
        given = w.new("upsample", [given], {"scale": what.scale}, None, shape[1])
    elif what.kind == "space_to_depth":
        given = w.new("space_to_depth", [given], {}, None, 4 * shape[1])
    w.choose(given, chosen, output)
    return True


def arithmetic(w: Walk, node: onnx.NodeProto, output: str) -> bool:
    """Sums and products of two maps."""
    if node.op_type not in ("Add", "Mul") or len(w.facts.varying(node)) != 2:
        return False
    given = [w.known(name) for name in node.input]
    shapes = [w.facts.shape(name)[1:] for name in node.input]
    if any(name is None for name in given):
        return False
    a, b = (str(name) for name in given)
    if node.op_type == "Add" and shapes[0] == shapes[1]:
        w.new("add", [a, b], {}, output)
        return True
    if node.op_type == "Mul" and len(shapes[0]) == len(shapes[1]) == 3:
        if shapes[0] == (shapes[1][0], 1, 1) != shapes[1]:  # the map comes first
            a, b, shapes = b, a, shapes[::-1]
        if shapes[1] in (shapes[0], (shapes[0][0], 1, 1)):
            w.new("product", [a, b], {}, output)
            return True
    return False


def pool(w: Walk, node: onnx.NodeProto, output: str) -> bool:
    """Windows of a map, and linear interpolation."""
    if node.op_type not in POOLING:
        return False
    before, around = _padded(w, node.input[0]) if node.op_type == "AveragePool" else (node.input[0], 0)
    given = w.known(before)
    if given is None:
        return False
    shape, made = w.facts.shape(before), w.facts.shape(output)
    if node.op_type == "GlobalAveragePool" or (node.op_type == "ReduceMean" and made == (*shape[:2], 1, 1)):
        w.new("mean", [given], {}, output)
        return True
    if node.op_type in ("Resize", "Upsample") and mode(node) == "linear" and len(shape) == len(made) == 4:
        scale = made[2] // shape[2]
        halves = attribute(node, "coordinate_transformation_mode", b"half_pixel")
        if shape[2:] == (made[2] * 2, made[3] * 2) and b"half_pixel" in halves:  # between two pixels: their mean
            w.new("mean_pool", [given], {"kernel": 2, "stride": 2, "padding": 0, "padded": 0}, output)
            return True
        if scale > 1 and made[2:] == (shape[2] * scale, shape[3] * scale) and b"half_pixel" in halves:
            w.new("resize", [given], {"scale": scale}, output)
            return True
    if node.op_type not in ("MaxPool", "AveragePool") or len(shape) != 4:
        return False
    kernel, stride = attribute(node, "kernel_shape"), attribute(node, "strides", [1, 1])
    pads, dilations = attribute(node, "pads", [0] * 4), attribute(node, "dilations", [1, 1])
    if len({*kernel}) > 1 or len({*stride}) > 1 or len({*pads}) > 1 or {*dilations} != {1}:
        return False
    if around and pads[0]:
        return False
    pads = [around] * 4 if around else pads
    spans = [(n + 2 * pads[0] - kernel[0]) // stride[0] + 1 for n in shape[2:]]
    if list(made[2:]) != spans or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return False  # some window hangs over the edge
    attrs = {"kernel": kernel[0], "stride": stride[0], "padding": pads[0]}
    if node.op_type == "AveragePool":
        padded = 1 if around else attribute(node, "count_include_pad", 0)
        w.new("mean_pool", [given], {**attrs, "padded": padded}, output)
    else:
        w.new("maxpool", [given], attrs, output)
    return True


def attention(w: Walk, node: onnx.NodeProto, output: str) -> bool:
    """Attention over pixels."""
    through = partial(w.origin, kinds=MOVING | SCALING)
    found = find_attention(w.facts, output, through) if len(w.facts.shape(output)) == 4 else None
    if found is None:
        return False
    parts = [w.choose(w.place[root], chosen) for root, chosen in zip(found.roots, found.channels, strict=True)]
    even = found.size == found.value
    attrs = {"heads": found.heads, "size": found.size} if even else found.attrs
    w.new("attention" if even else "uneven_attention", parts, attrs, output)
    return True


def affine(w: Walk, node: onnx.NodeProto, output: str) -> bool:
    """A multiple of a convolution, plus something, channel by channel: it goes into the convolution's weights. With
    single numbers it may be part of an activation, and waits."""
    return not w.by_numbers(node) and w.folded(output)


def _padded(w: Walk, value: str) -> tuple[str, int]:
    """What a Pad with as many zeros on all four sides reads, and how many; a value of anything else, and 0."""
    node = w.facts.maker(value)
    if node is None or node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
        return value, 0
    pads = attribute(node, "pads") or (w.facts.constant(node.input[1]) if len(node.input) > 1 else None)
    filled = w.facts.constant(node.input[2]) if len(node.input) > 2 else None
    if pads is None or len(pads) != 8 or (filled is not None and np.any(filled)):
        return value, 0
    sides = {int(n) for n in (*pads[2:4], *pads[6:8])}
    return (node.input[0], sides.pop()) if len(sides) == 1 and not any((*pads[:2], *pads[4:6])) else (value, 0)


def _at_full_size(weight: Tensor) -> Tensor:
    """The weight (cho, chi, 2 kh, 2 kw) that gives at every second pixel of an image what (cho, 4 chi, kh, kw) gives
    on its `space_to_depth`."""
    cho, wide, kh, kw = weight.shape
    apart = weight.reshape(cho, 2, 2, wide // 4, kh, kw)  # the column's phase, then the row's, then the channel
    return apart.permute(0, 3, 4, 2, 5, 1).reshape(cho, wide // 4, 2 * kh, 2 * kw).contiguous()


WAYS = (concat, activation, moving, arithmetic, pool, affine, attention)  # tried in this order
