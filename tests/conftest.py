"""Small networks and images every test file may use."""

from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import pytest
import torch
from formats import fit_weight, fit_weight_real
from hypothesis import settings
from pt_writer import yolov5_bytes
from watching import watch

from dsconvert.base.kept import Room
from dsconvert.base.size import Size
from dsconvert.commands.cli import main
from dsconvert.dsconv.codes import TRELLIS, usual_format
from dsconvert.dsconv.codes.trellis_table import fits
from dsconvert.fit.layer import fit_cds
from dsconvert.fit.lockstep import fit_lockstep
from dsconvert.graph.integer import QConv
from dsconvert.measure import calibration
from dsconvert.measure.grids import choose_grids
from dsconvert.measure.importance import measure_importance
from dsconvert.model.model import DSModel
from dsconvert.scoring.latency import interleaved_latency
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.network import Head, Network, head_from_detect

# the same examples every time, so that a failure is the change's; `--hypothesis-profile=default` looks for others
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # each process of `pytest -n 2` keeps to one core, and what it starts too: torch's threads starve each other
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)

    class OneThread(ort.SessionOptions):
        """ONNX Runtime's options, of one thread too: by itself it adds one, and each spins where the other works."""

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    class OneThreadSession(ort.InferenceSession):
        """A session that has one thread unless its options say otherwise."""

        def __init__(self, model: object, sess_options: object = None, *rest: object, **named: object) -> None:
            super().__init__(model, sess_options or OneThread(), *rest, **named)

    ort.SessionOptions, ort.InferenceSession = OneThread, OneThreadSession

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
DEMO = ROOT / "calib" / "demo"
# processes that tests start run this tree's dsconvert, whatever else is installed
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
SIDE = 64  # pixels, of `picture` and `converted`
# No clock decides whether a test passes, as the machine may be busy: only what hangs is ended, and no process that a
# test starts takes half an hour anywhere.
HANGS = 1800  # seconds
# Exit codes of an interrupted command, a shell's 130 both: Python ends by the signal itself where it came while a
# library ran Python from C.
INTERRUPTED = (130, -signal.SIGINT)
# What a shell starts in the background ignores an interrupt, and so does every process that it starts: tests that send
# one would wait for ever.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _usual)

