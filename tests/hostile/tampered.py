"""A good checkpoint with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from case import EVIL_NAMES, PROTOCOL, Case
from forge import Forged, Obj, tensor

from dsconvert.yolo.archive import Record, Storage


def nested(depth: int, width: int = 2) -> list[Any]:
    """`width` times the same list, `depth` deep: a few bytes that print as width^depth."""
    found: list[Any] = ["x"]
    for _ in range(depth):
        found = [found] * width
    return found


def itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def tampered(good: Path) -> Iterator[Case]:
    """Each entry changes one thing of a checkpoint that loads."""
    yield Case("untouched", Forged(good).bytes(), None)
    for group in (numbers, networks, structures, labels):
        for what, (change, words) in group().items():
            forged = Forged(good)
            change(forged)
            yield Case(what, forged.bytes(), words)


Change = tuple[Callable[[Forged], Any], str | None]


def numbers() -> dict[str, Change]:
    """Tensors: their values, and where they say they are."""

    def weight(make: Callable[[Storage], Any]) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            stored = f.layers[1]._modules["conv"]._parameters["weight"]
            storage = stored.args[0].args[0]
            f.layers[1]._modules["conv"]._parameters["weight"] = make(storage)

        return change

    def values(place: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            module = f.layers[1]._modules["bn"] if "." not in place else f.layers[1]._modules["conv"]
            shape = (16, 8, 3, 3) if "." in place else (16,)
            full = torch.full(shape, value, dtype=dtype)
            store = "_parameters" if place.endswith("weight") else "_buffers"
            getattr(module, store)[place.rpartition(".")[2]] = f.tensor(full, "new")

        return change

    def numel(storage: Storage, count: int) -> Storage:
        return Storage(storage.key, storage.dtype, count)

    def elsewhere(storage: Storage, key: str) -> Storage:
        return Storage(key, storage.dtype, storage.numel)

    shape, stride = (16, 8, 3, 3), (72, 9, 3, 1)
    larger, lie = "declares larger weights|too few", "damaged"
    return {
        "NaN weights": (values("conv.weight", float("nan")), "holds NaN"),
        "infinite weights": (values("conv.weight", float("inf")), "holds NaN or infinite"),
        "doubles too large for floats": (values("conv.weight", 1e300, torch.float64), "holds NaN or infinite"),
        "whole numbers for weights": (values("conv.weight", 1, torch.int64), "int64 numbers"),
        "NaN variance": (values("running_var", float("nan")), "holds NaN"),
        "zero variance": (values("running_var", 0.0), None),  # BatchNorm adds a thousandth to it
        "negative variance": (values("running_var", -1.0), "negative variances"),
        "weights as large as floats": (values("conv.weight", 3e38), "becomes infinite"),
        "shape of 2^40": (weight(lambda s: tensor(s, 0, (1 << 40,), (1,))), larger),
        "shape of no numbers and 2^183":
            (weight(lambda s: tensor(s, 0, (0, 1 << 61, 1 << 61, 1 << 61), (1, 1, 1, 1))), larger),
        "shape of 2^62 squared": (weight(lambda s: tensor(s, 0, (1 << 61, 1 << 61), (0, 0))), larger),
        "2^40 by stride 0": (weight(lambda s: tensor(s, 0, (1 << 20, 1 << 20), (0, 0))), larger),
        "stride beyond the end": (weight(lambda s: tensor(s, 0, shape, (1 << 40, 9, 3, 1))), larger),
        "offset beyond the end": (weight(lambda s: tensor(s, 1 << 40, shape, stride)), larger),
        "offset of one": (weight(lambda s: tensor(s, 1, shape, stride)), larger),
        "negative stride": (weight(lambda s: tensor(s, 1151, shape, (-72, -9, -3, -1))), lie),
        "negative shape": (weight(lambda s: tensor(s, 0, (-16, -8, 3, 3), stride)), lie),
        "negative offset": (weight(lambda s: tensor(s, -1, shape, stride)), lie),
        "shape of 1000 dimensions": (weight(lambda s: tensor(s, 0, (1,) * 1000, (1,) * 1000)), lie),
        "shape and stride of other lengths": (weight(lambda s: tensor(s, 0, shape, (1,))), larger),
        "shape of text": (weight(lambda s: tensor(s, 0, ("a",), (1,))), lie),
        "shape of True": (weight(lambda s: tensor(s, 0, (True,) * 4, stride)), lie),
        "a nested parameter": (weight(lambda s: Obj("torch._utils._rebuild_parameter", args=(3, False, None))), lie),
        "storage of 2^60": (weight(lambda s: tensor(numel(s, 1 << 60), 0, shape, stride)), "too few"),
        "storage of 4 GB": (weight(lambda s: tensor(numel(s, 1 << 31), 0, shape, stride)), "too few"),
        "no such storage": (weight(lambda s: tensor(elsewhere(s, "9999"), 0, shape, stride)), "missing"),
        "storage outside": (weight(lambda s: tensor(elsewhere(s, "../../etc/passwd"), 0, shape, stride)), "missing"),
        "one storage for all": (one_storage, "more weights than it holds|has shape"),
    }  # fmt: skip


def one_storage(f: Forged) -> None:
    """Every module of 3000 reads the same large storage: 3000 times its bytes."""
    big = Storage("big", torch.float32, 1 << 20)
    f.blobs["big"] = bytes(4 << 20)
    held = {f"w{i}": tensor(big, 0, (1 << 20,), (1,)) for i in range(3000)}
    for layer in f.layers[:2]:
        layer._modules["conv"]._parameters = {"weight": held["w0"]}


def networks() -> dict[str, Change]:
    """The model yaml."""

    def row(index: int, value: Any) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            f.model.yaml["backbone"][index] = value

        return change

    def setting(key: str, value: Any) -> Callable[[Forged], None]:
        return lambda f: f.model.yaml.__setitem__(key, value)

    fit, rows, unknown = "do not fit each other", r"not \[from, number, module, args\]", "does not know"
    return {
        "yaml: width 16, 65536 channels": (row(0, [-1, 1, "Conv", [65536, 6, 2, 2]]), "has shape"),
        "yaml: a kernel of 65535": (row(0, [-1, 1, "Conv", [32, 65535, 2, 2]]), f"{fit}|has shape"),
        "yaml: padding of 65536": (row(0, [-1, 1, "Conv", [32, 6, 2, 65536]]), fit),
        "yaml: stride 0": (row(0, [-1, 1, "Conv", [32, 6, 0, 2]]), fit),
        "yaml: stride -2": (row(0, [-1, 1, "Conv", [32, 6, -2, 2]]), "not a number from 0"),
        "yaml: 3 groups of 8": (row(1, [-1, 1, "Conv", [64, 3, 2, 1, 3]]), "cannot be used"),
        "yaml: groups of 0": (row(1, [-1, 1, "Conv", [64, 3, 2, 1, 0]]), "cannot be used"),
        "yaml: 100 of 1600 blocks": (setting("depth_multiple", 16.0), "does not match|blocks"),
        "yaml: depth infinite": (setting("depth_multiple", float("inf")), "impossible"),
        "yaml: depth NaN": (setting("depth_multiple", float("nan")), "impossible"),
        "yaml: width 10^600": (setting("width_multiple", 10**600), PROTOCOL),
        "yaml: width 10^18": (setting("width_multiple", 10**18), "impossible"),
        "yaml: width a list of lists": (setting("width_multiple", nested(60)), "no usable"),
        "yaml: 4 image channels": (setting("ch", 4), "4 channels"),
        "yaml: 10^9 image channels": (setting("ch", 10**9), "not a number"),
        "yaml: backbone text": (setting("backbone", "Conv" * 1000), "impossible"),
        "yaml: backbone a number": (setting("backbone", 5), "no usable"),
        "yaml: 100000 rows": (setting("backbone", [[-1, 1, "Conv", [8, 1]]] * 100_000), "impossible"),
        "yaml: rows of itself": (setting("backbone", itself()), rows),
        "yaml: a row of 2^60 texts": (row(0, nested(60, 4)), rows),
        "yaml: args of 2^60 texts": (row(0, [-1, 1, "Conv", nested(60)]), unknown),
        "yaml: channels of 2^60 texts": (row(0, [-1, 1, "Conv", [nested(60), 6]]), unknown),
        "yaml: repeats of 2^60 texts": (row(0, [-1, nested(60), "Conv", [32, 6]]), "a list as a repeat count"),
        "yaml: sources of 2^60 texts": (row(0, [nested(60), 1, "Conv", [32, 6]]), rows),
        "yaml: 10^5 sources": (row(1, [[-1] * 100_000, 1, "Concat", [1]]), "not before it"),
        "yaml: a source of infinity": (row(1, [float("inf"), 1, "Conv", [64, 3, 2]]), rows),
        "yaml: reads itself": (row(1, [1, 1, "Conv", [64, 3, 2]]), "not before it"),
        "yaml: reads what comes later": (row(1, [5, 1, "Conv", [64, 3, 2]]), "not before it"),
        "yaml: code for an argument": (row(0, [-1, 1, "Conv", ["__import__('os').system('id')", 6]]), unknown),
        "yaml: code for a module": (row(0, [-1, 1, "exec('1')", [32]]), "is not supported"),
        "yaml: an escape for a module": (row(0, [-1, 1, "\x1b]0;owned\x07\x1b[31m", [32]]), r"\\x1b\]0;owned\\x07"),
        "yaml: a record for a module": (row(0, [-1, 1, Obj("argparse.Namespace"), [32]]), rows),
        "yaml: upsampling by 10^9": (head_row(0, [-1, 1, "nn.Upsample", ["None", 10**9, "nearest"]]), "not a number"),
        "yaml: upsampling by 64000": (head_row(0, [-1, 1, "nn.Upsample", ["None", 64000, "nearest"]]), "up to 16"),
        "yaml: concatenated 2^60 times": (doubling, "cannot be used|do not fit|has shape|not supported"),
        "yaml: maps that do not meet": (head_row(0, [-1, 1, "nn.Upsample", ["None", 3, "nearest"]]), fit),
        "yaml: pools of 65536": (row(4, [-1, 1, "SPP", [160, [65535, 9, 13]]]), "larger than 99"),
        "yaml: Detect of one level": (head_row(3, [[7], 1, "Detect", ["nc", "anchors"]]), "fit|strides|match"),
        "yaml: no Detect": (head_row(3, [-1, 1, "Conv", [32, 1]]), "not Detect"),
        "yaml: is a list": (lambda f: setattr(f.model, "yaml", [1]), "no yaml"),
    }  # fmt: skip


def head_row(index: int, value: Any) -> Callable[[Forged], None]:
    return lambda f: f.model.yaml["head"].__setitem__(index, value)


def doubling(f: Forged) -> None:
    f.model.yaml["backbone"] = [[-1, 1, "Conv", [32, 6, 2, 2]], *[[[-1, -1], 1, "Concat", [1]]] * 60]


def structures() -> dict[str, Change]:
    """The module tree, and what Detect says of itself."""

    def detect(key: str, value: Any) -> Callable[[Forged], None]:
        return lambda f: setattr(f.detect, key, value)

    def stride(values: torch.Tensor) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            f.detect.stride = f.model.stride = f.tensor(values, "stride")

        return change

    def anchors(value: float) -> Callable[[Forged], None]:
        return lambda f: f.detect._buffers.__setitem__("anchors", f.tensor(torch.full((2, 3, 2), value), "anchors"))

    classes, strides, deep = "declares .* classes", "strides|do not fit", "nests its modules|more modules"
    return {
        **{f"{n} classes": (detect("nc", n), classes) for n in (0, -1, 10001, 1 << 62, True, "80", None, 2.0)},
        "10^600 classes": (detect("nc", 10**600), PROTOCOL),
        "10000 classes": (detect("nc", 10000), "has shape"),
        "classes of 2^60 texts": (detect("nc", nested(60)), classes),
        **{f"{n} anchors": (detect("na", n), classes) for n in (0, 10**9, "3")},
        **{f"strides {s}": (stride(torch.tensor(s)), strides) for s in ([-4.0, -8.0], [0.0, 0.0], [4.0], [7.0, 9.0],
           [float("nan"), 8.0], [float("inf"), 8.0], [1e30, 8.0], [8.0, 4.0], [4.0, 16.0], [4.0, 8.0, 16.0])},
        "strides of 2^20 numbers": (stride(torch.ones(1 << 20)), "more weights than"),
        "strides in two dimensions": (stride(torch.ones(2, 2)), "does not say the strides"),
        "strides as text": (detect("stride", "4, 8"), None),  # the model says them too
        **{f"anchors of {v}": (anchors(v), "anchors|NaN") for v in (0.0, -1.0, 1e30, float("nan"))},
        "a module in itself": (loop, deep),
        "100 modules of the same 100, 12 deep": (bush, deep),
        "100 modules deep": (chain, deep),
        "a last layer of another kind": (lambda f: relabel(f.layers), "not Detect|does not match"),
        "no modules": (lambda f: setattr(f.model, "_modules", 5), "no weights"),
        "modules with numbers for names": (lambda f: setattr(f.model, "_modules", {1: f.model._modules["model"]}),
                                           "no weights|not Detect"),
        "no activation": (no_activation, "mixes the activations"),
        "a tensor with an escape in its name": (escape, r"unexpected \(model.0.bad\\x1b\[31m\)"),
    }  # fmt: skip


def loop(f: Forged) -> None:
    f.layers[0]._modules["again"] = f.model


def bush(f: Forged) -> None:
    leaf: Any = Obj("torch.nn.modules.linear.Identity", {"_modules": {}})
    for _ in range(11):
        leaf = Obj("torch.nn.modules.container.Sequential", {"_modules": {str(i): leaf for i in range(100)}})
    f.layers[0]._modules["bush"] = leaf


def chain(f: Forged) -> None:
    leaf: Any = {}
    for _ in range(100):  # deeper would only overflow the stack of the test's own pickler
        leaf = {"x": Obj("torch.nn.modules.container.Sequential", {"_modules": leaf})}
    f.layers[0]._modules.update(leaf)


def relabel(layers: list[Any]) -> None:
    layers[-1].__class__ = type("Record", (Record,), {"kind": "models.common.Conv"})


def no_activation(f: Forged) -> None:
    def strip(module: Any) -> None:
        for key, child in list(module._modules.items()):
            if isinstance(child, Record) and child.kind.startswith("torch.nn.modules.activation"):
                del module._modules[key]
            elif isinstance(child, Record):
                strip(child)

    strip(f.model)


def escape(f: Forged) -> None:
    f.layers[0].__dict__.setdefault("_parameters", {})["bad\x1b[31m"] = f.tensor(torch.zeros(1), "bad")


def labels() -> dict[str, Change]:
    """Class names. None of these is worth refusing a model for; none may reach a terminal as it is."""
    for_classes = {
        "escapes": list(EVIL_NAMES), "2^60 texts": nested(60), "lists of 2^60 texts": [nested(60)] * 2,
        "itself": [itself(), itself()], "numbers": [1, 1 << 62], "half a surrogate": ["\ud800", "b"], "too few": ["a"],
        "too many": ["a"] * 100_000, "a text": "ab", "a number": 3, "nothing": None, "long": ["a" * 1_000_000, "b"],
        "a mapping with other keys": {"a": "b", (1,): "c"}, "a mapping": {0: EVIL_NAMES[0], 1: EVIL_NAMES[1]},
    }  # fmt: skip
    made: dict[str, Change] = {}
    for what, value in for_classes.items():
        made[f"names: {what}"] = ((lambda v: lambda f: setattr(f.model, "names", v))(value), None)
    return made
