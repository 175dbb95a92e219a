"""What a user can ask of `quantize` for a checkpoint."""

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
    """Everything that decides the result of `quantize` besides the checkpoint and the machine.

    At most one of bits, target_bytes and target_drop decides the widths; without, they are allocated by measured damage
    within the bytes of 4 bits everywhere (with kds float, all have 4 bits)."""

    calib: Path | None = None  # images to calibrate on: folder, list or data.yaml; None: data-free
    block_size: int | None = None  # input channels a shift covers; None: by measured damage too, or (bits given) 16
    bits: int | None = None  # 2..8, of every DSConv layer
    target_bytes: int | None = None  # largest packed ONNX file
    target_drop: float | None = None  # most points of mAP50-95 lost on images held back (against labels, if any)
    blocks: str = "all"  # which part of the network is converted, see `yolo.plan`
    scope: str = "all"  # which convolutions of that part, see `yolo.plan`
    imgsz: SizeLike = 640  # of the images, pixels: of a square, or height and width
    samples: int = 256  # most calibration images used
    seed: int = 0  # of every random choice
    device: str = "cpu"  # where the network runs, see `workers.named_device`
    activations: str = "int8"  # float: weights alone are quantized
    kds: str = "int"  # float: the paper's real-valued shifts
    split: str | None = None  # which images of a data.yaml; None: train, else val
    strict: bool = False  # lists and labels of which a part cannot be used are refused
    finetune_steps: int | None = None  # of the brief fine-tune, see `tune.distil`; None: as many as are of use
    finetune_time: float | None = None  # seconds after which it stops; None: never, 0: none

    @property
    def size(self) -> Size:
        """Height and width of the images."""
        return Size.of(self.imgsz)

    def plain(self) -> dict[str, Any]:
        """Every option as JSON has it, a path as it was given."""
        calib = None if self.calib is None else str(self.calib)
        return {**asdict(self), "calib": calib, "imgsz": self.size.json}

    @property
    def finetunes(self) -> bool:
        """Whether a brief fine-tune is wanted."""
        return self.finetune_steps != 0 and self.finetune_time != 0


def check_options(options: QuantizeOptions, stride: int) -> None:
    """Raises InputError for values that mean nothing, contradict each other, or do not fit a network of this stride."""
    if not options.size.fits(stride, 4096):
        raise InputError.naming(
            "{imgsz} {} is not a multiple of the model's stride {} up to 4096.", options.size, stride
        )
    if sum(o is not None for o in (options.bits, options.target_bytes, options.target_drop)) > 1:
        raise InputError.naming("{bits}, {target_size} and {target_map_drop} each decide the widths; give one of them.")
    if options.target_drop is not None and (options.calib is None or options.target_drop <= 0):
        raise InputError.naming("{target_map_drop} needs a number above 0, and {images} images to measure the drop on.")
    if options.bits is not None and not 2 <= options.bits <= 8:
        raise InputError.naming("{bits} {} is not a number from 2 to 8.", options.bits)
    if options.kds == "float" and (options.activations != "float" or options.target_bytes or options.target_drop):
        raise InputError.naming(
            "{kds} float needs {activations} float, and knows no {target_size} or {target_map_drop}."
        )
    if (options.finetune_steps or 0) < 0 or not 0 <= (options.finetune_time or 0) < math.inf:
        raise InputError.naming("{finetune_steps} and {finetune_time} must be at least 0.")
    if (options.block_size or 1) < 1 or options.samples < 1:
        raise InputError.naming("{block_size} and {samples} must be at least 1.")
    workers.check_device(options.device)
