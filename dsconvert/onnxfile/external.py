"""Parse a stranger's ONNX file after checking its size, and check where it keeps its weights.

Engines follow the paths of external data blindly, and these may point anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from dsconvert.base.errors import InputError, printable
from dsconvert.base.filekinds import check_ordinary
from dsconvert.onnxfile.wire import TooMany, check_parts

MAX_BYTES = (1 << 31) - 1  # of a protobuf message
ORT_FORMAT = b"ORTM"  # fifth to eighth byte of ONNX Runtime's own format, which it would load from a file of any name


@dataclass(frozen=True)
class Parsed:
    """A parsed file without its external data.

    model: its content.
    size: bytes of the file and of all files where it keeps data.
    outside: bytes of external data that its tensors claim, all together.
    """

    model: onnx.ModelProto
    size: int
    outside: int


def check_external_data(path: Path) -> int:
    """Return the bytes of the file and of all files where it keeps data. Raises InputError as `parsed` does."""
    return parsed(path).size


def parsed(path: Path) -> Parsed:
    """Parse a file.

    Raises InputError when it cannot be parsed, has too many parts, or keeps data outside of its own folder.
    """
    check_ordinary(path)
    unusable = InputError(f"{path} is not an ONNX file that ONNX Runtime can run.")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path} is larger than the 2 GB that an ONNX file can have; keep its weights beside it.")
        with path.open("rb") as stream:
            if stream.read(8)[4:] == ORT_FORMAT:
                raise unusable
        check_parts(path)
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except InputError:
        raise
    except TooMany as error:
        raise InputError(f"{path} {error}, so it was not loaded.") from None
    except Exception:  # onnx raises many kinds on malformed files
        raise unusable from None
    folder, outside = path.resolve().parent, 0
    files = {path.resolve()}
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        if "location" not in said:
            continue
        if not _inside(folder, said["location"]):
            where = printable(said["location"], 100)
            raise InputError(f"{path} keeps weights outside of its own folder, at {where}, so it was not loaded.")
        file = (folder / said["location"]).resolve()
        check_ordinary(file)
        files.add(file)
        outside += _length(said.get("length", ""), file)
    return Parsed(model, sum(file.stat().st_size for file in files if file.is_file()), outside)


def _length(text: str, file: Path) -> int:
    """Return the bytes of a file that a tensor claims: the number in the text, or all of the file."""
    if text.isascii() and text.isdecimal() and len(text) < 19:
        return int(text)
    return file.stat().st_size if file.is_file() else 0


def _inside(folder: Path, location: str) -> bool:
    """Return True for a location below the folder, links followed."""
    try:
        found = (folder / location).resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return found != folder and found.is_relative_to(folder)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of the file: of its graphs, of graphs inside nodes, of its functions and training steps."""
    graphs = [model.graph, *(g for info in model.training_info for g in (info.initialization, info.algorithm))]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        for graph in graphs:
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
        attributes = [a for node in nodes for a in node.attribute]
        graphs, nodes = [], []
        for a in attributes:
            yield from (a.t, *a.tensors)
            for sparse in (a.sparse_tensor, *a.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [g for g in (a.g, *a.graphs) if g.node or g.initializer or g.sparse_initializer]
