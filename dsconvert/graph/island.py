"""Operators of an ONNX file that stay float between two grids: an island of the graph.

The graph has no operation for them, so they are computed as the file says, by torch, which also knows their gradient.
The exported file has the file's own nodes. A new operator is one entry of `FLOAT`. The package onnx2torch has such a
table too; it needs torchvision, which this project must not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dsconvert.graph.ir import Shape

if TYPE_CHECKING:
    from dsconvert.base.builder import OnnxBuilder

Inputs = list[Tensor | None]  # None: left out
Attributes = Mapping[str, Any]
Function = Callable[[Attributes, Inputs], Any]


@dataclass(frozen=True)
class Part:
    """A piece of an ONNX file with one result."""

    nodes: tuple[onnx.NodeProto, ...]  # in order
    fixed: Mapping[str, NDArray[Any]]  # what they read that is the same for every image, by name
    inputs: tuple[str, ...]  # names of the maps (n, c, h, w) that they read
    output: str  # name of the map that they make
    shape: Shape  # its channels, height and width
    batch: int = 1  # images that the nodes take at once

    @cached_property
    def _attributes(self) -> tuple[Attributes, ...]:
        """The attributes of each node, and how many outputs it has."""
        return tuple(
            {**{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, "outputs": len(node.output)}
            for node in self.nodes
        )

    @cached_property
    def _constants(self) -> Mapping[str, Tensor | None]:
        """What is fixed, as tensors by name. An input that is left out has no name."""
        return {"": None, **{name: torch.tensor(value) for name, value in self.fixed.items()}}

    def compute(self, maps: list[Tensor]) -> Tensor:
        """Maps (n, c, h, w) -> the result (n, c, h, w). The nodes are for `batch` images, so as many go at once."""
        starts = range(0, len(maps[0]), self.batch)
        return torch.cat([self._some([m[i : i + self.batch] for m in maps]) for i in starts])

    def _some(self, maps: list[Tensor]) -> Tensor:
        """Maps of at most `batch` images -> the result. Copies of the last image fill up the batch."""
        count, more = len(maps[0]), self.batch - len(maps[0])
        if more:
            maps = [torch.cat((m, m[-1:].expand(more, *m.shape[1:]))) for m in maps]
        return self._whole(maps)[:count]

    def _whole(self, maps: list[Tensor]) -> Tensor:
        values = {**self._constants, **dict(zip(self.inputs, maps, strict=True))}
        for node, attributes in zip(self.nodes, self._attributes, strict=True):
            made = FLOAT[node.op_type](attributes, [values[name] for name in node.input])
            made = made if isinstance(made, (tuple, list)) else (made,)
            values.update(zip(node.output, made, strict=False))
        result = values[self.output]
        assert result is not None
        return result

    def emit(self, b: OnnxBuilder, inputs: list[str], output: str) -> str:
        """The nodes in another file, which has the maps under the names given."""
        names = {"": "", **dict(zip(self.inputs, inputs, strict=True)), self.output: output}
        names |= {name: b.constant(value) for name, value in self.fixed.items()}
        for i, node in enumerate(self.nodes):
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            for k, name in enumerate(name for name in node.output if name):
                names.setdefault(name, f"{output}.{i}.{k}")
            copied.input[:] = [names[name] for name in node.input]
            copied.output[:] = [names[name] for name in node.output]
            copied.name = ""
            b.nodes.append(copied)
        return output


def _given(inputs: Inputs, place: int) -> Tensor | None:
    return inputs[place] if place < len(inputs) else None


def _numbers(a: Attributes, inputs: Inputs, key: str, place: int) -> list[int] | None:
    """Whole numbers that are an attribute in older opsets and an input in newer ones."""
    given = _given(inputs, place)
    found = a.get(key) if given is None else given.tolist()
    return None if found is None else [int(n) for n in found]


def _same(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs if x is not None]


def _reduced(function: Callable[..., Tensor]) -> Function:
    def reduce(a: Attributes, inputs: Inputs) -> Tensor:
        (x, *_) = _same(inputs)
        axes = _numbers(a, inputs, "axes", 1) or list(range(x.dim()))
        return function(x, dim=axes, keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _clip(a: Attributes, inputs: Inputs) -> Tensor:
    low, high = _given(inputs, 1), _given(inputs, 2)
    bottom, top = (a.get(key) if x is None else float(x) for key, x in (("min", low), ("max", high)))
    return _same(inputs)[0].clamp(bottom, top)


def _prelu(a: Attributes, inputs: Inputs) -> Tensor:
    x, slope = _same(inputs)
    return torch.where(x < 0, x * slope, x)


def _reshape(a: Attributes, inputs: Inputs) -> Tensor:
    x, shape = _same(inputs)
    sides = [int(n) for n in shape]
    if not a.get("allowzero", 0):
        sides = [x.shape[i] if n == 0 else n for i, n in enumerate(sides)]
    return x.reshape(sides)


def _flatten(a: Attributes, inputs: Inputs) -> Tensor:
    (x,) = _same(inputs)
    axis = a.get("axis", 1) % (x.dim() + 1)
    return x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1)


def _squeeze(a: Attributes, inputs: Inputs) -> Tensor:
    axes = _numbers(a, inputs, "axes", 1)
    x = _same(inputs)[0]
    return x.squeeze() if axes is None else x.squeeze(axes)


def _unsqueeze(a: Attributes, inputs: Inputs) -> Tensor:
    x, axes = _same(inputs)[0], _numbers(a, inputs, "axes", 1) or []
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _split(a: Attributes, inputs: Inputs) -> list[Tensor]:
    x, axis = _same(inputs)[0], a.get("axis", 0)
    sizes = _numbers(a, inputs, "split", 1)
    if sizes is None:
        each = -(-x.shape[axis] // a["outputs"])
        return list(x.split(each, axis))
    return list(x.split(sizes, axis))


def _slice(a: Attributes, inputs: Inputs) -> Tensor:
    x = _same(inputs)[0]
    starts, ends = (_numbers(a, inputs, key, i) or [] for i, key in enumerate(("starts", "ends"), 1))
    axes = _numbers(a, inputs, "axes", 3) or list(range(len(starts)))
    steps = _numbers(a, inputs, "steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        picks = range(x.shape[axis])[slice(start, end, step)]
        x = x.index_select(axis, torch.tensor(list(picks), dtype=torch.long, device=x.device))
    return x


def _gather(a: Attributes, inputs: Inputs) -> Tensor:
    x, picks = _same(inputs)
    axis = a.get("axis", 0) % x.dim()
    flat = x.index_select(axis, picks.flatten().long() % x.shape[axis])
    return flat.reshape(*x.shape[:axis], *picks.shape, *x.shape[axis + 1 :])


def _pad(a: Attributes, inputs: Inputs) -> Tensor:
    x, pads = _same(inputs)[0], _numbers(a, inputs, "pads", 1) or []
    if _given(inputs, 3) is not None or a.get("mode", b"constant") != b"constant":
        raise ValueError("only constant padding of all axes is known")
    filled = _given(inputs, 2)
    half = len(pads) // 2
    ends = [n for axis in reversed(range(half)) for n in (pads[axis], pads[axis + half])]
    return F.pad(x, ends, value=a.get("value", 0.0) if filled is None else float(filled))


def _around(a: Attributes, x: Tensor, fill: float = 0.0) -> Tensor:
    """The map with the windows' padding, which ONNX gives as begins and ends."""
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ValueError("auto_pad is not known")
    pads = a.get("pads", [0] * 4)
    return F.pad(x, [pads[1], pads[3], pads[0], pads[2]], value=fill)