# Two C3 blocks (one with a residual), an SPPF, an upsampling and a concatenation, two detection levels.
TINY = {
    "nc": 2,
    "depth_multiple": 0.33,
    "width_multiple": 0.25,
    "backbone": [
        [-1, 1, "Conv", [32, 6, 2, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 3, "C3", [64]],
        [-1, 1, "Conv", [160, 3, 2]],
        [-1, 1, "SPPF", [160, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 3, "C3", [96, False]],
        [[7, 4], 1, "Detect", ["nc", "anchors"]],
    ],
}


# The least that can be converted: quantized in a second.
SMALL = {
    "nc": 2, "depth_multiple": 0.33, "width_multiple": 0.25,
    "backbone": [[-1, 1, "Conv", [32, 3, 2]], [-1, 3, "C3", [32]]], "head": [[[1], 1, "Detect", ["nc", "anchors"]]],
}  # fmt: skip


def write_work(folder: Path, tiny: tuple[Network, Head], pictures: int) -> Path:
    """best.pt and so many random pictures in images/; returns the folder."""
    (folder / "best.pt").write_bytes(yolov5_bytes(*tiny))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(pictures):
        cv2.imwrite(str(folder / f"images/{i}.png"), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return folder


def randomise(network: Network, seed: int = 0) -> None:
    """Weights, BatchNorm statistics and anchors as unlike their defaults as a trained network's."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.rand(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise)
        elif value.dim() == 1:
            value.copy_((0.8 + 0.4 * noise) if "bn.weight" in name else noise - 0.5)
        elif name.endswith("anchors"):
            value.copy_(1 + 4 * noise)
        else:
            fan_in = value[0].numel()
            # linear layers, which are attention's, have no activation behind them; large values make its softmax a step
            gain = 2 if value.dim() > 2 else 0.5
            value.copy_(torch.randn(value.shape, generator=generator) * (gain / fan_in) ** 0.5)


def pytest_collection_finish() -> None:
    """Thousands of tests and their modules live to the end. The product collects garbage before it loads a file, and
    would look through all of them each time: a large part of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def quickly_timed() -> Iterator[tuple[object, ...] | None]:
    """`eval` and `report` run each model 33 times for its latency; five times take the same way. Gives the defaults."""
    usual = interleaved_latency.__defaults__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleaved_latency, "__defaults__", (4, 1, 60.0))
        yield usual


@pytest.fixture(autouse=True, scope="session")
def quickly_synthesised() -> Iterator[None]:
    """Most tests convert on four pictures, and so with synthesised ones beside them: 96, which take seconds to become
    any good, and seconds more to be looked at. Eight poor ones take the same way; tests that count them say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "SYNTHETIC_STEPS", 2)
        patch.setattr(calibration, "SYNTHETIC_IMAGES", 4)
        yield


# the same for a process that a test starts: the beginning of its script
QUICKLY = "from dsconvert.measure import calibration; calibration.SYNTHETIC_STEPS, calibration.SYNTHETIC_IMAGES = 2, 4"


def tiny_network() -> tuple[Network, Head]:
    """A random two-level network of 12 convolutions and its head."""
    network = Network(TINY, nc=2, na=3).eval()
    randomise(network)
    network.requires_grad_(False)
    return network, head_from_detect(network.detect, [4, 8], ["cat", "dog"])


def small_network() -> tuple[Network, Head]:
    """A random network of one level and six convolutions, and its head."""
    network = Network(SMALL, nc=2, na=3).eval()
    randomise(network)
    network.requires_grad_(False)
    return network, head_from_detect(network.detect, [2], ["cat", "dog"])


@pytest.fixture
def folder(tiny: tuple[Network, Head], tmp_path: Path) -> Path:
    """best.pt and three pictures."""
    return write_work(tmp_path, tiny, 3)


@pytest.fixture
def small(folder: Path) -> None:
    """A smaller best.pt, for tests that ask no more than whether work is done again, or refused."""
    (folder / "best.pt").write_bytes(yolov5_bytes(*small_network()))


@pytest.fixture
def tiny() -> tuple[Network, Head]:
    """The network of `tiny_network`."""
    return tiny_network()


def smooth_picture() -> torch.Tensor:
    """One image (1, 3, 64, 64) on the 8-bit grid: smooth colour with some grain."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    grain = torch.rand(1, 3, 64, 64, generator=generator)
    return ((0.8 * smooth + 0.2 * grain) * 255).round() / 255


@pytest.fixture
def picture() -> torch.Tensor:
    """The image of `smooth_picture`."""
    return smooth_picture()


def grids_of(graph, params, batches) -> dict:
    """Activation grids of a graph, every sigmoid of its outputs equally important."""
    singles = [image for batch in batches for image in batch.split(1)]
    found = measure_importance(graph, params, singles, lambda raw, _: [t.sigmoid() for t in raw], 0)
    return choose_grids(graph, found.samples, found.clipping, 0)


class Called:
    """A fit that asks a function for a layer, or for its weight alone."""

    def __init__(self, function):
        self.function = function

    def layer(self, node, weight, format, batches):
        made = self.function(node, weight, batches())
        return made if isinstance(made, QConv) else fit_cds(node, made, batches())


def lockstep(graph, params, fit, own, batches, progress=None, room=None, formats=None):
    """`fit_lockstep` on batches (n, 3, h, w) 0..1 of whole bytes, every position counting the same."""
    images = [image for batch in batches for image in batch]
    room = room or Room()
    pixels = room.kept(len(images), images[0].shape, torch.uint8)
    for index, image in enumerate(images):
        pixels.put(index, (image * 255).round().to(torch.uint8))
    drawn = watch(graph, params, [pixels.get(i).float() / 255 for i in range(len(images))], 0, room)
    chosen = fit if hasattr(fit, "layer") else Called(fit)
    formats = formats or {name: usual_format(8, p.weight.shape[1], 0) for name, p in params.items()}
    return fit_lockstep(
        graph,
        params,
        chosen,
        formats,
        own,
        pixels,
        drawn,
        len(images),
        room,
        progress=progress,
    )


@pytest.fixture(scope="session")
def converted_once() -> DSModel:
    """For `converted`, which takes a quarter of a second to make, and hundreds of tests use."""
    return convert(*tiny_network(), smooth_picture())


@pytest.fixture
def converted(converted_once) -> DSModel:
    """The tiny network as `convert` makes it; a copy that a test may change."""
    return copy.deepcopy(converted_once)


def convert(network: Network, head: Head, picture: torch.Tensor) -> DSModel:
    """A network at 4 bits in blocks of 16, its stem and Detect at 8."""
    graph, params = split_detect(*lower(network.fused()), head)
    batches = [picture, picture.flip(3)]
    own = grids_of(graph, params, batches)
    plain = {graph.convs()[0].name, *graph.outputs}
    weights = {
        name: fit_weight(p.weight, 8, p.weight.shape[1]) if name in plain else fit_weight(p.weight, 4, 16)
        for name, p in params.items()
    }
    convs = lockstep(graph, params, lambda node, weight, seen: weights[node.name], own, batches)
    return DSModel(graph, convs, own, head, Size.of(SIDE), {})


def by_quads(weight: np.ndarray) -> np.ndarray:
    """A kernel (cho, 3, 6, 6) at every second pixel as layout packed has it: of two outputs side by side, on pixels
    that are two rows of four: (2 cho, 2 rows * 3 * 4 columns, 3, 2)."""
    sides = []
    for first in (0, 2):
        made = np.zeros((len(weight), 2, weight.shape[1], 4, 3, 2), weight.dtype)
        for row in range(6):
            for column in range(first, first + 6):
                made[:, row % 2, :, column % 4, row // 2, column // 4] = weight[:, :, row, column - first]
        sides.append(made.reshape(len(weight), -1, 3, 2))
    return np.concatenate(sides)


def write_pictures(folder: Path) -> None:
    """Four labelled pictures and data.yaml."""
    for kind in ("images", "labels"):
        (folder / kind / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (100, 80))
        cv2.imwrite(str(folder / "images" / "val" / f"{i}.jpg"), picture)
        (folder / "labels" / "val" / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    (folder / "data.yaml").write_text("path: .\nval: images/val\nnames: [cat, dog]\n")


@pytest.fixture
def work(tiny, tmp_path) -> Path:
    """A folder with best.pt, four labelled pictures and data.yaml."""
    network, head = tiny
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(network, head))
    write_pictures(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys, monkeypatch) -> Callable[..., Answer]:
    """Run a command as `dsconvert ARGS` in a folder would, but in this process: seconds faster."""

    def run(*args: str | Path, cwd: Path) -> Answer:
        monkeypatch.chdir(cwd)
        code: object = 0
        try:
            main([str(a) for a in args])
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        assert isinstance(code, int)
        return Answer(code, shown.out, shown.err)

    return run


def _widened(conv: QConv, index: int) -> QConv:
    """DSConv layers at 2, 3, 4, ... 8 bits in turn, the first of 2, 3 and 4 bits along a
    trellis; small enough that no engine saturates."""
    if conv.weight.is_plain_int8:
        return replace(conv, weight=replace(conv.weight, stored=conv.weight.stored // 2))
    along = index < 8 and fits(2 + index % 7, conv.weight.vqk.shape[1], 16)
    fitted = fit_weight(conv.weight.weight(), 2 + index % 7, 16, along)
    stored = fitted.stored // (1 if fitted.bits < 7 else 2)
    m = (fitted.m // 2).clamp_min(1)
    shrink = replace(fitted, m=m, stored=stored)
    return replace(conv, weight=shrink)


def widen(model: DSModel) -> DSModel:
    """The tiny network with every width from 2 to 8 bits in it."""
    convs = {name: _widened(conv, i) for i, (name, conv) in enumerate(model.convs.items())}
    assert {c.weight.bits for c in convs.values()} == set(range(2, 9))
    kinds = {(c.weight.bits, c.weight.format.code == TRELLIS) for c in convs.values()}
    assert kinds >= {(bits, along) for bits in (2, 3, 4) for along in (True, False)}
    return replace(model, convs=convs)


def with_real_shifts(model: DSModel) -> DSModel:
    """The model with the paper's real shifts where it has DSConv, its activations float."""
    convs = {
        name: conv if conv.weight.bits == 8 else QConv(fit_weight_real(conv.weight.weight(), 4, 16), conv.bias)
        for name, conv in model.convs.items()
    }
    return replace(model, convs=convs, activations={})


@pytest.fixture
def widened(converted) -> DSModel:
    """The network of `converted`, see `widen`."""
    return widen(converted)
