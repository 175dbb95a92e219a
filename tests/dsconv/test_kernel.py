"""The compiled kernel computes what the reference in numpy does."""

from __future__ import annotations

import shutil
from pathlib import Path

import kernel
import kernel_speed as bench
import numpy as np
import pytest
import torch
from bfp import integer_dsconv, to_block_float

from dsconvert.base.errors import InputError

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not {"avx2", "fma"} <= set(FLAGS.split()), reason="there is no g++, or no AVX2"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return kernel.compiled(tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize(
    ("chi", "cho", "k", "side", "stride"), [(32, 16, 1, 5, 1), (64, 32, 3, 7, 1), (96, 16, 3, 8, 2)]
)
def test_the_kernel_is_the_reference(library, chi, cho, k, side, stride):
    """The integers are the same, so only the order of float32 sums over blocks and taps may differ."""
    vqk, alpha, x = bench.drawn(chi, cho, k, side)
    x[0, 0] = 0  # a block of zeros has no exponent
    x[1, 1] *= 1e-6
    found = kernel.Kernel(library, vqk, alpha, stride)(x)
    image = to_block_float(torch.from_numpy(x).permute(2, 0, 1)[None], 8)
    wanted = integer_dsconv(image, vqk, alpha.astype(np.float64), stride, k // 2)[0].transpose(1, 2, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_the_largest_sums_do_not_overflow(library):
    """Every VQK -8, every mantissa -127 or 127: 32 * 8 * 127 in 16 bits."""
    alpha = np.ones((16, 1, 1, 1), np.float32)
    for sign in (1, -1):
        x = np.full((2, 5, 32), sign * 127, np.float32)
        for value in (-8, 7):
            found = kernel.Kernel(library, np.full((16, 32, 1, 1), value, np.int8), alpha)(x)
            assert (found == 32 * value * sign * 127).all()


def test_what_it_cannot_run_is_refused(library):
    for shape, value in (((16, 33, 1, 1), 0), ((15, 32, 1, 1), 0), ((16, 32, 1, 1), 8)):
        with pytest.raises(ValueError, match="4-bit"):
            kernel.Kernel(library, np.full(shape, value, np.int8), np.ones((shape[0], 1, 1, 1), np.float32))


def test_everything_that_is_timed_computes_one_convolution(library):
    layer = (32, 16, 3, 6)
    found = {name: once() for name, once in bench.rivals(library, layer).items()}
    exact = found["torch float"][0].numpy()
    np.testing.assert_allclose(found["torch float, channels last"][0].numpy(), exact, atol=1e-4)
    np.testing.assert_allclose(found["ONNX Runtime float"][0][0], exact, atol=1e-4)
    for name in ("DSConv", "ONNX Runtime int8"):
        other = found[name].transpose(2, 0, 1) if name == "DSConv" else found[name][0][0]
        assert np.abs(other - exact).mean() < 0.05 * np.abs(exact).mean()
    assert all(v > 0 for v in bench.times({"a": lambda: sum(range(10**5))}, 2).values())


def test_without_a_compiler_or_avx2_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="install g"):
        kernel.compiled(tmp_path)
    monkeypatch.setattr(kernel, "CPUINFO", tmp_path / "none")
    with pytest.raises(InputError, match="AVX2"):
        kernel.compiled(tmp_path)
