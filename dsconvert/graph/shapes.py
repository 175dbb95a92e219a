"""Whether the nodes of a graph can be run one after the other, by arithmetic alone: no tensor is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsconvert.graph.ir import INPUT, Graph, Node
from dsconvert.graph.run import ACTIVATIONS

Shape = tuple[int, int, int]  # channels, height, width
MAX_POOL = 99  # YOLOv5 pools over 13 at most

# What each operation's attributes may be: least and most. Other attributes are an error, too.
_CONV = {"stride": (1, 64), "padding": (0, 256), "dilation": (1, 64), "groups": (1, 1 << 16)}
_POOL = {"kernel": (1, MAX_POOL), "stride": (1, 64), "padding": (0, MAX_POOL // 2)}
_HEADS = {"heads": (1, 1 << 10), "size": (1, 1 << 16)}
_RANGES: dict[str, dict[str, tuple[int, int]]] = {
    "conv": _CONV, "maxpool": _POOL, "upsample": {"scale": (1, 16)}, "attention": _HEADS,
}  # fmt: skip
_INPUTS = {"add": (2, 2), "concat": (1, 1000), "attention": (3, 3)}  # of the others one


def check_node(node: Node) -> None:
    """Raises ValueError when the node's name, inputs or attributes are unusable."""
    if not isinstance(node.name, str) or not 0 < len(node.name) <= 200 or not node.name.isprintable():
        raise ValueError("a node's name")
    least, most = _INPUTS.get(node.op, (1, 1))
    if not least <= len(node.inputs) <= most:
        raise ValueError(f"inputs of {node.name}")
    if node.op == "act":
        if set(node.attrs) != {"kind"} or node.attrs["kind"] not in ACTIVATIONS:
            raise ValueError(f"activation {node.name}")
        return
    ranges = _RANGES.get(node.op, {})
    if set(node.attrs) != set(ranges):
        raise ValueError(f"attributes of {node.name}")
    for key, (low, high) in ranges.items():
        if type(node.attrs[key]) is not int or not low <= node.attrs[key] <= high:
            raise ValueError(f"{key} of {node.name}")


def value_shapes(graph: Graph, weights: Mapping[str, Sequence[int]], image: Shape) -> dict[str, Shape]:
    """The shape of every value, given those of the convolutions' weights (cho, chi / groups, kh, kw).

    Raises ValueError where a node cannot take what it is given; nodes must have passed `check_node`."""
    shapes = {INPUT: image}
    for node in graph.nodes:
        shapes[node.name] = _after(node, [shapes[name] for name in node.inputs], weights)
    return shapes


def _after(node: Node, inputs: list[Shape], weights: Mapping[str, Sequence[int]]) -> Shape:
    (c, h, w), a = inputs[0], node.attrs
    if node.op == "conv":
        cho, chi, kh, kw = weights[node.name]
        if chi * a["groups"] != c or cho % a["groups"]:
            raise ValueError(f"channels of {node.name}")
        return cho, _span(node, h, kh, a["dilation"]), _span(node, w, kw, a["dilation"])
    if node.op == "maxpool":
        if a["padding"] > a["kernel"] // 2:
            raise ValueError(f"padding of {node.name}")
        return c, _span(node, h, a["kernel"], 1), _span(node, w, a["kernel"], 1)
    if node.op == "upsample":
        return c, h * a["scale"], w * a["scale"]
    if node.op == "space_to_depth":
        if h % 2 or w % 2:
            raise ValueError(f"odd image of {node.name}")
        return 4 * c, h // 2, w // 2
    if node.op == "add" and inputs[0] != inputs[1]:
        raise ValueError(f"shapes at {node.name}")
    if node.op == "attention" and {(a["heads"] * a["size"], h, w)} != set(inputs):
        raise ValueError(f"shapes at {node.name}")
    if node.op == "concat":
        if any(shape[1:] != (h, w) for shape in inputs):
            raise ValueError(f"shapes at {node.name}")
        return sum(shape[0] for shape in inputs), h, w
    return c, h, w


def _span(node: Node, size: int, kernel: int, dilation: int) -> int:
    """Length after a window of `kernel` passed over `size`."""
    found = (size + 2 * int(node.attrs["padding"]) - dilation * (kernel - 1) - 1) // int(node.attrs["stride"]) + 1
    if found < 1:
        raise ValueError(f"nothing left of {node.name}")
    return found
