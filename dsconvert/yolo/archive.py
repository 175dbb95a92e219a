"""Open PyTorch's `.pt` files, of both forms (see `container`), without running anything in them.

This is the only module of dsconvert that reads a pickle. Each of three barriers is enough to stop code from running:

1. The pickle's opcodes are scanned first, and opcodes that PyTorch never writes are refused.
2. Every name in a pickle must be on an allow-list.
3. Every allowed name, even of torch's own classes and functions, stands for `Record`, an inert object that only keeps
   what it is given.

Tensors are then made here, from numbers whose position and size were checked, and only if they are asked for. So a
file cannot make us allocate more than it holds.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import check_ordinary
from dsconvert.yolo.container import Legacy, Storage, Zipped, open_container
from dsconvert.yolo.families import refuse_names, usual_name
from dsconvert.yolo.picklestack import Stack
from dsconvert.yolo.stored_dsconv import KINDS as DSCONV_KINDS

MAX_DIMS, MAX_COUNT = 8, 1 << 40  # of a tensor: number of dimensions, and their product


class Record:
    """Stands for any allowed class or function; it keeps its arguments and attributes, and does nothing.

    `kind` is the name in the file, `args` are the arguments of the call.
    """

    kind = ""
    args: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        made = object.__new__(cls)
        made.__dict__["args"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`__new__` has kept the arguments."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update((k, v) for k, v in state.items() if isinstance(k, str) and k not in ("kind", "args"))


class _Method(Record):
    """Stands for getattr(Detect, "forward"), which Segment keeps as an attribute.

    No checkpoint uses getattr otherwise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) != 2 or getattr(args[0], "kind", None) != "models.yolo.Detect" or args[1] != "forward" or kwargs:
            raise pickle.UnpicklingError("not allowed")


class _Dictionary(Record, dict[Any, Any]):
    """Stands for the allowed dictionary classes, whose content is kept."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Dictionary:
        return dict.__new__(cls)


LAYERS = (
    "Conv", "DWConv", "Bottleneck", "C3", "SPP", "SPPF", "Focus", "Concat",
    "GhostConv", "GhostBottleneck", "C3Ghost", "C3SPP", "C3TR", "TransformerBlock", "TransformerLayer",
    "Proto", "MP", "SP", "SPPCSPC", "RepConv", "ImplicitA", "ImplicitM",
)  # fmt: skip
SEGMENTATION = ("SegmentationModel", "Segment")
_TORCH = {
    "activation": ("SiLU", "ReLU", "LeakyReLU", "Hardswish", "MultiheadAttention"),
    "batchnorm": ("BatchNorm2d",),
    "container": ("ModuleList", "Sequential"),
    "conv": ("Conv2d",),
    "linear": ("Identity", "Linear", "NonDynamicallyQuantizableLinear", "_LinearWithBias"),
    "loss": ("BCEWithLogitsLoss",),
    "pooling": ("MaxPool2d",),
    "upsampling": ("Upsample",),
}
_STORAGES = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.DoubleStorage": torch.float64,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8, "torch.CharStorage": torch.int8, "torch.BoolStorage": torch.bool,
}  # fmt: skip
DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")
WRAPPERS = ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel")
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_BESIDE = (  # what training scripts store beside the model: dates, options, numpy scalars
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "datetime.datetime", "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "datetime.date", "datetime.timedelta", "datetime.timezone", *(f"torch.{n}" for n in (
        "float16", "float32", "float64", "bfloat16", "int64")),
    *(f"{home}.{n}" for home in ("builtins", "__builtin__") for n in ("list", "dict", "int", "float", "frozenset")),
    "torch.Size", "torch.device", "builtins.set", "__builtin__.set", "_codecs.encode",
)  # fmt: skip


def _allowed() -> dict[str, type[Record]]:
    names = [f"models.common.{n}" for n in LAYERS]
    names += DSCONV_KINDS
    names += [f"models.yolo.{n}" for n in ("Model", "DetectionModel", "Detect", "IDetect", *SEGMENTATION)]
    names += [f"torch.nn.modules.{module}.{n}" for module, ns in _TORCH.items() for n in ns]
    names += [TENSOR, PARAMETER, *WRAPPERS, *_STORAGES, *_BESIDE]
    usual = {n: type("Record", (Record,), {"kind": n}) for n in names}
    dictionaries = {n: type("Record", (_Dictionary,), {"kind": n}) for n in DICTIONARIES}
    return usual | dictionaries | {"__builtin__.getattr": _Method}


ALLOWED = _allowed()

# the opcodes of pickle protocol 2 that torch.save uses, without INST, OBJ, EXT, STACK_GLOBAL, BYTES, FRAME and LONG4
_OPCODES = frozenset((
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "REDUCE",
    "NEWOBJ", "BUILD", "BINPERSID",
))  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Finds only the inert classes of the allow-list, and turns storages into descriptions."""

    def __init__(self, stream: io.BytesIO, legacy: bool) -> None:
        super().__init__(stream)
        self.legacy, self.storages = legacy, dict[str, Storage]()

    def find_class(self, module: str, name: str) -> Any:
        full = usual_name(f"{module}.{name}")
        if full not in ALLOWED:
            raise pickle.UnpicklingError("not allowed")
        return ALLOWED[full]

    def persistent_load(self, pid: Any) -> Any:
        word, kind, key, _, *rest = pid
        if self.legacy and word == "module" and isinstance(kind, type) and issubclass(kind, Record) and len(pid) == 4:
            return kind  # the source text of a module follows in old files
        if word != "storage" or type(key) is not str or rest[1:] not in ([], [None]) or not _whole(rest[0]):
            raise pickle.UnpicklingError("not a storage")
        found = self.storages.setdefault(key, Storage(key, _STORAGES[kind.kind], rest[0]))
        if found != Storage(key, _STORAGES[kind.kind], rest[0]):
            raise pickle.UnpicklingError("one storage of two kinds")
        return found


