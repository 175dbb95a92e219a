"""Train the demo checkpoint from scratch on drawn scenes:  python calib/demo/train.py

The training stream is scene seeds 0, 1, 2, ...: `images/train` holds the first of them as files, training draws
as many as `--scenes` says. Calibration and validation scenes have seeds far outside it (see make_dataset.py).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from pt_writer import yolov5_bytes
from scenes import NAMES, SIDE, draw_scene
from torch import Tensor, nn

from dsconvert.base.files import write_atomic
from dsconvert.tune.loss import detection_loss
from dsconvert.yolo.network import Network, head_from_detect

HERE = Path(__file__).resolve().parent
STRIDES = (8, 16, 32)


def draw_scenes(count: int) -> tuple[Tensor, list[Tensor]]:
    """The first `count` scenes of the training stream: uint8 images (count, 3, 320, 320), labels (n, 5) each."""
    images = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    labels = []
    for seed in range(count):
        image, boxes = draw_scene(seed)
        images[seed] = torch.from_numpy(image).permute(2, 0, 1)
        labels.append(torch.from_numpy(boxes))
    return images, labels


def batch_of(images: Tensor, labels: list[Tensor], picks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float batch and targets (t, 6), each image mirrored and its channels rescaled at random."""
    batch = images[picks].float() / 255
    gains = 1 + 0.3 * (torch.rand(len(picks), 3, 1, 1, generator=generator) - 0.5)
    batch = (batch * gains).clamp_(0, 1)
    flips = torch.rand(len(picks), generator=generator) < 0.5
    targets = []
    for i, pick in enumerate(picks.tolist()):
        boxes = labels[pick].clone()
        if flips[i]:
            batch[i] = batch[i].flip(2)
            boxes[:, 1] = 1 - boxes[:, 1]
        targets.append(torch.cat((torch.full((len(boxes), 1), float(i)), boxes), 1))
    return batch, torch.cat(targets)


def new_network(config: dict[str, object]) -> Network:
    """A network with fresh weights, anchors set, and Detect's biases at the rates objects have."""
    network = Network(config, len(NAMES), 3)
    pixels = torch.tensor(config["anchors"]).view(3, 3, 2)
    network.detect.anchors.copy_(pixels / torch.tensor(STRIDES)[:, None, None])
    for conv, stride in zip(network.detect.m, STRIDES, strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        bias = conv.bias.data.view(3, -1)
        bias[:, 4] = math.log(8 / (SIDE / stride) ** 2)  # about eight objects an image
        bias[:, 5:] = math.log(0.6 / (len(NAMES) - 0.99))
    return network


def train(args: argparse.Namespace) -> None:
    """Run the whole training and write the checkpoint after every epoch."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    config = yaml.safe_load((HERE / "model.yaml").read_text())
    network = new_network(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network)
    head = head_from_detect(network.detect, STRIDES, NAMES)
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in network.parameters():
        (decay if p.dim() > 1 else plain).append(p)
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}])
    began = time.time()
    images, labels = draw_scenes(args.scenes)
    print(f"drew {args.scenes} scenes in {time.time() - began:.0f} s", flush=True)
    per_epoch = args.scenes // args.batch
    total, step = args.epochs * per_epoch, 0
    for epoch in range(args.epochs):
        network.train()
        began, losses = time.time(), []
        for picks in torch.randperm(args.scenes, generator=generator)[: per_epoch * args.batch].split(args.batch):
            rate = args.rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / total)) / 2)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch, targets = batch_of(images, labels, picks, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                raw = network(batch.contiguous(memory_format=torch.channels_last))
            loss = detection_loss(raw, targets, network.detect.anchors, len(NAMES))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimiser.step()
            step += 1
            share = 0.999 * (1 - math.exp(-step / 300))
            with torch.no_grad():
                for kept, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                    kept.mul_(share).add_(new, alpha=1 - share) if kept.is_floating_point() else kept.copy_(new)
            losses.append(loss.item())
        rate_seen = per_epoch * args.batch / (time.time() - began)
        print(f"epoch {epoch + 1}/{args.epochs} loss {np.mean(losses):.4f} {rate_seen:.1f} images/s", flush=True)
        write_atomic(args.out, yolov5_bytes(average, head), force=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=HERE / "demo.pt")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
