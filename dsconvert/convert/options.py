"""The options of `quantize` for a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike


@dataclass(frozen=True)
class QuantizeOptions:
    """All that decides the result of `quantize`, besides the checkpoint and the machine.

    At most one of bits, target_bytes and target_drop decides the widths of the layers. Without any, widths are
    allocated by measured damage, within the bytes that 4 bits in every layer would take. With kds float every layer has
    4 bits then.
    """

    calib: Path | None = None  # calibration images: a folder, list or data.yaml; None: synthesised
    # input channels that share a KDS; None: chosen by measured damage, or 16 if bits are given
    block_size: int | None = None
    bits: int | None = None  # of every DSConv layer, 2..8
    target_bytes: int | None = None  # largest size of the packed ONNX file
    # most points of mAP50-95 to lose on held-back images (against labels, if there are any)
    target_drop: float | None = None
    blocks: str = "all"  # which part of the network is converted, see `yolo.plan`
    scope: str = "all"  # which convolutions of that part, see `yolo.plan`
    imgsz: SizeLike = 640  # side of the images in pixels, or their height and width
    samples: int = 256  # most calibration images used
    seed: int = 0  # of every random choice
    device: str = "cpu"  # where the network runs, see `workers.named_device`
    activations: str = "int8"  # int8, or float: only weights are quantized
    kds: str = "int"  # int, or float: the paper's real-valued KDS
    split: str | None = None  # which images of a data.yaml; None: train, or val if there are none
    strict: bool = False  # whether lists and labels with unusable parts are refused
    finetune_steps: int | None = None  # of the brief fine-tune, see `tune.distil`; None: as many as are useful
    finetune_time: float | None = None  # seconds after which the fine-tune stops; None: never, 0: no fine-tune

    @property
    def size(self) -> Size:
        """Height and width of the images."""
        return Size.of(self.imgsz)

    def plain(self) -> dict[str, Any]:
        """Return every option as plain JSON values."""
        calib = None if self.calib is None else str(self.calib)
        return {**asdict(self), "calib": calib, "imgsz": self.size.json}

    @property
    def finetunes(self) -> bool:
        """Whether a brief fine-tune is wanted."""
        return self.finetune_steps != 0 and self.finetune_time != 0


def check_options(options: QuantizeOptions, stride: int) -> None:
    """Raise InputError for options that are out of range, contradict each other, or do not fit the network's stride."""
    if not options.size.fits(stride, 4096):
        raise InputError.naming(
            "{imgsz} {} must be a multiple of the model's stride {}, and at most 4096.", options.size, stride
        )
    if sum(o is not None for o in (options.bits, options.target_bytes, options.target_drop)) > 1:
        raise InputError.naming("{bits}, {target_size} and {target_map_drop} each decide the widths; give one of them.")
    if options.target_drop is not None and (options.calib is None or options.target_drop <= 0):
        raise InputError.naming("{target_map_drop} needs a number above 0, and {images} images to measure the drop on.")
    if options.bits is not None and not 2 <= options.bits <= 8:
        raise InputError.naming("{bits} {} is not a number from 2 to 8.", options.bits)
    if options.kds == "float" and (options.activations != "float" or options.target_bytes or options.target_drop):
        raise InputError.naming(
            "{kds} float needs {activations} float, and cannot be combined with {target_size} or {target_map_drop}."
        )
    if (options.finetune_steps or 0) < 0 or not 0 <= (options.finetune_time or 0) < math.inf:
        raise InputError.naming("{finetune_steps} and {finetune_time} must be at least 0.")
    if (options.block_size or 1) < 1 or options.samples < 1:
        raise InputError.naming("{block_size} and {samples} must be at least 1.")
    workers.check_device(options.device)
