"""A DSConv that trains: by float weights behind the integers (straight-through), or by learnable shifts of fixed
integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dsconvert.dsconv import modules
from dsconvert.dsconv.codes.free_search import to_blocks
from dsconvert.dsconv.codes.real import REAL, nearest_alpha, project_alpha
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import expand_blocks

SHIFTS = ("alpha", "KDSb", "CDSw", "CDSb")


class DSConv(modules.DSConv):
    """Computes out = conv(x, CDSw * (alpha * VQK + KDSb)) + CDSb, with VQK of `bits` (2..8) in `intweight`.

    At first `weight` (cho, chi / groups, kh, kw) is a parameter. Every forward pass convolves its DSConv form, and the
    gradient passes straight through the rounding. In training mode alpha and KDSb follow the weight by one
    least-squares step a pass; CDSw and CDSb stay as they are. After `freeze_vqk` the integers are fixed, and alpha,
    KDSb, CDSw and CDSb are parameters.

    A state dict with only `weight`, as a float convolution has it, can be loaded: its DSConv form is fitted. A state
    dict without `weight` freezes the module, one with it thaws it. Create the optimizer after loading.
    """

    weight: Tensor | None

    def _begin(self) -> None:
        REAL.limits(self.bits)  # raises ValueError
        self.weight = nn.Parameter(torch.empty(self.intweight.shape))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d
        self.refit()

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, block_size: int = 32, KDSBias: bool = False, CDS: bool = False, bits: int = 4
    ) -> DSConv:
        """Return the DSConv nearest to a float convolution, to replace it."""
        made = cls.in_place_of(conv, conv.bias is not None, block_size, KDSBias, CDS, bits)
        made.load_state_dict(conv.state_dict())
        return made.to(conv.weight.device)

    @torch.no_grad()
    def refit(self) -> None:
        """Fit alpha and KDSb again to the float weight, by least squares from several starts."""
        assert self.weight is not None
        wanted = self._unscaled(self.weight).float()
        if self.KDSb is not None:
            self.KDSb.copy_(self._block_means(wanted))
            wanted = wanted - self._expand(self.KDSb)
        _, alpha = nearest_alpha(wanted, WeightFormat(self.bits, self.block_size, REAL))
        # with alpha 0, a block of zeros could never change again
        self.alpha.copy_(torch.where(alpha == 0, torch.finfo(torch.float16).tiny, alpha))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the integers to the nearest to the float weight at the present shifts.

        Code that changes weight or alpha by hand, such as averaging over epochs, need not call it: forward, state_dict
        and pickle do.
        """
        if self.weight is None:
            return
        # in float32: a module stored as float16 and converted back must find the same integers
        wanted = self.weight.float()
        if self.CDSw is not None:
            wanted = wanted / self.CDSw.float()[:, None, None, None]
        if self.KDSb is not None:
            wanted = wanted - self._expand(self.KDSb.float())
        self.intweight.copy_((wanted / self._expand(self.alpha.float())).round().clamp_(*REAL.limits(self.bits)))

    @torch.no_grad()
    def _track(self) -> None:
        """Make one step of alternating least squares: integers for the shifts, then shifts for the integers."""
        assert self.weight is not None
        self.refresh()
        wanted, vqk = self._unscaled(self.weight), self.intweight.to(self.weight.dtype)
        shift = 0.0 if self.KDSb is None else self._expand(self.KDSb)
        blocks = (to_blocks(v, self.block_size) for v in (wanted - shift, vqk))
        best = project_alpha(*blocks).reshape(self.alpha.shape)
        self.alpha.copy_(torch.where(best == 0, self.alpha, best))
        if self.KDSb is not None:
            self.KDSb.copy_(self._block_means(wanted - self._expand(self.alpha) * vqk))

    def freeze_vqk(self) -> None:
        """Fix the integers; alpha, KDSb, CDSw and CDSb become parameters, and `weight` is dropped."""
        self.refresh()
        self.weight = None
        for name in SHIFTS:
            value = self._buffers.get(name)
            if value is not None:  # a shift that the layer does not have stays None
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(value))

    def thaw_vqk(self) -> None:
        """Undo `freeze_vqk`; the float weight starts at the value of integers and shifts."""
        if self.weight is not None:
            return
        weight = nn.Parameter(self.real_weight().detach().clone())
        for name in SHIFTS:
            value = self._parameters.pop(name, None)
            if value is not None:
                self.register_buffer(name, value.detach())
        self.weight = weight

    def real_weight(self) -> Tensor:
        """Return W', with the gradient of `weight` if there is one."""
        if self.weight is None:
            return super().real_weight()
        if self.training:
            self._track()
        self.refresh()
        with torch.no_grad():
            fitted = super().real_weight()
        return fitted + (self.weight - self.weight.detach())  # the bracket is 0, its gradient 1

    def _unscaled(self, weight: Tensor) -> Tensor:
        return weight if self.CDSw is None else weight / self.CDSw[:, None, None, None]

    def _expand(self, kds: Tensor) -> Tensor:
        return expand_blocks(kds, self.intweight.shape[1], self.block_size)

    def _block_means(self, weight: Tensor) -> Tensor:
        """Return the mean of every block: (cho, chi, kh, kw) -> (cho, nblk, kh, kw); a short last block has its own
        count.
        """
        sums, counts = (to_blocks(v, self.block_size).sum(2) for v in (weight, torch.ones_like(weight)))
        return (sums / counts).reshape(self.alpha.shape)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refresh()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # pickle and deepcopy
        self.refresh()
        return self.__dict__

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        floats, integers = f"{prefix}weight" in state_dict, f"{prefix}intweight" in state_dict
        if integers and not floats:
            self.freeze_vqk()
        elif floats:
            self.thaw_vqk()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if floats and not integers:
            self.refit()
            ours = {f"{prefix}{name}" for name in ("intweight", *SHIFTS)}
            missing_keys[:] = [key for key in missing_keys if key not in ours]
