"""DSConv with the paper's integer arithmetic (see `bfp`), compiled: faster than float convolution, and as exact as the
reference in numpy. For x86 CPUs with AVX2, one image and one thread at a time; activations are rounded to 8-bit block
floating point in it.

    with tempfile.TemporaryDirectory() as folder:
        layer = Kernel(compiled(Path(folder)), vqk, alpha)
        out = layer(image)                # (h, w, chi) -> (h', w', cho), before CDSw and CDSb
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError

BLOCK, LANES = 32, 16  # input channels that share a shift and an exponent; output channels computed at once
CPUINFO = Path("/proc/cpuinfo")
Library = ctypes.CDLL


def compiled(folder: Path) -> Library:
    """Compile it into the folder with g++, in a second. Raises InputError where there is no g++, or no AVX2."""
    flags = CPUINFO.read_text().split() if CPUINFO.is_file() else []
    if not {"avx2", "fma"} <= set(flags):
        raise InputError("The compiled kernel needs an x86 CPU with AVX2 and FMA.")
    made = folder / "kernel.so"
    source = Path(__file__).with_name("kernel.cpp")
    options = ["-O3", "-mavx2", "-mfma", "-shared", "-fPIC", "-std=c++17"]
    try:
        subprocess.run(["g++", *options, str(source), "-o", str(made)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise InputError("The compiled kernel needs a C++ compiler: install g++.") from None
    return Library(str(made))


def _at(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@dataclass(frozen=True)
class Kernel:
    """One layer ready to run: vqk int8 (cho, chi, k, k) of up to 4 bits, alpha (cho, chi / 32, k, k); stride 1 or more.

    Raises ValueError for channels that are not whole blocks, and for VQK beyond 4 bits."""

    library: Library
    vqk: NDArray[np.int8]
    alpha: NDArray[np.float32]
    stride: int = 1

    def __post_init__(self) -> None:
        cho, chi, k, _ = self.vqk.shape
        if cho % LANES or chi % BLOCK or self.vqk.min() < -8 or self.vqk.max() > 7:
            raise ValueError("the kernel takes 4-bit VQK, output channels by 16 and input channels by 32")
        tiles, blocks = cho // LANES, chi // BLOCK
        pairs = self.vqk.reshape(tiles, LANES, blocks, BLOCK // 2, 2, k, k).transpose(0, 5, 6, 2, 3, 1, 4)
        alpha = self.alpha.reshape(tiles, LANES, blocks, k, k).transpose(0, 3, 4, 2, 1)
        sums = -128 * pairs.astype(np.int32).sum((4, 6))
        object.__setattr__(self, "pairs", np.ascontiguousarray(pairs))
        object.__setattr__(self, "scales", np.ascontiguousarray(alpha, np.float32))
        object.__setattr__(self, "start", np.ascontiguousarray(sums.astype(np.uint32).astype(np.uint16)))

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(h, w, chi) -> (h', w', cho), with the padding that keeps the side at stride 1."""
        parts = vars(self)
        cho, chi, k, _ = self.vqk.shape
        (h, w, _), pad = x.shape, k // 2
        high, wide = h + 2 * pad, w + 2 * pad
        mantissa = np.empty((high, wide, chi), np.uint8)
        step = np.empty((high, wide, chi // BLOCK), np.float32)
        out = np.empty(((high - k) // self.stride + 1, (wide - k) // self.stride + 1, cho), np.float32)
        self.library.to_block_float(_at(x), h, w, chi, pad, _at(mantissa), _at(step))
        self.library.dsconv(
            _at(mantissa), _at(step), _at(parts["pairs"]), _at(parts["scales"]), _at(parts["start"]), high, wide, chi,
            cho, k, self.stride, _at(out),
        )  # fmt: skip
        return out
