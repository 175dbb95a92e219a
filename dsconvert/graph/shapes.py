"""Whether the nodes of a graph can be run one after the other, by arithmetic alone: no tensor is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsconvert.graph.ir import INPUT, Graph, Node, Shape
from dsconvert.graph.ops import OPS


def check_node(node: Node) -> None:
    """Raises ValueError when the node's name, operation, inputs or attributes are unusable."""
    if not isinstance(node.name, str) or not 0 < len(node.name) <= 200 or not node.name.isprintable():
        raise ValueError("a node's name")
    if not isinstance(node.op, str) or node.op not in OPS:
        raise ValueError(f"operation of {node.name}")
    op = OPS[node.op]
    least, most = op.inputs
    if not least <= len(node.inputs) <= most:
        raise ValueError(f"inputs of {node.name}")
    if set(node.attrs) != set(op.attrs):
        raise ValueError(f"attributes of {node.name}")
    for key, allowed in op.attrs.items():
        if type(node.attrs[key]) not in (int, str) or node.attrs[key] not in allowed:
            raise ValueError(f"{key} of {node.name}")


def value_shapes(graph: Graph, weights: Mapping[str, Sequence[int]], image: Shape) -> dict[str, Shape]:
    """The shape of every value, given those of the convolutions' weights (cho, chi / groups, kh, kw).

    Raises ValueError where a node cannot take what it is given; nodes must have passed `check_node`."""
    shapes = {INPUT: image}
    for node in graph.nodes:
        given = [shapes[name] for name in node.inputs]
        if node.op == "conv":
            given.append(tuple(weights[node.name]))
        shapes[node.name] = OPS[node.op].shape(node, given)
    return shapes
