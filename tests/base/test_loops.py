"""The compiled loops against the torch code they come from, bit for bit; and what becomes of their machine code."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HANGS, ROOT
from followed import followed
from formats import fit_weight, free, gptq
from numba import njit
from reference import torch_loops as reference

from dsconvert.base import loops
from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.codes import trellis_search as trellis
from dsconvert.dsconv.codes.free import Free
from dsconvert.dsconv.codes.trellis import Trellis
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.gptq import fit_weight_gptq
from dsconvert.fit.moments import Moments, unfold, unfolded
from dsconvert.fit.seen import Seen
from dsconvert.graph.activations import activation_table
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import IntegerConv, QConv, integer_conv
from dsconvert.graph.ir import Node

LOOPS = ROOT / "dsconvert" / "base" / "loops.py"


@pytest.fixture
def threads():
    """1, 2, 3: so many has torch, and so the loops, while the number is at hand."""

    def each():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            yield count

    before = torch.get_num_threads()
    yield each()
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(columns: int, seed: int = 0) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a strongly correlated H (columns, columns)."""
    mix = randn(columns, 2 * columns, seed=seed) + 0.5 * randn(1, 2 * columns, seed=seed + 1)
    hessian = mix @ mix.T / columns + 0.1 * torch.eye(columns, dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("cho", "own", "ahead"), [(1, 8, 24), (7, 16, 24), (33, 32, 24), (5, 24, 0), (3, 40, 1), (2, 1, 0)]
)
def test_following_strings(threads, bits, cho, own, ahead):
    columns, upper = (6 * randn(cho, own + ahead)).float(), factor(own + ahead).float()
    most = min(3, 64 // int(trellis.table(bits).max()))
    suits = torch.randint(1, most + 1, (cho,), generator=torch.Generator().manual_seed(1)).float()
    tried = reference.around(suits, most)
    state = torch.randint(256 >> bits, (cho,), generator=torch.Generator().manual_seed(2))
    after = 1 + torch.arange(cho).float() % most
    given = (columns, upper, tried.float(), after, own, state)
    wanted = reference.follow(*given, reference.Trellis.of(bits))
    for _ in threads:
        for a, b in zip(followed(*given, bits), wanted, strict=True):
            assert same(a.contiguous(), b.contiguous())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (20, 5)])
def test_the_m_that_suits_a_block(threads, bits, shape):
    """From blocks far below the table of expected errors to blocks far above it."""
    rms = np.exp(4 * randn(*shape, seed=3).numpy())
    cds = np.exp(randn(shape[0], seed=4).numpy())
    wanted = reference.suited(rms, cds, bits)
    for _ in threads:
        for a, b in zip(trellis.suited(rms, cds, bits), wanted, strict=True):
            assert a.shape == b.shape == rms.shape
            assert a.tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("cho", "groups", "size"), [(1, 1, 8), (3, 2, 16), (33, 4, 32), (17, 9, 8)])
def test_rounding_strings(threads, bits, cho, groups, size):
    """Several groups, fewer and more output channels than go along the columns together."""
    target, upper = 6 * randn(cho, groups * size).numpy(), factor(groups * size).numpy()
    given = target, 0.5 + randn(cho, seed=5).abs().numpy(), upper, size, bits
    wanted = reference.round_strings(*given)
    for _ in threads:
        for a, b in zip(trellis.round_strings(*given), wanted, strict=True):
            assert same(a.contiguous(), b.contiguous())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 24), (6, 129)])
