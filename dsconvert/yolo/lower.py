"""Lower the modules of YOLOv5 and YOLOv7 to the flat graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dsconvert.base.errors import InputError
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.shapes import check_node, value_shapes
from dsconvert.yolo.attention import HEADS, QKV, TransformerBlock, TransformerLayer
from dsconvert.yolo.ghost import GhostBottleneck, GhostConv
from dsconvert.yolo.modules import C3, SPP, SPPF, Bottleneck, Concat, Conv, Detect, Focus
from dsconvert.yolo.network import Head, Network
from dsconvert.yolo.segment import Proto, Segment
from dsconvert.yolo.yolov7 import MP, SP, SPPCSPC, RepConv

PARTS = ("box", "obj", "cls", "mask")  # the parts of a box: see `Head.parts`


class _Builder:
    """Collects nodes and float weights; names follow the module path (`model.2.m.0.cv1.conv`)."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.params: dict[str, ConvParams] = {}

    def add(self, op: str, name: str, *inputs: str, **attrs: Any) -> str:
        self.nodes.append(Node(op, name, inputs, attrs))
        return name

    def conv2d(self, conv: nn.Conv2d, name: str, x: str) -> str:
        assert conv.bias is not None
        self.params[name] = ConvParams(conv.weight.detach(), conv.bias.detach())
        stride, padding, dilation = conv.stride[0], conv.padding[0], conv.dilation[0]
        assert isinstance(padding, int)
        return self.add("conv", name, x, stride=stride, padding=padding, dilation=dilation, groups=conv.groups)

    def conv(self, module: Conv, name: str, x: str) -> str:
        return self.activated(module.act, name, self.conv2d(module.conv, f"{name}.conv", x))

    def activated(self, act: nn.Module, name: str, x: str) -> str:
        kind = type(act).__name__
        return x if kind == "Identity" else self.add("act", f"{name}.act", x, kind=kind)

    def pool(self, module: nn.MaxPool2d, name: str, x: str) -> str:
        return self.add("maxpool", name, x, kernel=module.kernel_size, stride=module.stride, padding=module.padding)

    def bottleneck(self, module: Bottleneck, name: str, x: str) -> str:
        y = self.conv(module.cv2, f"{name}.cv2", self.conv(module.cv1, f"{name}.cv1", x))
        return self.add("add", f"{name}.add", x, y) if module.add else y

    def pyramid(self, pools: nn.ModuleList, name: str, x: str) -> str:
        """Join a value with its pooled versions."""
        pooled = [self.pool(p, f"{name}.m.{i}", x) for i, p in enumerate(pools)]  # type: ignore[arg-type]
        return self.add("concat", f"{name}.cat", x, *pooled)

    def ghost(self, module: GhostConv, name: str, x: str) -> str:
        y = self.conv(module.cv1, f"{name}.cv1", x)
        return self.add("concat", f"{name}.cat", y, self.conv(module.cv2, f"{name}.cv2", y))

    def sppcspc(self, module: SPPCSPC, name: str, x: str) -> str:
        y = x
        for part in ("cv1", "cv3", "cv4"):
            y = self.conv(getattr(module, part), f"{name}.{part}", y)
        y = self.pyramid(module.m, name, y)
        for part in ("cv5", "cv6"):
            y = self.conv(getattr(module, part), f"{name}.{part}", y)
        both = self.add("concat", f"{name}.both", y, self.conv(module.cv2, f"{name}.cv2", x))
        return self.conv(module.cv7, f"{name}.cv7", both)

    def linear(self, weight: Tensor, bias: Tensor, name: str, x: str) -> str:
        """Add a linear layer over every pixel's channels."""
        self.params[name] = ConvParams(weight.detach()[:, :, None, None], bias.detach())
        return self.add("conv", name, x, stride=1, padding=0, dilation=1, groups=1)

    def attention(self, module: TransformerLayer, name: str, x: str) -> str:
        p = module.projections()
        size = len(p["out"][0]) // HEADS
        qkv = [self.linear(*p[part], f"{name}.{part}", x) for part in QKV]
        y = self.linear(*p["out"], f"{name}.out", self.add("attention", f"{name}.ma", *qkv, heads=HEADS, size=size))
        x = self.add("add", f"{name}.add", x, y)
        return self.add("add", f"{name}.add2", x, self.linear(*p["fc"], f"{name}.fc", x))

    def transformer(self, module: TransformerBlock, name: str, x: str) -> str:
        placed = self.linear(module.linear.weight, module.linear.bias, f"{name}.linear", x)
        x = self.add("add", f"{name}.add", x, placed)
        for i, layer in enumerate(module.tr):
            x = self.attention(layer, f"{name}.tr.{i}", x)  # type: ignore[arg-type]
        return x

    def proto(self, module: Proto, name: str, x: str) -> str:
        x = self.layer(module.upsample, f"{name}.upsample", [self.conv(module.cv1, f"{name}.cv1", x)])
        return self.conv(module.cv3, f"{name}.cv3", self.conv(module.cv2, f"{name}.cv2", x))

    def layer(self, module: nn.Module, name: str, xs: list[str]) -> str:
        x = xs[0]
        if isinstance(module, Conv):
            return self.conv(module, name, x)
        if isinstance(module, Bottleneck):
            return self.bottleneck(module, name, x)
        if isinstance(module, nn.Sequential):
            for i, child in enumerate(module):
                x = self.layer(child, f"{name}.{i}", [x])
            return x
        if isinstance(module, C3):
            deep = self.layer(module.m, f"{name}.m", [self.conv(module.cv1, f"{name}.cv1", x)])
            both = self.add("concat", f"{name}.cat", deep, self.conv(module.cv2, f"{name}.cv2", x))
            return self.conv(module.cv3, f"{name}.cv3", both)
        if isinstance(module, SPP):
            x = self.conv(module.cv1, f"{name}.cv1", x)
            return self.conv(module.cv2, f"{name}.cv2", self.pyramid(module.m, name, x))
        if isinstance(module, SPPF):
            xs = [self.conv(module.cv1, f"{name}.cv1", x)]
            for i in range(3):
                xs.append(self.pool(module.m, f"{name}.m.{i}", xs[-1]))
            return self.conv(module.cv2, f"{name}.cv2", self.add("concat", f"{name}.cat", *xs))
        if isinstance(module, Focus):
            return self.conv(module.conv, f"{name}.conv", self.add("space_to_depth", f"{name}.slices", x))
        if isinstance(module, nn.Upsample):
            assert module.scale_factor is not None
            return self.add("upsample", name, x, scale=int(module.scale_factor))  # type: ignore[arg-type]
        if isinstance(module, Concat):
            return self.add("concat", name, *xs)
        if isinstance(module, (MP, SP)):
            return self.pool(module.m, name, x)
        if isinstance(module, SPPCSPC):
            return self.sppcspc(module, name, x)
        if isinstance(module, RepConv):
            assert module.rbr_reparam is not None
            return self.activated(module.act, name, self.conv2d(module.rbr_reparam, f"{name}.rbr_reparam", x))
        if isinstance(module, GhostConv):
            return self.ghost(module, name, x)
        if isinstance(module, GhostBottleneck):
            y = self.layer(module.conv, f"{name}.conv", [x])
            return self.add("add", f"{name}.add", y, self.layer(module.shortcut, f"{name}.shortcut", [x]))
        if isinstance(module, TransformerBlock):
            return self.transformer(module, name, x)
        if isinstance(module, nn.Identity):
            return x
        raise TypeError(f"no lowering for {type(module).__name__}")


