"""What runs leave for later runs, with one thing wrong: a cache is made again, an unfinished run is refused in one
sentence. Neither ends in a traceback or, worse, in another model."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from case import SHARES
from conftest import write_work
from fuzz_damage import resealed
from modelfiles import Opened, floats, put

from dsconvert.base.errors import InputError
from dsconvert.convert import quantize as pipeline
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.resume import META as UNFINISHED_META
from dsconvert.convert.resume import read_unfinished
from dsconvert.measure.cache import META as CACHE_META
from dsconvert.measure.cache import calibration_bytes, remembered
from dsconvert.tune.state import META as STATE_META
from dsconvert.tune.state import State, read_state, write_state
from dsconvert.yolo.checkpoint import load_checkpoint

Change = Callable[[Opened], Any]
LAYER = "model.2.cv1.conv"
CONTAINERS = {"empty": b"", "text": b"hello", "length 2^63": b"\xff" * 7 + b"\x7f{}"}
# what changes of CDSw, and Adam's moments, cannot be; a factor of exp(100) leaves float32
BAD = {"latents": (100.0, -100.0), "average": (100.0,), "best": (100.0,), "first": (float("inf"),), "second": (-1.0,)}
TEXTS = ("[" * 200_000, "5", "null", "[]", "{}", "1" * 5000)


def retyped(name: str, kind: str) -> Change:
    return lambda m: m.tensors[name].__setitem__(0, kind)


def reshaped(name: str, shape: list[int]) -> Change:
    return lambda m: m.tensors[name].__setitem__(1, shape)


def missing(name: str) -> Change:
    return lambda m: m.tensors.pop(name)


def renamed(old: str, new: str) -> Change:
    return lambda m: m.tensors.__setitem__(new, m.tensors.pop(old))


@pytest.fixture
def run(tiny, tmp_path) -> Callable[..., None]:
    """Quantize the tiny network."""
    folder = write_work(tmp_path, tiny, 3)
    options = QuantizeOptions(calib=folder / "images", imgsz=64)
    checkpoint = load_checkpoint(folder / "best.pt")
    return lambda **also: quantize(checkpoint, options, **also)


def damaged(good: bytes, key: str, changes: dict[str, Change]) -> dict[str, bytes]:
    """The file with each thing wrong, by what, and with a digest that is right (see `flips` for one that is not)."""
    files = {**CONTAINERS, "half": good[: len(good) // 2]}
    for text in TEXTS:
        files[f"header {text[:4]}"] = resealed(Opened(good, key).bytes(text), key)
    for what, change in changes.items():
        opened = Opened(good, key)
        change(opened)
        files[what] = resealed(opened.bytes(), key)
    return files


def flips(good: bytes) -> list[bytes]:
    """One bit the other way: the least of a byte at 40 places of the numbers, where what is left is plausible, and any
    at 80 places of the whole file."""
    (length,) = struct.unpack("<Q", good[:8])
    turned = [(place, 0) for place in np.linspace(8 + length, len(good) - 1, 40).astype(int)]
    turned += [(place, i % 8) for i, place in enumerate(np.linspace(0, len(good) - 1, 80).astype(int))]
    files = []
    for place, bit in turned:
        file = bytearray(good)
        file[place] ^= 1 << bit
        files.append(bytes(file))
    return files


@pytest.mark.parametrize("share", SHARES)
def test_a_damaged_calibration_is_made_again(run, tmp_path, monkeypatch, share):
    given: list[Any] = []
    monkeypatch.setattr(pipeline, "remembered", lambda *all_of_it: given.append(all_of_it) or remembered(*all_of_it))
    run(cache=tmp_path / "kept")
    (folder, key, make, check, room) = given[0]
    path: Path = folder / f"{key}.safetensors"
    good = path.read_bytes()
    once = make()
    assert calibration_bytes(once) == good
    made: list[int] = []

    def again() -> Any:
        made.append(1)
        return once

    def read() -> bool:
        """True when the file was not made again."""
        made.clear()
        remembered(folder, key, again, check, room)
        return not made

    assert read()
    picks, positions, channels = (f"{kind}/{LAYER}" for kind in ("picks", "weights", "channels"))
    shape = Opened(good, CACHE_META).tensors[positions][1]
    changes: dict[str, Change] = {
        **{f"grid {g}": put(g, "own", LAYER) for g in ([0, 0], [-1, 0], [1e40, 0], [0.1, 256], [0.1, 1e400],
           [float("nan"), 0], ["a", 0], [0.1], 5, None)},
        "a grid missing": lambda m: m.json["own"].pop(LAYER),
        "a grid too many": put([0.1, 0], "own", "x"),
        **{f"damage {d}": put([[4, 16, "free", d]], "damage", LAYER)
           for d in (-1, float("nan"), float("inf"), "x", None)},
        "a width missing": lambda m: m.json["damage"][LAYER].pop(),
        "a width too many": lambda m: m.json["damage"][LAYER].append([7, 16, "free", 0.1]),
        "a width of infinity": lambda m: m.json["damage"][LAYER].append([1e400, 16, "free", 0.1]),
        "a layer without widths": lambda m: m.json["damage"].pop(LAYER),
        "own a list": put([], "own"), "damage a text": put("x", "damage"),
        **{f"{name} {v}": floats(name, v) for name in (positions, channels)
           for v in (-1.0, float("nan"), float("inf"))},
        **{f"{name} of another kind": retyped(name, "I32") for name in (positions, channels)},
        "picks of another kind": retyped(picks, "F32"),
        **{f"{name} missing": missing(name) for name in (picks, positions, channels)},
        **{f"{name} of another layer": renamed(name, f"{name}x") for name in (picks, positions, channels)},
        "an even layer of no name": put("x", "even"),
        "positions of another shape": reshaped(positions, shape[::-1]),
        "a tensor of no kind": renamed(positions, LAYER), "a tensor of another kind": renamed(positions, f"x/{LAYER}"),
    }  # fmt: skip
    files = damaged(good, CACHE_META, changes)
    for what, data in [*files.items(), *enumerate(flips(good))][::share]:
        path.write_bytes(data)
        assert not read(), what
        assert path.read_bytes() == good, what


@pytest.mark.parametrize("share", SHARES)
def test_a_damaged_unfinished_run_is_one_sentence(run, tmp_path, share):
    path = tmp_path / "unfinished.safetensors"
    result = run(unfinished=path)
    good = path.read_bytes()
    key = Opened(good, UNFINISHED_META).json["key"]
    shapes = {name: conv.weight.stored.shape for name, conv in result.model.convs.items()}
    assert set(read_unfinished(path, key, shapes)) == set(shapes)
    stored = f"{LAYER}.stored"
    shape = Opened(good, UNFINISHED_META).tensors[stored][1]
    changes: dict[str, Change] = {
        **{f"width {w}": put(w, "layers", LAYER) for w in ([4], [4, 16], [0, 16, "free"], [64, 16, "free"],
           [4, 0, "free"], [1e400, 16, "free"], [4, 1e400, "free"], ["4", {}, "free"], [4, 16, "trellis"],
           [4, 16, "nothing"], [4, 16, None], 5, None)},
        "layers a text": put("x", "layers"), "an unknown layer": put([8, 16, "free"], "layers", "x"),
        **{f"{part} {v}": floats(f"{LAYER}.{part}", v) for part in ("cdsw", "cdsb")
           for v in (float("nan"), float("-inf"))},
        **{f"{part} of another kind": retyped(f"{LAYER}.{part}", "I32") for part in ("cdsw", "cdsb")},
        "VQK of another kind": retyped(stored, "U8"),
        "m of another kind": retyped(f"{LAYER}.m", "U8"),
        "VQK of another shape": reshaped(stored, [shape[1], shape[0], *shape[2:]]),
        "VQK of the fewest dimensions": reshaped(stored, [int(np.prod(shape))]),
        **{f"{part} missing": missing(f"{LAYER}.{part}") for part in ("stored", "m", "cdsw", "cdsb")},
    }  # fmt: skip
    files = damaged(good, UNFINISHED_META, changes)
    for what, data in [*files.items(), *enumerate(flips(good))][::share]:
        path.write_bytes(data)
        assert (
            refusal(lambda: read_unfinished(path, key, shapes)) == f"{path} is damaged; start again without resume."
        ), what


def refusal(read: Callable[[], Any]) -> str | None:
    """Why a stopped run is not taken up."""
    try:
        read()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("share", SHARES)
def test_a_damaged_finetune_is_one_sentence(tmp_path, share):
    path = tmp_path / "finetuning.safetensors"
    like = {f"{LAYER}.{part}": torch.zeros(8) for part in ("cdsw", "cdsb")}
    state = State.new({name: v.clone().requires_grad_() for name, v in like.items()})
    state.log += [{"map50_95": 0.5}, {"map50_95": 0.625, "loss": 1.5}]
    write_state(path, "key", state)
    good = path.read_bytes()
    assert read_state(path, "key", like).log == state.log
    first = f"first/{LAYER}.cdsw"
    changes: dict[str, Change] = {
        **{f"steps {s}": put(s, "steps") for s in (1e400, "x", None, [1], -1)},
        **{f"log {v}": put(v, "log") for v in (5, [], [5], [{}], [{"map50_95": "x"}], [{"map50_95": 1e400}],
           [{"map50_95": 2}], [{"map50_95": 0.5}] * 2, [{"map50_95": 0.5, "loss": 1.0}])},
        **{f"{n} {v}": floats(f"{n}/{LAYER}.cdsw", v) for n, values in BAD.items() for v in (float("nan"), *values)},
        "latents of another kind": retyped(f"latents/{LAYER}.cdsw", "I32"),
        "moments of another kind": retyped(first, "I32"),
        "another key's place": lambda m: m.json.pop("key"),
        "moments missing": missing(first), "moments of another shape": reshaped(first, [2, 4]),
    }  # fmt: skip
    for what, data in [*damaged(good, STATE_META, changes).items(), *enumerate(flips(good))][::share]:
        path.write_bytes(data)
        refused = refusal(lambda: read_state(path, "key", like))
        assert refused == f"{path} is damaged; start again without resume.", what