def _conv(a: Attributes, inputs: Inputs) -> Tensor:
    (x, weight), bias = _same(inputs[:2]), _given(inputs, 2)
    return F.conv2d(
        _around(a, x), weight, bias, a.get("strides", [1, 1]), 0, a.get("dilations", [1, 1]), a.get("group", 1)
    )


def _conv_transpose(a: Attributes, inputs: Inputs) -> Tensor:
    (x, weight), bias = _same(inputs[:2]), _given(inputs, 2)
    if "output_shape" in a or a.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError("only padding by numbers is known")
    made = F.conv_transpose2d(
        x, weight, bias, a.get("strides", [1, 1]), 0, a.get("output_padding", [0, 0]), a.get("group", 1),
        a.get("dilations", [1, 1]),
    )  # fmt: skip
    top, left, bottom, right = a.get("pads", [0] * 4)
    return made[:, :, top : made.shape[2] - bottom, left : made.shape[3] - right]


def _maxpool(a: Attributes, inputs: Inputs) -> Tensor:
    if a.get("ceil_mode", 0):
        raise ValueError("windows over the edge are not known")
    x = _around(a, _same(inputs)[0], -torch.inf)
    return F.max_pool2d(x, a["kernel_shape"], a.get("strides", [1, 1]), 0, a.get("dilations", [1, 1]))


