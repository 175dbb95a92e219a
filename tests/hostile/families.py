"""Good checkpoints of the other families with one thing wrong."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from case import Case
from conftest import randomise
from fake_trees import trained
from forge import Forged
from tables import SHORT

Change = Callable[[Forged], Any]
FIT, UNKNOWN, USED = "do not fit each other", "does not know", "cannot be used"


def families() -> Iterator[Case]:
    """Each entry changes one thing of a checkpoint that loads."""
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in (
            ("YOLOv7", yolov7()),
            ("YOLOv7-tiny", tiny()),
            ("ghost", ghost()),
            ("attention", attention()),
        ):
            config, strides = SHORT[name]
            good = Path(folder) / f"{name}.pt"
            good.write_bytes(trained(copy.deepcopy(config), strides, randomise, old=True)[0])
            yield Case(f"{name}: untouched", Forged(good).bytes(), None)
            for what, (change, words) in changes.items():
                forged = Forged(good)
                change(forged)
                yield Case(f"{name}: {what}", forged.bytes(), words)


def row(index: int, value: Any) -> Change:
    """Another row of the model yaml; those of the head count on."""

    def change(f: Forged) -> None:
        backbone = f.model.yaml["backbone"]
        part, place = ("backbone", index) if index < len(backbone) else ("head", index - len(backbone))
        f.model.yaml[part][place] = value

    return change


def stored(layer: int, path: str, values: torch.Tensor | None) -> Change:
    """Another tensor in a layer (None: it is gone)."""

    def change(f: Forged) -> None:
        *modules, last = path.split(".")
        module = f.layers[layer]
        for part in modules:
            module = module._modules[part]
        store = module._parameters if last in module._parameters else module._buffers
        store[last] = None if values is None else f.parameter(values, "new")

    return change


def yolov7() -> dict[str, tuple[Change, str | None]]:
    big = torch.full((1, 32, 1, 1), 3e38)
    return {
        "RepConv of 5": (row(11, [-1, 1, "RepConv", [32, 5, 1]]), USED),
        "RepConv with stride 0": (row(11, [-1, 1, "RepConv", [32, 3, 0]]), FIT),
        "RepConv in 3 groups": (row(11, [-1, 1, "RepConv", [32, 3, 1, None, 3]]), USED),
        "RepConv of 65536 channels": (row(11, [-1, 1, "RepConv", [65536, 3, 1]]), "match|has shape"),
        "RepConv without a branch": (stored(11, "rbr_1x1.0.weight", None), "1 tensors missing"),
        "RepConv with a branch of another shape": (stored(11, "rbr_1x1.0.weight", torch.zeros(32, 32, 3, 3)), "shape"),
        "RepConv of negative variance": (stored(11, "rbr_identity.running_var", -torch.ones(32)), "negative variance"),
        "RepConv that overflows": (stored(11, "rbr_identity.weight", torch.full((32,), 3e38)), "becomes infinite"),
        "implicit NaN": (stored(14, "ia.0.implicit", big * float("nan")), "NaN or infinite"),
        "implicit of another shape": (stored(14, "ia.0.implicit", torch.zeros(1, 16, 1, 1)), "has shape"),
        "implicit of 2^20": (stored(14, "ia.0.implicit", torch.zeros(1, 1 << 20, 1, 1)), "has shape"),
        "implicit that overflows": (stored(14, "ia.0.implicit", big), "becomes infinite"),
        "implicit missing": (stored(14, "im.1.implicit", None), "1 tensors missing"),
        "Detect in the yaml": (row(14, [[11, 13], 1, "Detect", ["nc", "anchors"]]), "4 unexpected"),
        "two pyramids": (row(10, [-1, 2, "SPPCSPC", [32]]), "does not match"),
        "a pyramid with more arguments": (row(10, [-1, 1, "SPPCSPC", [32, 1, True, 1, 0.5]]), USED),
        "a pool of 65535": (row(5, [-1, 1, "MP", [65535]]), "larger than 99"),
        "a pool of 0": (row(5, [-1, 1, "MP", [0]]), FIT),
        "a pool of half pixels": (row(5, [-1, 1, "MP", [2.5]]), FIT),
        "a pool of text": (row(5, [-1, 1, "MP", ["__import__('os')"]]), UNKNOWN),
        "a pool with padding": (row(5, [-1, 1, "MP", [2, 2, 1]]), USED),
    }  # fmt: skip


def tiny() -> dict[str, tuple[Change, str | None]]:
    def act(text: Any) -> Change:
        return row(1, [-1, 1, "Conv", [32, 1, 1, "None", 1, text]])

    def slope(value: Any) -> Change:
        return lambda f: setattr(f.layers[0]._modules["act"], "negative_slope", value)

    return {
        "code for an activation": (act("nn.LeakyReLU(__import__('os').system('id'))"), UNKNOWN),
        "another slope in the yaml": (act("nn.LeakyReLU(0.2)"), UNKNOWN),
        "another slope": (slope(0.2), "slope 0.2"),
        "a slope of text": (slope("0.1"), "slope '0.1'"),
        "another activation in the yaml": (act("nn.SiLU()"), "is LeakyReLU where the model yaml needs SiLU"),
        "none in the yaml": (act(False), "is LeakyReLU where the model yaml needs Identity"),
        "an activation for channels": (row(1, [-1, 1, "Conv", ["nn.SiLU()"]]), "not a number"),
        "an activation for a kernel": (row(1, [-1, 1, "Conv", [32, "nn.SiLU()"]]), USED),
        "a pool that moves": (row(3, [-1, 1, "SP", [5, 2]]), FIT),
        "an even pool": (row(3, [-1, 1, "SP", [4]]), FIT),
        "a pool of an activation": (row(3, [-1, 1, "SP", ["nn.SiLU()"]]), USED),
    }


def attention() -> dict[str, tuple[Change, str | None]]:
    def said(key: str, value: Any) -> Change:
        return lambda f: setattr(inside(f), key, value)

    def inside(f: Forged) -> Any:
        module = f.layers[4]
        for part in ("m", "tr", "1", "ma"):
            module = module._modules[part]
        return module

    big = torch.full((24, 24), 3e38)
    return {
        "other heads": (said("num_heads", 8), "num_heads 8; dsconvert supports only 4"),
        "heads of text": (said("num_heads", "4"), "num_heads '4'"),
        "another order of tokens": (said("batch_first", True), "batch_first True"),
        "a token of zeros": (said("add_zero_attn", True), "add_zero_attn True"),
        "one layer fewer": (row(4, [-1, 1, "C3TR", [48]]), "unexpected"),
        "100 repeats": (row(4, [-1, 100, "C3TR", [48]]), "does not match"),
        "65536 channels": (row(4, [-1, 2, "C3TR", [65536]]), "has shape"),
        "no channels": (row(4, [-1, 2, "C3TR", [0]]), "not a number"),
        "a projection missing": (stored(4, "m.tr.1.ma.in_proj_weight", None), "1 tensors missing"),
        "a projection of another shape": (stored(4, "m.tr.0.q.weight", torch.zeros(24, 48)), "has shape"),
        "NaN": (stored(4, "m.tr.0.fc1.weight", big * float("nan")), "NaN or infinite"),
        "products that overflow": (stored(4, "m.tr.0.fc1.weight", big), "becomes infinite"),
    }  # fmt: skip


def ghost() -> dict[str, tuple[Change, str | None]]:
    return {
        "another stride": (row(1, [-1, 1, "GhostBottleneck", [32, 3, 1]]), "does not match|strides"),
        "a stride of 0": (row(1, [-1, 1, "GhostBottleneck", [32, 3, 0]]), "does not match|strides"),
        "100 repeats": (row(2, [-1, 100, "C3Ghost", [32]]), "does not match"),
        "a depthwise kernel of 0": (row(3, [-1, 1, "DWConv", [32, 0, 2]]), f"{FIT}|strides"),
        "65536 channels": (row(2, [-1, 1, "C3Ghost", [65536]]), "has shape"),
        "pools of 65535": (row(4, [-1, 1, "C3SPP", [48, [65535]]]), "larger than 99"),
        "no pools": (row(4, [-1, 1, "C3SPP", [48, []]]), "has shape"),
    }