def test_nearest_strings(threads, bits, shape):
    values, m = (4 * randn(*shape)).float(), (1 + randn(*shape, seed=1).abs()).float()
    wanted = reference.nearest_values(values, m, reference.Trellis.of(bits))
    for _ in threads:
        assert all(map(same, trellis.nearest_values(values, m, trellis.Register.of(bits)), wanted))


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [
    ((1, 1), 1, 0, 1), ((3, 3), 1, 1, 1), ((3, 3), 2, 1, 1), ((3, 5), 2, 2, 2), ((6, 6), 2, 2, 1)
])  # fmt: skip
def test_gathering_columns(kernel, stride, padding, dilation):
    """At every position, around the edges too, and at some of them more than once."""
    node = Node("a", "conv", ("x",), {"stride": stride, "padding": padding, "dilation": dilation, "groups": 1})
    x = torch.randint(256, (3, 17, 19), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    high, wide = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip((17, 19), kernel, strict=True)
    )
    picks = torch.cat((torch.arange(high * wide), torch.tensor([3, 3, 0])))
    seen = Seen(x, torch.empty(0, len(picks)), picks, torch.ones(len(picks)), QParams(0.125, 77))
    size = 3 * kernel[0] * kernel[1]
    offset, root = randn(size).float(), randn(len(picks), seed=1).abs().float()
    found = torch.empty(size + 1, len(picks))
    unfold(node, kernel, seen, offset, root, found[:size])
    wanted = seen.real(unfolded(x, 77, kernel, node, picks)).sub_(offset[:, None]).mul_(root)
    assert same(found[:size].contiguous(), wanted)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("cho", "columns"), [(1, 1), (1, 16), (33, 8), (7, 31)])
def test_free_integers(threads, bits, cho, columns):
    w = randn(cho, columns + 3, seed=bits).numpy()[:, 1:-2]  # a view, as the fit has it
    cds, upper = 0.05 + randn(cho, seed=1).abs().numpy() / 9, factor(columns).numpy()
    wanted = reference.round_group(w, cds, upper, bits)
    for _ in threads:
        for a, b in zip(FREE.group(w, cds, upper, free(bits, 8)), wanted, strict=True):
            assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


WIDTHS = [
    (1, 8, True),
    (2, 16, True),
    (3, 32, True),
    (4, 8, True),
    *((b, s, False) for b in range(2, 9) for s in (3, 16)),
]


@pytest.mark.parametrize(("bits", "block", "along"), WIDTHS)
@pytest.mark.parametrize("shape", [(5, 16, 3, 3), (33, 32, 1, 1)])
def test_whole_layers(monkeypatch, threads, bits, block, along, shape):
    """The fit of a layer, its output channels each alone and in parts that make up for each other."""
    weight, size = randn(*shape).float(), shape[1] * shape[2] * shape[3]
    q = randn(size, 2 * size, seed=1)
    q[1:] += 0.7 * q[:-1]
    hessian = q @ q.T / (2 * size)
    moments = Moments(hessian, weight.double().flatten(1) @ hessian)
    mix = randn(shape[0], shape[0], seed=2)
    wanted = []
    for channels in (None, mix @ mix.T):
        with monkeypatch.context() as patched:
            patched.setattr(trellis, "nearest_values", _reference_nearest)
            slow = WeightFormat(bits, block, SlowTrellis() if along else SlowFree())
            wanted.append((channels, fit_weight_gptq(weight, moments, slow, channels)))
    for _ in threads:
        for channels, slowly in wanted:
            _assert_same(gptq(weight, moments, bits, block, channels, along), slowly)


class SlowFree(Free):
    """Free integers, rounded as before the loops were compiled."""

    def group(self, w, cds, upper, format):
        return reference.round_group(w, cds, upper, format.bits)


class SlowTrellis(Trellis):
    """Strings, rounded as before the loops were compiled."""

    def round(self, target, cds, upper, lengths, format):
        return reference.round_strings(target, cds, upper, lengths[0], format.bits)


def _reference_nearest(wanted, m, given):
    return reference.nearest_values(wanted, m, reference.Trellis.of(given.bits))


def _assert_same(a: DSTensor, b: DSTensor) -> None:
    assert same(a.vqk, b.vqk)
    assert same(a.m, b.m)
    assert same(a.cds_w, b.cds_w)
    assert same(a.stored, b.stored)


def test_several_python_threads_may_use_the_loops_at_once():
    """As an application may that converts two models."""
    w, cds, upper = randn(64, 16).numpy(), np.full(64, 0.1), factor(16).numpy()
    alone = FREE.group(w, cds, upper, free(4, 16))
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: FREE.group(w, cds, upper, free(4, 16)), range(40)):
            assert all(map(np.array_equal, made, alone))


