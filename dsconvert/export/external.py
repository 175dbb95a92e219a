"""Where an ONNX file says its weights are: engines follow that blindly, a stranger's file may point anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from dsconvert.errors import InputError, printable


def check_external_data(path: Path) -> int:
    """Bytes of the file and of those where it keeps data. Raises InputError when the file cannot be parsed, or keeps
    data outside of its own folder."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # onnx raises many kinds on malformed files
        raise InputError(f"{path} is not an ONNX file ONNX Runtime can run.") from None
    folder = path.resolve().parent
    files = {path.resolve()}
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            if not _inside(folder, entry.value):
                where = printable(entry.value, 100)
                raise InputError(f"{path} keeps weights outside of its own folder, at {where}, so it was not loaded.")
            files.add((folder / entry.value).resolve())
    return sum(file.stat().st_size for file in files if file.is_file())


def _inside(folder: Path, location: str) -> bool:
    """True for a file below the folder, links followed."""
    try:
        found = (folder / location).resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return found != folder and found.is_relative_to(folder)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the file: of its graphs, the graphs within their nodes, its functions and training steps."""
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
