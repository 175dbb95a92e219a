"""Read the `.pt` checkpoints of YOLOv5 and YOLOv7 without their code, and without running anything in a file.

`archive` opens the file. Here the network is rebuilt from the file's model yaml, at first without memory (torch's meta
device). It is then filled with the file's tensors by name, once their shapes are known to fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsconvert.base.errors import InputError, printable, shown
from dsconvert.base.filekinds import check_ordinary
from dsconvert.yolo import attention
from dsconvert.yolo.archive import Archive, Record, open_archive
from dsconvert.yolo.families import WAY
from dsconvert.yolo.lower import check_maps
from dsconvert.yolo.modules import LEAKY_SLOPE
from dsconvert.yolo.network import Head, Network, head_from_detect, whole_strides
from dsconvert.yolo.records import MAX_NAME, check_numbers, is_tensor, last_layer, model_record, stored, walk
from dsconvert.yolo.stored_dsconv import float_weights

MAX_CLASSES = 10000
_ACTIVATION = "torch.nn.modules.activation."


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    network: float32, in evaluation mode, with BatchNorm not fused.
    size_bytes: of the file.
    stored_bits: of a weight in the file (16 or 32).
    sha256: of the file.
    """

    network: Network
    head: Head
    path: Path
    size_bytes: int
    stored_bits: int
    sha256: str


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load a `.pt` of a YOLOv5 (v5.0 to v7.0) or YOLOv7 detector, or of a YOLOv5 segmentation network.

    `ema` is preferred to `model`. Raises InputError for any other file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the checkpoint file (.pt) in it.")
    check_ordinary(path)
    if not path.is_file():
        raise InputError(f"There is no checkpoint file at {path}.")
    with open_archive(path) as archive:
        record = model_record(archive.top, path)
        config = getattr(record, "yaml", None)
        modules = dict(walk(record))
        held = dict(stored(modules))
        if not isinstance(config, dict) or not held:
            raise InputError(f"The model in {path} carries no yaml or no weights.")
        detect = last_layer(record)
        nc, na = getattr(detect, "nc", None), getattr(detect, "na", None)
        if type(nc) is not int or type(na) is not int or not 1 <= nc <= MAX_CLASSES or not 1 <= na <= 100:
            raise InputError(f"The Detect layer of {path} declares {shown(nc)} classes and {shown(na)} anchors.")
        check_numbers(detect, nc, path)
        with torch.device("meta"):
            network = Network(config, nc, na, _activation(modules.values(), path))
            if not any(".bn." in name for name in held):
                network = network.fused()  # the checkpoint was saved fused
        strides = whole_strides(_strides(record, detect, archive), len(network.detect.m))
        check_maps(network, strides)
        left, made = float_weights(held, modules, archive.tensor)
        _take_epsilons(network, modules, path)
        bits = _fill(network, left, made, archive)
        _check_activations(network, modules, path)
        _check_attention(network, modules, path)
    _take_epsilons(network, modules, path)
    network.eval().requires_grad_(False)
    head = head_from_detect(network.detect, strides, _names(record, nc), network.is_yolov7)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Checkpoint(network, head, path, path.stat().st_size, bits, sha256)


def _activation(modules: Iterable[Record], path: Path) -> str:
    """Return the activation of layers whose row in the yaml names none."""
    found = {r.kind.removeprefix(_ACTIVATION) for r in modules if r.kind.startswith(_ACTIVATION)} - {
        "MultiheadAttention"
    }
    if len(found) != 1 and "SiLU" not in found:
        raise InputError(f"{path} mixes the activations {sorted(found)}; dsconvert expects one kind.")
    return "SiLU" if "SiLU" in found else found.pop()


def _check_activations(network: Network, modules: Mapping[str, Record], path: Path) -> None:
    """Raise InputError if a stored activation is not the one that the yaml builds."""
    for name, module in network.named_modules():
        wanted = type(module).__name__
        if name.rpartition(".")[2] != "act":
            continue
        record = modules.get(f"{name}.")
        kind = "nothing" if record is None else record.kind.rpartition(".")[2]
        if kind != wanted:
            raise InputError(f"{path}: {name} is {kind} where the model yaml needs {wanted}.")
        slope = getattr(record, "negative_slope", LEAKY_SLOPE)
        if kind == "LeakyReLU" and slope != LEAKY_SLOPE:
            raise InputError(
                f"{path}: {name} is a LeakyReLU of slope {shown(slope)}; dsconvert supports only {LEAKY_SLOPE}."
            )


