"""Accuracy of a small classifier by bits and block size, before and after its shifts are trained; writes
docs/classification.md.

    python benchmarks/classification.py

Needs the `bench` extra (scikit-learn's digits, which come with it: 1797 images of 8x8). The images get noise, as the
plain ones are classified without a fault whatever is done to the weights. For every seed another network is trained on
another two thirds of the images; accuracy is measured on the rest.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import cpu_name
from torch import Tensor, nn
from torch.nn import functional as F

from dsconvert.api.modules import ModulePlan, Rounded, quantize_module
from dsconvert.dsconv.modules import DSConv
from dsconvert.torch import DSConv as Trainable

BITS = (8, 7, 6, 5, 4, 3, 2)
BLOCKS = (1, 8, 32, 256)  # all of them at FEW bits and below, where blocks matter; else USUAL alone
FEW, USUAL = 4, 32
NOISE = 0.35  # of the range of a pixel
TRAIN, CALIBRATE, COPIES = 1200, 256, 4  # images; each test image is looked at with four noises
MARKER = "<!-- written by benchmarks/classification.py -->"
COLUMNS = {
    "plain": "weights alone", "trained": "shifts trained", "images": "fitted on images",
    "plain a8": "weights alone, 8-bit activations", "trained a8": "shifts trained, 8-bit activations",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A trained network, noisy images to adapt it on (n, 1, 8, 8), and images to judge it by with their digits."""

    net: nn.Module
    images: Tensor
    test: Tensor
    digits: Tensor

    def accuracy(self, net: nn.Module) -> float:
        """Percent of the test images classified right."""
        with torch.no_grad():
            return 100 * float((net.eval()(self.test).argmax(1) == self.digits).float().mean())


def network() -> nn.Sequential:
    """60 000 parameters, up to 256 channels, so that blocks of up to 256 differ."""
    rows = [(1, 16, 3, 1), (16, 32, 3, 2), (32, 256, 1, 1), (256, 32, 1, 1), (32, 256, 1, 1), (256, 32, 1, 1),
            (32, 64, 3, 2)]  # fmt: skip
    layers = [part for a, b, k, s in rows for part in (nn.Conv2d(a, b, k, s, k // 2), nn.BatchNorm2d(b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def prepare(seed: int, epochs: int = 12) -> Task:
    """Split, add noise, train."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images, digits = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16, torch.tensor(loaded.target)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=g)
    train, test = order[:TRAIN], order[TRAIN:]

    def noisy(chosen: Tensor) -> Tensor:
        return images[chosen] + NOISE * torch.randn(len(chosen), 1, 8, 8, generator=g)

    torch.manual_seed(seed)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for some in torch.randperm(TRAIN, generator=g).split(64):
            loss = F.cross_entropy(net(noisy(train[some])), digits[train[some]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    copies = test.repeat(COPIES)
    return Task(net.eval(), noisy(train), noisy(copies), digits[copies])


def trainable(made: nn.Module) -> nn.Module:
    """The converted network with its integers frozen and its shifts as parameters; all else stands still."""
    made = copy.deepcopy(made).requires_grad_(False)
    for name, layer in [(n, m) for n, m in made.named_modules() if type(m) is DSConv]:
        fresh = Trainable(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.padding_mode, False, layer.block_size, False, True,
        )  # fmt: skip
        fresh.load_state_dict(layer.state_dict())  # without a float weight: that freezes VQK
        made.set_submodule(name, fresh)
    return made


def train_shifts(task: Task, made: nn.Module, steps: int, seed: int, rate: float = 0.01) -> nn.Module:
    """The shifts after some steps towards the float network's outputs: no labels are used, nor is a weight changed.

    `rate` is Adam's, as a share of a parameter's mean size: alpha and CDSw differ a thousandfold."""
    net = trainable(made)
    parameters = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p], "lr": rate * max(float(p.detach().abs().mean()), 1e-3)} for p in parameters]
    optimizer = torch.optim.Adam(groups)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        wanted = task.net(task.images).softmax(1)
    for step in range(steps):
        some = torch.randint(len(task.images), (64,), generator=g)
        loss = F.cross_entropy(net(task.images[some]), wanted[some])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] *= 1 if step < steps / 2 else 0.5 ** (4 / steps)
        optimizer.step()
    return net.eval()


def without_rounding(made: nn.Module) -> nn.Module:
    """The same weights with float activations."""
    made = copy.deepcopy(made)
    for name, layer in [(n, m) for n, m in made.named_modules() if isinstance(m, Rounded)]:
        made.set_submodule(name, layer.layer)
    return made


def measure(task: Task, bits: int, block_size: int, steps: int, seed: int) -> dict[str, float]:
    """Accuracy of every column of the table, percent."""
    batches = list(task.images[:CALIBRATE].split(64))
    rounded = quantize_module(task.net, batches, ModulePlan(bits, block_size, 8, "least_squares"))
    plain = without_rounding(rounded)
    fitted = quantize_module(task.net, batches, ModulePlan(bits, block_size))
    nets: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: plain,
        "trained": lambda: train_shifts(task, plain, steps, seed),
        "images": lambda: fitted,
        "plain a8": lambda: rounded,
        "trained a8": lambda: train_shifts(task, rounded, steps, seed),
    }
    return {name: task.accuracy(make()) for name, make in nets.items()}


def table(found: dict[tuple[int, int], list[dict[str, float]]], floats: Sequence[float]) -> Iterable[str]:
    """Mean accuracy lost in points, and over seeds the standard deviation of that."""
    yield f"| bits | block | {' | '.join(COLUMNS.values())} |"
    yield "|---" * (2 + len(COLUMNS)) + "|"
    for (bits, block), runs in found.items():
        cells = []
        for name in COLUMNS:
            lost = [f - run[name] for f, run in zip(floats, runs, strict=True)]
            cells.append(f"{np.mean(lost):.1f} ± {np.std(lost, ddof=1) if len(lost) > 1 else 0:.1f}")
        yield f"| {bits} | {block} | {' | '.join(cells)} |"


def page(text: str, found: dict[tuple[int, int], list[dict[str, float]]], floats: Sequence[float], steps: int) -> str:
    """The document with what is below MARKER written anew."""
    kept = text.split(MARKER)[0].rstrip()
    spread = np.std(floats, ddof=1) if len(floats) > 1 else 0
    made = f"Points of accuracy lost, as the mean ± the standard deviation over {len(floats)} seeds:"
    below = (
        f"The float networks classify {np.mean(floats):.1f} ± {spread:.1f} % right. Scales are trained for {steps} "
        f"steps. Command: `{' '.join(['python', 'benchmarks/classification.py', *sys.argv[1:]])}`, on {cpu_name()}, "
        f"torch {torch.__version__}."
    )
    return "\n".join([kept, "", MARKER, "", made, "", *table(found, floats), "", below, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of shift training, 64 images each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/classification.md")
    given = parser.parse_args()
    tasks = [prepare(seed) for seed in range(given.seeds)]
    floats = [task.accuracy(task.net) for task in tasks]
    print("float", floats, flush=True)
    found = {}
    for bits, block in [(b, n) for b in BITS for n in BLOCKS if b <= FEW or n == USUAL]:
        found[bits, block] = [measure(t, bits, block, given.steps, s) for s, t in enumerate(tasks)]
        print(bits, block, found[bits, block], flush=True)
    text = given.out.read_text() if given.out.exists() else ""
    given.out.write_text(page(text, found, floats, given.steps))


if __name__ == "__main__":
    main()
