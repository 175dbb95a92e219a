"""The converted model on disk: one safetensors file with packed integers.

Each convolution has these tensors:

    <name>.vqk or <name>.code    VQK as packed bits (see `dsconv.packing`), or the strings of a trellis
    <name>.kds or <name>.alpha   m as packed bits, or the paper's real alpha, float32; plain int8 layers have neither
    <name>.cdsw, <name>.cdsb     per-channel scales and biases, float32

The header has a single key, `dsconvert`, with JSON. This holds the format version, graph, layers (shape, bits, block
size), activation grids, head, image size and provenance. Last comes a digest of these and of the tensors (see
`base.seal`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dsconvert.base.errors import InputError, printable, shown
from dsconvert.base.filekinds import check_ordinary
from dsconvert.base.seal import DIGEST, NotAsWritten, seal, unseal
from dsconvert.base.size import Size
from dsconvert.dsconv.codes import CODES, FREE
from dsconvert.dsconv.codes.real import REAL
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.packing import pack_bits, unpack_bits
from dsconvert.dsconv.tensor import DSTensor, block_count
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Graph
from dsconvert.model.check import Shape, Tensor, check_model, tensors_of
from dsconvert.model.model import DSModel
from dsconvert.yolo.network import Head

KEY, VERSION = "dsconvert", 3
PARTS = {"version", "imgsz", "head", "provenance", "graph", "layers", "activations", DIGEST}
MAX_HEADER, MAX_BLOCK = 16 << 20, 1 << 16  # characters of JSON (a yolov5n has 40 kB); channels of a block
MAX_TABLE = MAX_HEADER + (4 << 20)  # bytes of the header with its JSON and the names and offsets of tensors
MAX_LAYER, MAX_WEIGHTS = 1 << 26, 1 << 28  # weights of a layer and of all layers; a yolov5x6 has 15 and 140 million
_TYPES = {"U8": "uint8", "I8": "int8", "F32": "float32"}  # names of types in safetensors


def model_bytes(model: DSModel) -> bytes:
    """Return the file's bytes; equal models give equal bytes."""
    tensors: dict[str, NDArray[Any]] = {}
    layers: dict[str, Any] = {}
    for name, conv in model.convs.items():
        w = conv.weight
        layers[name] = {"shape": list(w.vqk.shape), "bits": w.bits, "block_size": w.block_size}
        code = w.format.code
        if code.marked:
            layers[name][code.name] = True
        tensors[f"{name}.{code.part}"] = code.pack(w.stored, w.format)
        if code.real:
            tensors[f"{name}.alpha"] = w.m.numpy()
        elif not w.is_plain_int8:
            tensors[f"{name}.kds"] = pack_bits(w.m.numpy(), w.format.kds_bits)
        tensors[f"{name}.cdsw"] = w.cds_w.numpy()
        tensors[f"{name}.cdsb"] = conv.bias.numpy()
    header = {
        "version": VERSION,
        "imgsz": model.imgsz.json,
        "head": _head(model.head),
        "provenance": model.provenance,
        "graph": model.graph.to_json(),
        "layers": layers,
        "activations": {name: [p.scale, p.zero_point] for name, p in model.activations.items()},
    }
    return save(tensors, {KEY: seal(header, tensors)})


def _head(head: Head) -> dict[str, Any]:
    """Return the head as JSON values. `masks` and `class_untrained` are written only if they apply."""
    known: dict[str, Any] = {"names": head.names, "strides": head.strides, "anchors": head.anchors}
    known |= {"masks": head.nm} if head.nm else {}
    return known | ({"class_untrained": True} if head.class_untrained else {})


def load_model(path: Path) -> DSModel:
    """Read a model file. Raises InputError for any other file, and for one that was changed after it was written."""
    check_ordinary(path)
    try:
        _check_table(path)
        with safe_open(path, framework="numpy") as stored:
            return _read(stored, path)
    except FileNotFoundError:
        raise InputError(f"There is no model file at {path}.") from None
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable safetensors file ({type(error).__name__}).") from None


