"""Run inside a YOLOv5 or YOLOv7 tree (it is the current folder and on the path), in a process of its own.

    python in_yolo_tree.py build IMAGE OUT CFG...    each CFG's model with random numbers -> OUT/NAME.pt, as the trees
                                                     save checkpoints, and OUT/NAME.maps.pt, what it gives for the image
    python in_yolo_tree.py load IMAGE OUT PT...      each checkpoint as the tree loads it -> OUT/NAME.maps.pt
    python in_yolo_tree.py train IMAGE OUT CFG       DSConv2D_C3 rows: built, trained by the tree's loss, saved, loaded

Nothing of a tree is copied here: its modules are imported and called."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from models import yolo


def randomise(model: torch.nn.Module) -> None:
    """Weights and BatchNorm statistics as unlike their defaults as a trained network's; maps of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value, low in ((module.running_var, 0.5), (module.weight, 0.6), (module.running_mean, -0.5),
                               (module.bias, -0.5)):  # fmt: skip
                value.data.copy_(low + torch.rand(value.shape, generator=generator))
    for name, value in model.named_parameters():
        if value.dim() > 1:
            gain = 2 if value.dim() > 2 else 0.5  # large values make the softmax of attention's linear layers a step
            spread = (gain / value[0].numel()) ** 0.5 if "implicit" not in name else 0.2
            value.data.copy_(torch.randn(value.shape, generator=generator) * spread + ("im." in name))


def build(cfg: Path) -> Any:
    """The tree's model of a yaml, with random numbers that are floats of 16 bits."""
    torch.manual_seed(0)
    made = getattr(yolo, "DetectionModel", None) or yolo.Model
    model = made(str(cfg), ch=3)
    randomise(model)
    detect = model.model[-1]
    if float(detect.anchors.min()) <= 0:  # a yaml without anchors: train.py finds some before the first epoch
        detect.anchors.copy_(1 + 4 * torch.rand(detect.anchors.shape))
    return model.half().float().eval()


def save(model: Any, path: Path) -> None:
    """As the trees' train.py does: float16 models in a dictionary."""
    half = copy.deepcopy(model).half()
    torch.save({"epoch": 3, "best_fitness": None, "model": half, "ema": copy.deepcopy(half), "updates": 7,
                "optimizer": None, "wandb_id": None, "date": "2026-01-01"}, path)  # fmt: skip


def maps(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """What Detect's convolutions give in evaluation mode: each (1, anchors, height, width, 5 + classes)."""
    with torch.no_grad():
        return list(model.eval()(image)[1])


def build_all(image: torch.Tensor, out: Path, cfgs: list[Path]) -> None:
    for cfg in cfgs:
        model = build(cfg)
        save(model, out / f"{cfg.stem}.pt")
        torch.save(maps(model, image), out / f"{cfg.stem}.maps.pt")


def load_all(image: torch.Tensor, out: Path, checkpoints: list[Path]) -> None:
    from models.experimental import attempt_load

    for path in checkpoints:
        model = attempt_load(str(path), device=torch.device("cpu"), fuse=False)
        torch.save(maps(model, image), out / f"{path.stem}.maps.pt")


def train(image: torch.Tensor, out: Path, cfg: Path) -> None:
    """A step of SGD with the tree's loss; the checkpoint, loaded by the tree, gives the same. Prints what was built."""
    from models.experimental import attempt_load
    from utils.loss import ComputeLoss

    from dsconvert.torch import register

    register(yolo, block_size=16, KDSBias=True)
    model = build(cfg)
    hyp = yaml.safe_load(Path("data/hyps/hyp.scratch-low.yaml").read_text())
    model.hyp, model.nc, model.names = hyp, model.yaml["nc"], [f"class {i}" for i in range(model.yaml["nc"])]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [0, 0, 0.3, 0.2, 0.2, 0.1]])
    losses = []
    for _ in range(4):
        loss, _ = ComputeLoss(model)(model.train()(image), targets)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model = model.half().float()
    save(model, out / f"{cfg.stem}.pt")
    own = maps(model, image)
    torch.save(own, out / f"{cfg.stem}.maps.pt")
    again = attempt_load(str(out / f"{cfg.stem}.pt"), device=torch.device("cpu"), fuse=True)
    apart = max(float((a - b).abs().max()) for a, b in zip(maps(again, image), own, strict=True))
    print(json.dumps({
        "losses": losses, "apart": apart, "size": max(float(m.abs().max()) for m in own),
        "kinds": [type(layer).__name__ for layer in model.model],
        "parameters": len(list(model.parameters())),
        "moved": len([p for p in model.parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]),
    }))  # fmt: skip


if __name__ == "__main__":
    job, image, out, *cfgs = sys.argv[1:]
    given = torch.load(image, weights_only=True)
    if job == "build":
        build_all(given, Path(out), [Path(c) for c in cfgs])
    elif job == "load":
        load_all(given, Path(out), [Path(c) for c in cfgs])
    else:
        train(given, Path(out), Path(cfgs[0]))