def lower(network: Network) -> tuple[Graph, dict[str, ConvParams]]:
    """Return the graph of a fused network, and its float weights by convolution name."""
    builder = _Builder()
    made: list[str] = []
    outputs: list[str] = []
    for index, (layer, sources) in enumerate(zip(network.model, network.sources, strict=True)):
        xs = [made[s] if s >= 0 else INPUT for s in sources]
        if isinstance(layer, Detect):
            outputs = [
                builder.conv2d(conv, f"model.{index}.m.{i}", x)  # type: ignore[arg-type]
                for i, (conv, x) in enumerate(zip(layer.m, xs, strict=True))
            ]
            if isinstance(layer, Segment):
                outputs.append(builder.proto(layer.proto, f"model.{index}.proto", xs[0]))
        else:
            made.append(builder.layer(layer, f"model.{index}", xs))
    return Graph(tuple(builder.nodes), tuple(outputs)), builder.params


def check_maps(network: Network, strides: Sequence[int]) -> None:
    """Raise InputError when a network's layers do not fit each other, or its maps do not have the given strides.

    Only shapes count, so the network's tensors may be without numbers (torch's meta device).
    """
    side = 2 * max(strides)
    try:
        graph, params = lower(network.fused())
        for node in graph.nodes:
            check_node(node)
        shapes = value_shapes(graph, {n: tuple(p.weight.shape) for n, p in params.items()}, (3, side, side))
    except (ValueError, TypeError, RuntimeError, AssertionError):
        raise InputError("The layers of the model yaml do not fit each other.") from None
    maps = [shapes[name][1:] for name in graph.outputs]
    sides = [side // s for s in strides] + [2 * side // strides[0]] * bool(network.detect.nm)
    if any(side % s for s in strides) or maps != [(s, s) for s in sides]:
        raise InputError(f"The checkpoint's strides {list(strides)} do not match its layers.")


def split_detect(graph: Graph, params: dict[str, ConvParams], head: Head) -> tuple[Graph, dict[str, ConvParams]]:
    """Split each of Detect's convolutions into `.box` (na * 4 channels), `.obj` (na) and `.cls` (na * nc).

    A segmentation network also gets `.mask` (na * nm). The numbers stay the same. When quantized, each part has its own
    activation grid. With one class, its logit is not trained and lies far above objectness, and a common grid would
    clip it. `decode` reads both forms.
    """
    nodes: list[Node] = []
    parts: dict[str, ConvParams] = {}
    outputs: list[str] = []
    maps = graph.outputs[: len(head.strides)]
    for node in graph.nodes:
        if node.name not in maps:
            nodes.append(node)
            continue
        p = params[node.name]
        weight, bias = (v.unflatten(0, (head.na, sum(head.parts))).split(head.parts, 1) for v in (p.weight, p.bias))
        for part, w, b in zip(PARTS, weight, bias, strict=False):
            name = f"{node.name}.{part}"
            nodes.append(Node("conv", name, node.inputs, node.attrs))
            parts[name] = ConvParams(w.flatten(0, 1), b.flatten())
            outputs.append(name)
    kept = {name: p for name, p in params.items() if name not in maps}
    return Graph(tuple(nodes), (*outputs, *graph.outputs[len(maps) :])), {**kept, **parts}