def _check_table(path: Path) -> None:
    """Raise InputError if the header is larger than any model file's: parsing needs some hundred times its bytes.

    A header that claims to be larger than the file is left to the library to refuse.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if MAX_TABLE < length < path.stat().st_size:
        raise InputError(f"{path} has a larger header than any model file.")


def _read(stored: Any, path: Path) -> DSModel:
    """Return the model in an open file."""
    text = (stored.metadata() or {}).get(KEY)
    if text is None:
        raise InputError(
            f"{path} is a safetensors file, but not one made by dsconvert; give dsconvert quantize the "
            "checkpoint (.pt) or an ONNX file of its network."
        )
    if len(text) > MAX_HEADER:
        raise InputError(f"{path} has a larger header than any model file.")
    try:
        header = json.loads(text)
        if header["version"] != VERSION:
            raise InputError(f"{path} has format version {shown(header['version'])}; this dsconvert reads {VERSION}.")
        _check_sizes(header["layers"], stored)
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        unseal(text, tensors)
        if not PARTS.issuperset(header):
            raise ValueError("parts")
        model = _model(header, tensors)
        check_model(model)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, NotAsWritten):
            raise InputError(f"{path} is damaged: {error}.") from None
        why = printable(str(error), 100)
        raise InputError(f"{path} is damaged: its header and tensors do not fit ({why}).") from None
    return model


def _check_sizes(layers: Mapping[str, Any], stored: Any) -> None:
    """Raise ValueError for tensors that do not belong to a layer, and for more weights than any network has.

    This is checked before any tensor is read: a sparse file may be far larger than the space it takes on disk.
    """
    wanted: dict[str, Tensor] = {}
    total = 0
    for name, layer in layers.items():
        shape, format = _layer(name, layer, stored.keys())
        total += math.prod(shape)
        if math.prod(shape) > MAX_LAYER or total > MAX_WEIGHTS:
            raise ValueError("more weights than any network has")
        wanted |= {f"{name}.{part}": kind for part, kind in tensors_of(shape, format).items()}
    for name in stored.keys():  # noqa: SIM118 (not a dict)
        part, kind = stored.get_slice(name), wanted.get(name)
        if kind is None:
            raise ValueError(f"a tensor {name} that belongs to no layer, or to none of its kind")
        found = _TYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
        if found != (kind.dtype, kind.shape):
            raise ValueError(f"{name} holds {found[0]} numbers {found[1]}, not {kind.dtype} {kind.shape}")


def _model(header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> DSModel:
    graph = Graph.from_json(header["graph"])
    convs = {node.name: _conv(node.name, header["layers"][node.name], tensors) for node in graph.convs()}
    if set(header["layers"]) != set(convs):
        raise ValueError("layers")
    h = header["head"]
    anchors = tuple(tuple((float(w), float(v)) for w, v in level) for level in h["anchors"])
    if not all(isinstance(n, str) for n in h["names"]):
        raise ValueError("class names")
    head = Head(tuple(printable(n) for n in h["names"]), tuple(int(s) for s in h["strides"]), anchors,
                int(h.get("masks", 0)), h.get("class_untrained", False))  # fmt: skip
    activations = {name: QParams(float(s), int(z)) for name, (s, z) in header["activations"].items()}
    return DSModel(graph, convs, activations, head, _size(header["imgsz"]), dict(header["provenance"]))


def _size(stored: object) -> Size:
    """Return an image size stored as `Size.json`. Raises ValueError for anything else."""
    both = stored if isinstance(stored, list) else [stored, stored]
    if len(both) != 2 or not all(type(n) is int for n in both) or Size(*both).json != stored:
        raise ValueError("image size")
    return Size(*both)


def _layer(name: str, layer: Mapping[str, Any], tensors: Collection[str]) -> tuple[Shape, WeightFormat]:
    """Return shape and format of a layer. Raises ValueError for an invalid entry.

    layer: its entry in the header.
    tensors: names of all tensors in the file.
    """
    cho, chi, kh, kw = (int(n) for n in layer["shape"])
    marks = sorted(set(layer) - {"shape", "bits", "block_size"})
    if any(mark not in CODES or not CODES[mark].marked or layer[mark] is not True for mark in marks) or len(marks) > 1:
        raise ValueError(f"{marks[0]} of {name}")
    code = CODES[marks[0]] if marks else REAL if f"{name}.alpha" in tensors else FREE
    format = WeightFormat(int(layer["bits"]), int(layer["block_size"]), code)
    if min(cho, chi, kh, kw) < 1 or not 1 <= format.block_size <= MAX_BLOCK or not format.limits:
        raise ValueError(f"shape or block size of {name}")
    return (cho, chi, kh, kw), format


def _conv(name: str, layer: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> QConv:
    shape, format = _layer(name, layer, tensors)
    wanted = tensors_of(shape, format)
    for part, kind in wanted.items():
        kind.check(f"{name}.{part}", tensors[f"{name}.{part}"])
    blocks = (shape[0], block_count(shape[1], format.block_size), *shape[2:])
    if "alpha" in wanted:
        m = tensors[f"{name}.alpha"]
    elif "kds" in wanted:
        m = unpack_bits(tensors[f"{name}.kds"], format.kds_bits, blocks, signed=False)
    else:
        m = np.ones(blocks, np.int8)
    cds_w, bias = (torch.from_numpy(tensors[f"{name}.{part}"]) for part in ("cdsw", "cdsb"))
    stored = format.code.unpack(tensors[f"{name}.{format.code.part}"], shape, format)
    return QConv(DSTensor(stored, torch.from_numpy(m), cds_w, format), bias)