@pytest.mark.parametrize("name", ["follow", "nearest_windows", "round_columns", "round_strings", "suit"])
def test_no_float_operations_are_joined_or_reordered(name):
    """LLVM may do either only where an operation is marked so. What comes from a cache cannot be looked at."""
    loop = getattr(loops, name)
    (text,) = njit(loop.signatures[0], nogil=True)(loop.py_func).inspect_llvm().values()
    floats = [line for line in text.splitlines() if re.search(r" = f(add|sub|mul|div)\b", line)]
    assert floats
    assert not [line for line in floats if re.search(r"\b(fast|contract|reassoc|arcp)\b", line)]
    assert ("llvm.fma" in text) == (name in ("follow", "round_strings"))


# What every run of it must print: integers, m and errors of a small group, and m of blocks.
SCRIPT = """
import hashlib
import numpy as np
import loops
rng = np.random.default_rng(0)
upper = np.triu(rng.random((24, 24))) + np.eye(24)
m, vqk, errors = np.empty(9), np.empty((9, 24)), np.empty((9, 24))
loops.round_columns(0, 9, rng.standard_normal((9, 24)), np.full(9, 0.1), upper, -4.0, 3.0, 15.0, m, vqk, errors)
found = hashlib.sha256(m.tobytes() + vqk.tobytes() + errors.tobytes())
m, errors = np.empty((9, 4)), np.empty((9, 4))
loops.suit(0, 9, rng.random((9, 4)), np.full(9, 0.1), 8, np.arange(1.0, 9), rng.random(8), m, errors)
found.update(m.tobytes() + errors.tobytes())
print(found.hexdigest(), *(sum(f.stats.cache_hits.values()) for f in (loops.suit, loops.round_columns)))
"""
QUICK = ("round_columns", "suit")  # by SCRIPT: the two that compile in a fraction of a second
# The same of strings, where products and sums are rounded once.
FUSED = """
import hashlib
import numpy as np
rng = np.random.default_rng(0)
upper = np.triu(rng.random((24, 24))) + np.eye(24)
columns, tried = 6 * rng.standard_normal((9, 24)), np.tile(np.arange(1, 4), (9, 1))
values, state = rng.integers(-9, 9, 256), np.zeros(9, np.int64)
m, windows = np.empty(9, np.float32), np.empty((9, 16), np.int64)
given = [x.astype(np.float32) for x in (columns, upper, tried, np.ones(9))]
loops.follow(0, 9, *given, 16, state, values.astype(np.float32), 2, m, windows)
found = hashlib.sha256(m.tobytes() + windows.tobytes()).hexdigest()
"""


def few_loops(names: tuple[str, ...]) -> str:
    """The loops' source with these alone, as others take seconds to compile."""
    tree = ast.parse(LOOPS.read_text())
    loops = {
        part.name: part
        for part in tree.body
        if isinstance(part, ast.FunctionDef) and any("compiled(" in ast.unparse(d) for d in part.decorator_list)
    }
    assert set(names) < set(loops)
    for name in set(loops) - set(names):
        tree.body.remove(loops[name])
    return ast.unparse(tree)