@dataclass
class Archive:
    """An open checkpoint file. `top` is its pickle's content: dictionaries, lists, plain values and Records."""

    path: Path
    top: Any
    _container: Zipped | Legacy
    _left: int = field(repr=False)

    def tensor(self, record: Any) -> Tensor:
        """Return the numbers of a stored tensor or parameter.

        Raises InputError when they do not match its description.
        """
        while isinstance(record, Record) and record.kind == PARAMETER and record.args:
            record = record.args[0]
        if not isinstance(record, Record) or record.kind != TENSOR or len(record.args) < 4:
            raise InputError(f"{self.path} is damaged: a weight is stored as something else.")
        storage, offset, size, stride = record.args[:4]
        if not (isinstance(storage, Storage) and _whole(offset) and _shape(size) and _shape(stride)):
            raise InputError(f"{self.path} is damaged: the shape or the place of a weight is not valid.")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=False))
        numel = math.prod(size)
        most = math.prod(max(n, 1) for n in size)  # for a tensor without numbers, torch multiplies the other dimensions
        if len(size) != len(stride) or numel > storage.numel or (numel and last >= storage.numel) or most > MAX_COUNT:
            raise InputError(f"{self.path} declares larger weights than it holds.")
        data = self._numbers(storage)
        if not numel:
            return torch.empty(size, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    def _numbers(self, storage: Storage) -> bytes:
        data = self._container.numbers(storage)
        self._left -= len(data)
        if self._left < 0:  # every weight is stored once, so an honest file never gets here
            raise InputError(f"{self.path} declares more weights than it holds.")
        return data


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a `.pt` of either form; its tensors can be read inside the `with`.

    Raises InputError for any other file.
    """
    check_ordinary(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    with stream:
        container = open_container(stream, path)
        for content in container.pickles:
            _refuse_unknown(content, path)
        try:
            legacy = isinstance(container, Legacy)
            readers = [_Unpickler(io.BytesIO(content), legacy) for content in container.pickles]
            found = [reader.load() for reader in readers]
        except Exception:  # the unpickler raises many kinds on malformed input, which mean the same to the user
            raise InputError(f"{path} is damaged or not a YOLOv5 checkpoint: its contents cannot be read.") from None
        if isinstance(container, Legacy):
            machine, top, keys = found
            if not isinstance(machine, dict) or machine.get("little_endian") is not True:
                raise InputError(f"{path} was written on a big-endian machine; save it again on an ordinary one.")
            container.place(keys, readers[1].storages)
        else:
            (top,) = found
        yield Archive(path, top, container, os.fstat(stream.fileno()).st_size)


def _refuse_unknown(stream: bytes, path: Path) -> None:
    """Raise InputError for opcodes that PyTorch never writes, for classes that are not allowed (see `families`), and
    for content that takes for ever to build (see `Stack`).
    """
    names: list[str] = []
    foreign, count, stack = False, 0, Stack()
    try:
        for op, arg, _ in pickletools.genops(io.BytesIO(stream)):
            count += 1
            if op.name in ("GLOBAL", "INST"):
                names.append(str(arg).replace(" ", "."))
            # the memo is an array as long as its largest index
            far = op.name.endswith("BINPUT") and isinstance(arg, int) and arg > count
            foreign = far or op.name not in _OPCODES or not stack.bears(op.name, arg)
            if foreign:
                break
    except Exception:
        raise InputError(f"{path} is damaged: its pickle cannot be parsed.") from None
    unknown = [name for name in dict.fromkeys(names) if usual_name(name) not in ALLOWED]
    refuse_names(names, unknown, path)
    if foreign:
        raise InputError(
            f"{path} is not pickled like a PyTorch checkpoint: it uses another protocol, or numbers, tuples or keys "
            "that take for ever to read; save it again with torch.save."
        )


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_DIMS and all(map(_whole, value))
