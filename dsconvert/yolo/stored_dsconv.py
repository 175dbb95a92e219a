"""Turn DSConv modules in a checkpoint into the float weights that their forward pass convolves.

Our modules (`dsconvert.torch`) apply the whole equation, so W' becomes the weight. A convolution before a BatchNorm has
no bias, so CDSb is subtracted from the BatchNorm's mean instead. The published class convolves its plain float weight.
Its intweight, alpha, KDSb, CDSw and CDSb have no effect and are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dsconvert.base.errors import InputError
from dsconvert.dsconv.tensor import block_count, expand_blocks

PUBLISHED, OURS = "models.common.DSConv", "dsconvert.torch.conv.DSConv"
BLOCKS = ("DSConv2D", "Bottleneck_DSConv2D", "DSConv2D_C3")
KINDS = (PUBLISHED, OURS, *(f"models.common.{n}" for n in BLOCKS), *(f"dsconvert.torch.blocks.{n}" for n in BLOCKS),
         "dsconvert.yolo.modules.Conv")  # fmt: skip
PARTS = ("intweight", "alpha", "KDSb", "CDSw", "CDSb")
MOST_BLOCK = 1 << 16


def float_weights(
    stored: Mapping[str, Any], modules: Mapping[str, Any], read: Callable[[Any], Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the stored tensors outside DSConv modules, and new tensors for some of the modules; both by name.

    modules: records with a `kind`, by prefix with its dot.
    read: makes a stored tensor.

    Raises InputError if the parts of a DSConv do not fit each other.
    """
    left, made = dict(stored), dict[str, Tensor]()
    for prefix, module in modules.items():
        if module.kind not in (PUBLISHED, OURS):
            continue
        parts = {name: left.pop(f"{prefix}{name}") for name in PARTS if f"{prefix}{name}" in left}
        if module.kind == PUBLISHED:
            continue
        left[f"{prefix}weight"] = None
        tensors = {name: read(value) for name, value in parts.items()}
        made[f"{prefix}weight"] = _weight(prefix.rstrip("."), tensors, getattr(module, "block_size", None))
        mean = f"{prefix.removesuffix('conv.')}bn.running_mean"
        if "CDSb" in tensors:
            if stored.get(mean) is None:
                raise InputError(f"{prefix.rstrip('.')} is a DSConv with CDSb but no BatchNorm.")
            expected = read(stored[mean])
            if expected.shape != tensors["CDSb"].shape:
                raise InputError(f"The parts of the DSConv {prefix.rstrip('.')} do not fit each other.")
            made[mean] = expected.float() - tensors["CDSb"].float()
    return left, made


def _weight(name: str, parts: Mapping[str, Tensor], block_size: Any) -> Tensor:
    """Return CDSw (alpha VQK + KDSb) in float32; readers of float16 parts convert these to float32 before convolving
    too.
    """
    wrong = InputError(f"The parts of the DSConv {name} do not fit each other.")
    if not {"intweight", "alpha"} <= parts.keys() or type(block_size) is not int or not 1 <= block_size <= MOST_BLOCK:
        raise wrong
    vqk, alpha = parts["intweight"], parts["alpha"]
    if vqk.dim() != 4 or vqk.is_floating_point():
        raise wrong
    cho, chi, kh, kw = vqk.shape
    blocks = (cho, block_count(chi, block_size), kh, kw)
    shapes = {"alpha": blocks, "KDSb": blocks, "CDSw": (cho,), "CDSb": (cho,)}
    shifts = {key: value for key, value in parts.items() if key != "intweight"}
    if any(tuple(v.shape) != shapes[k] or not v.is_floating_point() for k, v in shifts.items()) or not vqk.numel():
        raise wrong
    weight = expand_blocks(alpha.float(), chi, block_size) * vqk.float()
    if "KDSb" in parts:
        weight = weight + expand_blocks(parts["KDSb"].float(), chi, block_size)
    return weight if "CDSw" not in parts else parts["CDSw"].float()[:, None, None, None] * weight