def _check_attention(network: Network, modules: Mapping[str, Record], path: Path) -> None:
    """Raise InputError if stored attention is not YOLOv5's kind, in its heads or its order of dimensions."""
    usual = {"num_heads": attention.HEADS, "batch_first": False, "add_zero_attn": False}
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for key, value in usual.items():
                found = getattr(modules.get(f"{name}."), key, value)
                if type(found) is not type(value) or found != value:
                    raise InputError(f"{path}: {name} has {key} {shown(found)}; dsconvert supports only {value}.")


def _take_epsilons(network: Network, modules: Mapping[str, Record], path: Path) -> None:
    """Set every BatchNorm's epsilon to the stored one, as other trainers than YOLOv5's leave torch's 1e-5.

    Raises InputError if it is not a small positive number.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}." in modules:
            epsilon = getattr(modules[f"{name}."], "eps", module.eps)
            if not isinstance(epsilon, float) or not 0 < epsilon < 1:
                raise InputError(f"{path}: {name} adds {shown(epsilon)} to its variances, which no BatchNorm does.")
            module.eps = epsilon


def _strides(record: Record, detect: Record, archive: Archive) -> list[float]:
    for holder in (detect, record):
        stride = getattr(holder, "stride", None)
        if is_tensor(stride):
            values = archive.tensor(stride)
            if values.dim() == 1 and values.numel() <= 100:
                return [float(s) for s in values]
    raise InputError(f"{archive.path} does not say the strides of its Detect layer.")


def _names(record: Record, nc: int) -> list[str]:
    """Return the class names, safe for a terminal; `class3` where the file has none."""
    names = getattr(record, "names", None)
    if isinstance(names, Mapping):
        names = [names.get(i, f"class{i}") for i in range(nc)]
    if not isinstance(names, (list, tuple)) or len(names) != nc:
        names = [None] * nc
    usual = [n if isinstance(n, str) else shown(n) if type(n) is int else f"class{i}" for i, n in enumerate(names)]
    return [printable(n, MAX_NAME) for n in usual]


def _fill(network: Network, stored: Mapping[str, Any], made: Mapping[str, Tensor], archive: Archive) -> int:
    """Fill the network (on the meta device) with the checkpoint's tensors, and with tensors `made` from others.

    Every name and shape must match. Returns the bits in which a weight is stored.
    """
    path, own = archive.path, network.state_dict()
    given = {k: v for k, v in stored.items() if not k.endswith("anchor_grid")}  # v5.0 stores it as a buffer
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    missing = [m for m in missing if not m.endswith("num_batches_tracked")]
    if missing or extra:
        first, more = (f" ({names[0]})" if names else "" for names in (missing, extra))
        raise InputError(
            f"{path} does not match its own model yaml: {len(missing)} tensors missing{first}, {len(extra)} "
            f"unexpected{more}; if a fork of YOLOv5 made it, {WAY}."
        )
    bits = 8
    values: dict[str, Tensor] = {}
    for name, empty in own.items():
        if name in made:
            value = made[name]
        else:
            value = archive.tensor(given[name]) if name in given else torch.zeros_like(empty, device="cpu")
        if value.shape != empty.shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(value.shape)} where its yaml needs {tuple(empty.shape)}."
            )
        if value.is_floating_point() != empty.is_floating_point():
            raise InputError(f"{path}: {name} holds {value.dtype} numbers, which no trained network does.")
        if value.dim() == 4 and name not in made:  # these are made in float32, whatever is stored
            bits = max(bits, 8 * value.element_size())
        values[name] = value.to(empty.dtype)
        if not bool(torch.isfinite(values[name]).all()):
            raise InputError(f"{path}: {name} holds NaN or infinite numbers.")
        if name.endswith("running_var") and bool((value < 0).any()):
            raise InputError(f"{path}: {name} holds negative variances.")
    network.load_state_dict(values, assign=True)
    if infinite := network.overflowing():
        raise InputError(f"{path}: {infinite} becomes infinite when BatchNorm and the like are folded into it.")
    return bits
