"""Let a YOLOv5 tree build DSConv2D_C3 rows at run time, without changing its files.

YOLOv5's `parse_model(d, ch)` looks up the module names of a model yaml in the globals of `models.yolo`. But the list of
modules with scaled channels and a repeat count is fixed in its code, and an unknown class would get raw arguments. So
each row is parsed under the name of the block that it is a variant of, C3 for DSConv2D_C3. The resulting layer is then
replaced, with all attributes that the tree wrote on it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dsconvert.base.errors import InputError
from dsconvert.torch.blocks import Bottleneck_DSConv2D, DSConv2D, DSConv2D_C3
from dsconvert.torch.conv import DSConv
from dsconvert.yolo.network import VARIANTS

# published name -> how a block of the tree becomes ours
MAKERS: Mapping[str, Callable[..., nn.Module]] = {
    "DSConv2D": DSConv2D.from_conv,
    "Bottleneck_DSConv2D": Bottleneck_DSConv2D.from_bottleneck,
    "DSConv2D_C3": DSConv2D_C3.from_c3,
}
NOTED = ("i", "f")  # what parse_model writes on every layer, besides its type and its number of parameters


def register(
    models_yolo: Any, block_size: int = 32, KDSBias: bool = False, CDS: bool = False, bits: int = 4
) -> None:  # fmt: skip
    """Make a YOLOv5 tree's `models.yolo` build DSConv rows with these shifts; another call changes the shifts.

    Rows of DSConv2D, Bottleneck_DSConv2D and DSConv2D_C3 take the arguments of Conv, Bottleneck and C3.

    Raises InputError when the module has no parse_model.
    """
    given = getattr(models_yolo, "parse_model", None)
    if not callable(given):
        raise InputError(
            f"{getattr(models_yolo, '__name__', models_yolo)} has no parse_model: give YOLOv5's models.yolo."
        )
    original = getattr(given, "dsconvert_original", given)
    for cls in (DSConv, DSConv2D, Bottleneck_DSConv2D, DSConv2D_C3):
        setattr(models_yolo, cls.__name__, cls)
    shifts = {"block_size": block_size, "KDSBias": KDSBias, "CDS": CDS, "bits": bits}

    @functools.wraps(original)
    def parse_model(d: Any, ch: Any, *args: Any, **kwargs: Any) -> Any:
        plain, wanted = _plain(d)
        model, save = original(plain, ch, *args, **kwargs)
        for index, kind in wanted.items():
            model[index] = _replaced(model[index], MAKERS[kind], shifts)
        return model, save

    parse_model.dsconvert_original = original  # type: ignore[attr-defined]
    models_yolo.parse_model = parse_model


def _plain(d: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the model yaml with the tree's own blocks instead of ours, and the names of our rows by layer index."""
    plain = copy.deepcopy(dict(d))
    wanted: dict[int, str] = {}
    for index, row in enumerate([*plain["backbone"], *plain["head"]]):
        if row[2] in VARIANTS:
            wanted[index], row[2] = row[2], VARIANTS[row[2]]
    return plain, wanted


def _replaced(layer: nn.Module, make: Callable[..., nn.Module], shifts: Mapping[str, Any]) -> nn.Module:
    """Return the layer built from ours; a row that repeats is a Sequential of blocks."""
    if type(layer) is nn.Sequential:
        made: Any = nn.Sequential(*(make(block, **shifts) for block in layer))
        kind = type(made[0])
    else:
        made = make(layer, **shifts)
        kind = type(made)
    for name in NOTED:
        setattr(made, name, getattr(layer, name))
    made.type = f"{kind.__module__}.{kind.__name__}"
    made.np = sum(p.numel() for p in made.parameters())
    return made
