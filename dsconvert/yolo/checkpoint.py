"""Read and write YOLOv5's own `.pt` format without YOLOv5, and without running anything found in a file.

This is the only module of dsconvert that touches a pickle. Reading goes through torch's restricted
unpickler (`weights_only=True`) with an allow-list in which every class name of YOLOv5 or torch.nn stands for
`_Record`, an inert bag of attributes: no code of the file's choosing is found, imported or called. The network
is then rebuilt from the file's model yaml and filled with its tensors by name.
"""

from __future__ import annotations

import copy
import io
import pickletools
import sys
import types
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsconvert.errors import InputError
from dsconvert.yolo import modules as ours
from dsconvert.yolo.network import Head, Network, head_from_detect

MAX_PICKLE_BYTES = 64 << 20  # the pickle itself (structure, no tensors) of a yolov5x6 is under 1 MB


class _Record:
    """Stands for any allowed class of a checkpoint: keeps its attributes, does nothing."""

    kind = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Record:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments of a pickled constructor call are of no use to us."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update((k, v) for k, v in state.items() if isinstance(k, str) and k != "kind")


_LAYERS = ("Conv", "DWConv", "Bottleneck", "C3", "SPP", "SPPF", "Focus", "Concat")
_TORCH = {
    "activation": ("SiLU", "ReLU", "LeakyReLU", "Hardswish"),
    "batchnorm": ("BatchNorm2d",),
    "container": ("ModuleList", "Sequential"),
    "conv": ("Conv2d",),
    "linear": ("Identity",),
    "pooling": ("MaxPool2d",),
    "upsampling": ("Upsample",),
}
_INERT = (  # what training scripts leave beside the model: dates, options, numpy scalars
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "datetime.datetime", "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "torch.nn.modules.loss.BCEWithLogitsLoss",
)  # fmt: skip


def _allowed_names() -> list[str]:
    names = [f"models.common.{n}" for n in _LAYERS]
    names += [f"models.yolo.{n}" for n in ("Model", "DetectionModel", "Detect")]
    names += [f"torch.nn.modules.{module}.{n}" for module, ns in _TORCH.items() for n in ns]
    return [*names, *_INERT]


ALLOWED: dict[str, type[_Record]] = {n: type("_Record", (_Record,), {"kind": n}) for n in _allowed_names()}

# Everything torch's restricted unpickler knows by itself and a YOLOv5 checkpoint may hold.
_BUILTIN = {
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    "torch.Size", "torch.device", "builtins.set", "__builtin__.set", "_codecs.encode",
    *(f"torch.{t}Storage" for t in ("Float", "Half", "Double", "Long", "Int", "Bool", "Byte", "BFloat16")),
}  # fmt: skip