def _mean_pool(a: Attributes, inputs: Inputs) -> Tensor:
    if a.get("ceil_mode", 0):
        raise ValueError("windows over the edge are not known")
    x, how = _same(inputs)[0], (a["kernel_shape"], a.get("strides", [1, 1]))
    sums = F.avg_pool2d(_around(a, x), *how)
    return sums if a.get("count_include_pad", 0) else sums / F.avg_pool2d(_around(a, torch.ones_like(x)), *how)


def _depth_to_space(a: Attributes, inputs: Inputs) -> Tensor:
    (x,), size = _same(inputs), a["blocksize"]
    if a.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    apart = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return apart.reshape(n, c // size**2, h * size, w * size)


def _space_to_depth(a: Attributes, inputs: Inputs) -> Tensor:
    (x,), size = _same(inputs), a["blocksize"]
    n, c, h, w = x.shape
    apart = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return apart.reshape(n, c * size**2, h // size, w // size)


def _layer_norm(a: Attributes, inputs: Inputs) -> Tensor:
    (x, scale), bias = _same(inputs[:2]), _given(inputs, 2)
    return F.layer_norm(x, x.shape[a.get("axis", -1) :], scale, bias, a.get("epsilon", 1e-5))


def _instance_norm(a: Attributes, inputs: Inputs) -> Tensor:
    x, scale, bias = _same(inputs)
    return F.instance_norm(x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5))


def _batch_norm(a: Attributes, inputs: Inputs) -> Tensor:
    x, scale, bias, mean, var = _same(inputs)
    return F.batch_norm(x, mean, var, scale, bias, eps=a.get("epsilon", 1e-5))


def _gemm(a: Attributes, inputs: Inputs) -> Tensor:
    (x, y), more = _same(inputs[:2]), _given(inputs, 2)
    product = (x.T if a.get("transA", 0) else x) @ (y.T if a.get("transB", 0) else y)
    made = a.get("alpha", 1.0) * product
    return made if more is None else made + a.get("beta", 1.0) * more


def _each(function: Callable[..., Tensor]) -> Function:
    return lambda a, inputs: function(*_same(inputs))


FLOAT: dict[str, Function] = {
    "Identity": _each(lambda x: x),
    "Dropout": lambda a, inputs: inputs[0],
    "Add": _each(torch.add),
    "Sub": _each(torch.sub),
    "Mul": _each(torch.mul),
    "Div": _each(torch.div),
    "Pow": _each(torch.pow),
    "Max": _each(torch.maximum),
    "Min": _each(torch.minimum),
    "Neg": _each(torch.neg),
    "Abs": _each(torch.abs),
    "Sqrt": _each(torch.sqrt),
    "Exp": _each(torch.exp),
    "Log": _each(torch.log),
    "Erf": _each(torch.erf),
    "Sin": _each(torch.sin),
    "Cos": _each(torch.cos),
    "Reciprocal": _each(torch.reciprocal),
    "Relu": _each(F.relu),
    "Sigmoid": _each(torch.sigmoid),
    "Tanh": _each(torch.tanh),
    "Softplus": _each(F.softplus),
    "Softsign": _each(F.softsign),
    "HardSwish": _each(F.hardswish),
    "Mish": _each(F.mish),
    "PRelu": _prelu,
    "Clip": _clip,
    "LeakyRelu": lambda a, inputs: F.leaky_relu(_same(inputs)[0], a.get("alpha", 0.01)),
    "Elu": lambda a, inputs: F.elu(_same(inputs)[0], a.get("alpha", 1.0)),
    "Selu": lambda a, inputs: F.selu(_same(inputs)[0]),
    "Gelu": lambda a, inputs: F.gelu(_same(inputs)[0], approximate=a.get("approximate", b"none").decode()),
    "HardSigmoid": lambda a, i: (a.get("alpha", 0.2) * _same(i)[0] + a.get("beta", 0.5)).clamp(0, 1),
    "Softmax": lambda a, inputs: _same(inputs)[0].softmax(a.get("axis", -1)),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin),
    "GlobalAveragePool": lambda a, inputs: _same(inputs)[0].mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda a, inputs: _same(inputs)[0].amax((2, 3), keepdim=True),
    "Transpose": lambda a, i: _same(i)[0].permute(a.get("perm", list(range(_same(i)[0].dim()))[::-1])),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda a, inputs: torch.cat(_same(inputs), a["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Expand": lambda a, i: _same(i)[0] * torch.ones([int(n) for n in _same(i)[1]], device=_same(i)[0].device),
    "Pad": _pad,
    "MatMul": _each(torch.matmul),
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _maxpool,
    "AveragePool": _mean_pool,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "BatchNormalization": _batch_norm,
}