def started(
    folder: Path, script: str = SCRIPT, names: tuple[str, ...] = QUICK, **environment: str
) -> subprocess.Popen[str]:
    """The script beside a copy of these loops in that folder, its caches where the environment says."""
    folder.mkdir(exist_ok=True)
    if not (folder / "loops.py").exists():
        (folder / "loops.py").write_text(few_loops(names))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))}
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, env={**kept, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def printed(process: subprocess.Popen[str]) -> tuple[str, bool]:
    """What the script found, and whether its machine code came from a cache: of both loops, or of neither. It says
    nothing else."""
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    assert not err
    found, *hits = out.split()
    assert hits in (["0", "0"], ["1", "1"])
    return found, hits == ["1", "1"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with the loops and, beside them, their machine code; and what the script finds. Two processes made it at
    once."""
    folder = tmp_path_factory.mktemp("loops")
    both = [started(folder), started(folder)]
    first, second = map(printed, both)
    assert first[0] == second[0]
    return folder, first[0]


def test_machine_code_is_kept_beside_the_package(compiled):
    folder, found = compiled
    assert list((folder / "__pycache__").glob("*.nbc"))
    assert printed(started(folder)) == (found, True)


@pytest.mark.parametrize(("ending", "damages"), [("nbi", (b"", b"garbage")), ("nbc", (b"garbage", None))])
def test_damaged_machine_code_is_made_anew(compiled, tmp_path, ending, damages):
    """Each of the two loops in a way of its own; None: half of the file is gone."""
    folder, found = compiled
    copy = shutil.copytree(folder, tmp_path / "copy")  # keeps the source's time, which the cache goes by
    files = list((copy / "__pycache__").glob(f"*.{ending}"))
    for file, damage in zip(files, damages, strict=True):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert printed(started(copy)) == (found, False)
    assert printed(started(copy)) == (found, True)  # and kept again


def test_nowhere_to_keep_machine_code(compiled, tmp_path):
    """A folder that is a file cannot be written, not even by root."""
    (tmp_path / "loops").mkdir()
    (tmp_path / "loops" / "__pycache__").write_text("")
    nowhere = {"HOME": "/dev/null/nonexistent", "XDG_CACHE_HOME": "/dev/null/nonexistent"}
    assert printed(started(tmp_path / "loops", **nowhere)) == (compiled[1], False)
    assert [p.name for p in (tmp_path / "loops").iterdir() if p.suffix != ".py"] == ["__pycache__"]


def test_machine_code_goes_where_it_is_told(compiled, tmp_path):
    found = compiled[1]
    told = {"NUMBA_CACHE_DIR": str(tmp_path / "told")}
    assert printed(started(tmp_path / "loops", **told)) == (found, False)
    assert list((tmp_path / "told").rglob("*.nbc"))
    assert not (tmp_path / "loops" / "__pycache__").exists() or not list(tmp_path.glob("loops/__pycache__/*.nb?"))
    assert printed(started(tmp_path / "loops", **told)) == (found, True)


def test_a_cpu_without_fused_instructions_finds_the_same(tmp_path):
    here: dict[str, object] = {"loops": loops}
    exec(FUSED, here)
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    script = f"import loops\n{FUSED}\nprint(found, 0, 0)"
    assert printed(started(tmp_path / "loops", script, ("follow",), **plain))[0] == here["found"]


def test_numba_is_loaded_only_by_a_fit():
    names = ("commands.cli", "api.models", "fit.gptq", "scoring.compare")
    lines = (
        f"import dsconvert.{name}; assert not {{'numba', 'llvmlite'}} & set(sys.modules), '{name}'" for name in names
    )
    subprocess.run([sys.executable, "-c", "\n".join(("import sys", *lines))], check=True, cwd=ROOT, timeout=HANGS)


@pytest.mark.parametrize("kind", [None, "SiLU", "ReLU", "LeakyReLU", "Hardswish"])
def test_a_convolution_and_its_activation_in_one_pass_are_the_two(kind):
    """Bit for bit, with ties, sums beyond both ends of the grid and negative zero among them."""
    source, target, behind = QParams(0.02, 3), QParams(0.05, 117), QParams(0.031, 20)
    node = Node("conv", "c", ("x",), {"stride": 1, "padding": 1, "dilation": 1, "groups": 1})
    weight = fit_weight(randn(6, 4, 3, 3), 4, 4)
    conv = QConv(weight, 4 * randn(6, seed=1))
    q = torch.randint(0, 256, (1, 4, 9, 7), generator=torch.Generator().manual_seed(2))
    ready = IntegerConv.of(node, conv, source, target, "cpu")
    assert torch.equal(ready.integers(q), integer_conv(node, q, conv, source, target))
    table = np.arange(256, dtype=np.uint8) if kind is None else activation_table(kind, target, behind)
    wanted = torch.from_numpy(table)[ready.integers(q)[0].int()]
    sums = ready.sums(q)[0].flatten(1).numpy()
    made = np.empty(sums.shape, np.uint8)
    loops.requantize(sums, ready.multiplier.numpy(), float(target.zero_point), table, made)
    assert np.array_equal(made, wanted.flatten(1).numpy())
    halves = np.array([[-0.5, 0.5, 1.5, 2.5, -1.5, -0.0, 1e9, -1e9]], np.float32)
    found = np.empty((1, 8), np.uint8)
    loops.requantize(halves, np.ones(1, np.float32), 10.0, np.arange(256, dtype=np.uint8), found)
    assert found.tolist() == [[10, 10, 12, 12, 8, 10, 255, 0]]