_KNOWN_OTHERS = (
    ("models.yolo.SegmentationModel", "a YOLOv5 segmentation checkpoint"),
    ("models.yolo.Segment", "a YOLOv5 segmentation checkpoint"),
    ("models.yolo.ClassificationModel", "a YOLOv5 classification checkpoint"),
    ("models.common.Classify", "a YOLOv5 classification checkpoint"),
    ("ultralytics.", "a checkpoint of the ultralytics package (YOLOv8 or later)"),
    ("models.yolo.IDetect", "a YOLOv7 checkpoint"),
    ("models.experimental.Ensemble", "an ensemble of models"),
    ("__torch__.", "a TorchScript export"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: float32 network in evaluation mode (BatchNorm not fused), its head, the file's size in
    bytes and the bits it stores a weight in (16 or 32)."""

    network: Network
    head: Head
    path: Path
    size_bytes: int
    stored_bits: int


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load a YOLOv5 detection `.pt` (v5.0 to v7.0; `ema` preferred over `model`; float16 or float32).

    Raises InputError, one sentence, for anything that is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no checkpoint file at {path}.")
    content = _read(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a YOLOv5 checkpoint dictionary.")
    record = content.get("ema") or content.get("model")
    if not isinstance(record, _Record) or not record.kind.startswith("models.yolo."):
        what = "a plain state dict" if all(isinstance(v, Tensor) for v in content.values()) else "no model"
        raise InputError(f"{path} holds {what}; dsconvert needs a YOLOv5 checkpoint saved with its model.")
    config = getattr(record, "yaml", None)
    tensors = dict(_tensors(record, ""))
    if not isinstance(config, dict) or not tensors:
        raise InputError(f"The model in {path} carries no yaml or no weights.")
    detect = _last_layer(record)
    nc, na = int(getattr(detect, "nc", 0)), int(getattr(detect, "na", 0))
    if not 1 <= nc <= 10000 or not 1 <= na <= 100:
        raise InputError(f"The Detect layer of {path} declares {nc} classes and {na} anchors.")
    network = Network(config, nc, na, _activation(record, path))
    if not any(".bn." in name for name in tensors):
        network.fuse()  # the checkpoint was saved fused
    _fill(network, tensors, path)
    return Checkpoint(
        network.eval().requires_grad_(False),
        head_from_detect(network.detect, _strides(record, detect, path), _names(record, nc)),
        path,
        path.stat().st_size,
        8 * max(t.element_size() for t in tensors.values() if t.dim() == 4),
    )


def _read(path: Path) -> Any:
    """Unpickle with the allow-list, after naming what is not allowed."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            pickles = [i for i in infos if i.filename.endswith("data.pkl")]
            if any("constants.pkl" in i.filename for i in infos):
                raise InputError(f"{path} is a TorchScript export; dsconvert needs the training checkpoint (.pt).")
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise InputError(f"{path} is a zip archive but not a PyTorch checkpoint.")
            if sum(i.file_size for i in infos) > 2 * path.stat().st_size + (1 << 20):
                raise InputError(f"{path} is a compressed archive, which PyTorch never writes.")
            stream = archive.read(pickles[0])
    except (
        zipfile.BadZipFile,
        zlib.error,
        UnicodeDecodeError,
        OSError,
        NotImplementedError,
        RuntimeError,
        EOFError,
    ) as error:
        if isinstance(error, PermissionError):
            raise InputError(f"{path} cannot be read: permission denied.") from None
        raise InputError(f"{path} is not a PyTorch checkpoint, or it is truncated.") from None
    _refuse_unknown_globals(stream, path)
    try:
        allowed: list[Any] = [(record, name) for name, record in ALLOWED.items()]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds on malformed input; all mean the same to the user
        raise InputError(f"{path} is damaged or not a YOLOv5 checkpoint: its contents cannot be read.") from None


def _refuse_unknown_globals(stream: bytes, path: Path) -> None:
    """Raise InputError naming the first class the file asks for that is not on the allow-list."""
    try:
        ops = [(op.name, arg) for op, arg, _ in pickletools.genops(io.BytesIO(stream))]
    except Exception:
        raise InputError(f"{path} is damaged: its pickle cannot be parsed.") from None
    if any(op == "STACK_GLOBAL" for op, _ in ops):
        raise InputError(f"{path} is pickled with a protocol that PyTorch checkpoints do not use.")
    names = [str(arg).replace(" ", ".") for op, arg in ops if op in ("GLOBAL", "INST")]
    for prefix, what in _KNOWN_OTHERS:
        if any(n.startswith(prefix) for n in names):
            raise InputError(f"{path} is {what}; dsconvert converts YOLOv5 detection checkpoints.")
    for name in names:
        if name not in ALLOWED and name not in _BUILTIN:
            printable = "".join(c if c.isprintable() else "?" for c in name)[:80]
            raise InputError(f"{path} asks for {printable}, which dsconvert does not allow, so nothing was loaded.")


def _children(record: _Record) -> dict[str, Any]:
    children = getattr(record, "_modules", {})
    return children if isinstance(children, dict) else {}


def _tensors(record: _Record, prefix: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by dotted name, as a state dict would give them."""
    if depth > 12:
        raise InputError("The checkpoint nests its modules deeper than any YOLOv5 network.")
    for store in ("_parameters", "_buffers"):
        held = getattr(record, store, {})
        for name, value in held.items() if isinstance(held, dict) else ():
            if isinstance(value, Tensor):
                yield prefix + str(name), value.detach()
    for name, child in _children(record).items():
        if isinstance(child, _Record):
            yield from _tensors(child, f"{prefix}{name}.", depth + 1)


def _walk(record: _Record, depth: int = 0) -> Iterator[_Record]:
    yield record
    for child in _children(record).values():
        if isinstance(child, _Record) and depth < 12:
            yield from _walk(child, depth + 1)


def _last_layer(record: _Record) -> _Record:
    layers = _children(record).get("model")
    last = list(_children(layers).values())[-1:] if isinstance(layers, _Record) else []
    if not last or not isinstance(last[0], _Record) or last[0].kind != "models.yolo.Detect":
        raise InputError("The checkpoint's last layer is not Detect: this is not a YOLOv5 detection model.")
    return last[0]


def _activation(record: _Record, path: Path) -> str:
    prefix = "torch.nn.modules.activation."
    found = {r.kind.removeprefix(prefix) for r in _walk(record) if r.kind.startswith(prefix)}
    if len(found) != 1:
        raise InputError(f"{path} mixes the activations {sorted(found)}; dsconvert expects one kind.")
    return found.pop()


def _strides(record: _Record, detect: _Record, path: Path) -> list[float]:
    stride = getattr(detect, "stride", None)
    stride = getattr(record, "stride", None) if stride is None else stride
    if not isinstance(stride, Tensor) or stride.dim() != 1:
        raise InputError(f"{path} does not say the strides of its Detect layer.")
    return [float(s) for s in stride]


def _names(record: _Record, nc: int) -> list[str]:
    names = getattr(record, "names", None)
    if isinstance(names, Mapping):
        names = [names.get(i, f"class{i}") for i in range(nc)]
    if not isinstance(names, (list, tuple)) or len(names) != nc:
        names = [f"class{i}" for i in range(nc)]
    return ["".join(c if c.isprintable() else "?" for c in str(n))[:200] for n in names]


def _fill(network: Network, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the checkpoint's tensors into the network; every name and shape must match."""
    own = network.state_dict()
    given = {k: v for k, v in tensors.items() if not k.endswith("anchor_grid")}  # v5.0 keeps it as a buffer
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    missing = [m for m in missing if not m.endswith("num_batches_tracked")]
    if missing or extra:
        raise InputError(
            f"{path} does not match its own model yaml: {len(missing)} tensors missing"
            f"{f' ({missing[0]})' if missing else ''}, {len(extra)} unexpected{f' ({extra[0]})' if extra else ''}."
        )
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(value.shape)} where its yaml needs {tuple(own[name].shape)}."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {name} holds NaN or infinite numbers.")
        own[name].copy_(value)


# --- writing ---------------------------------------------------------------------------------------------------

_CLASS_NAMES: dict[type[nn.Module], str] = {
    Network: "models.yolo.DetectionModel",
    ours.Detect: "models.yolo.Detect",
    **{getattr(ours, n): f"models.common.{n}" for n in _LAYERS if hasattr(ours, n)},
}


@contextmanager
def _named_classes() -> Iterator[dict[type[nn.Module], type]]:
    """Empty classes under YOLOv5's module names, present only while pickling: pickle stores names, not code."""
    made: dict[type[nn.Module], type] = {}
    added: list[str] = []
    for source, full in _CLASS_NAMES.items():
        module_name, name = full.rsplit(".", 1)
        for part in ("models", module_name):
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                added.append(part)
        made[source] = type(name, (nn.Module,), {"__module__": module_name})
        setattr(sys.modules[module_name], name, made[source])
    try:
        yield made
    finally:
        for part in added:
            del sys.modules[part]


def _dressed(module: nn.Module, classes: Mapping[type[nn.Module], type], extra: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of the module tree whose classes carry YOLOv5's names."""
    kind: Any = classes.get(type(module), type(module))
    if isinstance(module, nn.ModuleList) and extra.get("sequential"):
        kind = nn.Sequential
    dressed = kind.__new__(kind)
    dressed.__dict__.update(module.__dict__)
    dressed.__dict__["_modules"] = {
        name: _dressed(child, classes, {}) if child is not None else None for name, child in module._modules.items()
    }
    return dressed


def yolov5_bytes(network: Network, head: Head, extra: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a float16 `.pt` in YOLOv5's format, loadable by YOLOv5 itself and by `load_checkpoint`.

    `extra` holds plain values stored beside the model (epoch, date). The network's anchors buffer must be set.
    """
    half = copy.deepcopy(network).half().eval()
    stride = torch.tensor([float(s) for s in head.strides])
    with _named_classes() as classes:
        model = _dressed(half, classes, {})
        layers = _dressed(half.model, classes, {"sequential": True})
        model._modules["model"] = layers
        save: set[int] = set()
        for index, (layer, sources, kind) in enumerate(
            zip(layers._modules.values(), half.sources, half.kinds, strict=True)
        ):
            relative = [-1 if s == index - 1 else s for s in sources]
            save.update(s for s in relative if s != -1)
            assert layer is not None
            layer.__dict__.update(
                i=index, f=relative[0] if len(relative) == 1 else relative, type=_yolov5_type(kind),
                np=sum(p.numel() for p in layer.parameters()),
            )  # fmt: skip
            if kind == "Concat":
                layer.__dict__["d"] = 1
        nl = len(head.strides)
        detect = list(layers._modules.values())[-1]
        assert detect is not None
        detect.__dict__.update(
            no=head.nc + 5, nl=nl, stride=stride, inplace=True,
            grid=[torch.empty(0)] * nl, anchor_grid=[torch.empty(0)] * nl,
        )  # fmt: skip
        for name in ("config", "sources", "kinds", "_kept"):
            model.__dict__.pop(name)
        model.__dict__.update(
            yaml={**network.config, "nc": head.nc}, names=dict(enumerate(head.names)), stride=stride,
            save=sorted(save), nc=head.nc, inplace=True,
        )  # fmt: skip
        buffer = io.BytesIO()
        torch.save({"epoch": -1, **(extra or {}), "model": model, "ema": None, "optimizer": None}, buffer)
    return buffer.getvalue()


def _yolov5_type(kind: str) -> str:
    return {"Upsample": "torch.nn.modules.upsampling.Upsample", "Detect": "models.yolo.Detect"}.get(
        kind, f"models.common.{kind}"
    )
