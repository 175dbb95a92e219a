"""Build ONNX models: nodes, shared initializers, and the model around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dsconvert.base.errors import InputError
from dsconvert.base.version import VERSION

# opset -> the IR version that introduced it; old runtimes refuse files with a newer IR version than they know
IR_VERSION = {13: 7, 21: 10}


def is_constant(tensor: onnx.TensorProto) -> bool:
    """Return whether an initializer is shared by nodes; a layer's own is named after its layer, with a dot."""
    return "." not in tensor.name


def rename_values(
    nodes: Iterable[onnx.NodeProto], tensors: Iterable[onnx.TensorProto], names: Mapping[str, str]
) -> None:  # fmt: skip
    """Give the values of a graph other names, all at once and in place; values that `names` lacks keep theirs."""
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    for tensor in tensors:
        tensor.name = names.get(tensor.name, tensor.name)


class OnnxBuilder:
    """Collects nodes and initializers, and stores equal constants once."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(self, op: str, inputs: list[str], output: str, **attrs: Any) -> str:
        """Append a node with one output, and return the output's name."""
        self.nodes.append(helper.make_node(op, inputs, [output], **attrs))
        return output

    def tensor(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer under its own name, of any dtype that onnx knows, with ml_dtypes' int4."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Add an initializer that all users of the same value share."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._shared:
            self._shared[key] = self.tensor(f"c{len(self._shared)}", value)
        return self._shared[key]

    def has(self, value: str) -> bool:
        """Return whether a node already makes this value."""
        return any(value in node.output for node in self.nodes)

    def made(self) -> set[str]:
        """Return the names of all outputs of nodes and of all initializers."""
        return {*self.initializers, *(name for node in self.nodes for name in node.output)}

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename values, all at once."""
        rename_values(self.nodes, self.initializers.values(), names)
        self.initializers = {tensor.name: tensor for tensor in self.initializers.values()}

    def shape(self, *dims: int) -> str:
        """Add a shape, as Reshape and similar nodes read it."""
        return self.constant(np.array(dims, np.int64))

    def scalar(self, value: float) -> str:
        """Add a float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def model(
        self,
        inputs: Mapping[str, tuple[int | str, ...]],
        outputs: Mapping[str, tuple[int | str, ...]],
        metadata: Mapping[str, str],
        input_type: int = onnx.TensorProto.FLOAT,
    ) -> onnx.ModelProto:
        """Return the finished model, checked by onnx.

        inputs, outputs: name -> shape; inputs have the given type, outputs are float32.

        Raises InputError when two values have one name, as a model file's invented layer names may cause.
        """
        made = Counter([*inputs, *self.initializers, *(name for node in self.nodes for name in node.output)])
        twice = next((name for name, count in made.items() if count > 1), None)
        if twice is not None:
            raise InputError(
                f"Two values of the exported file would be called {twice}; the model's layers are named so."
            )

        def values(named: Mapping[str, tuple[int | str, ...]], kind: int) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(n, kind, s) for n, s in named.items()]

        others = dict.fromkeys(node.domain for node in self.nodes if node.domain)
        graph = helper.make_graph(
            self.nodes,
            "dsconvert",
            values(inputs, input_type),
            values(outputs, onnx.TensorProto.FLOAT),
            list(self.initializers.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in others)],
            ir_version=IR_VERSION[self.opset],
            producer_name="dsconvert",
            producer_version=VERSION,
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model)
        return model
