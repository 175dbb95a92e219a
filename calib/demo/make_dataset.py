"""Draw the demo dataset in YOLO layout:  python calib/demo/make_dataset.py

images/train holds the first scenes of the stream train.py learns from; calib and val are other seeds altogether.
`--look night --out FOLDER` draws the same scenes in another light.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from looks import LOOKS
from scenes import NAMES, draw_scene

HERE = Path(__file__).resolve().parent
# split: first seed and number of scenes
SPLITS = {"train": (0, 300), "calib": (1_000_000, 64), "val": (2_000_000, 100)}
JPEG_QUALITY = 85


def write_scene(root: Path, split: str, index: int, look: str = "day", first: int | None = None) -> None:
    """Write scene `index` of a split that begins with seed `first`: its image and its label file."""
    seed = (SPLITS[split][0] if first is None else first) + index
    image, labels = draw_scene(seed)
    image = LOOKS[look](image, np.random.default_rng([seed, list(LOOKS).index(look)]))
    parameters = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    cv2.imwrite(str(root / "images" / split / f"{index:04d}.jpg"), image[..., ::-1], parameters)
    lines = [f"{int(kind)} " + " ".join(f"{v:.6f}" for v in box) + "\n" for kind, *box in labels.tolist()]
    (root / "labels" / split / f"{index:04d}.txt").write_text("".join(lines))


def write_dataset(root: Path, look: str = "day", splits: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Every split, by name its first seed and number of scenes, and data.yaml."""
    splits = splits or SPLITS
    for split, (first, count) in splits.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_scene(root, split, index, look, first)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    listed = sorted(splits, key=lambda s: ("train", "val").index(s) if s in ("train", "val") else 2)
    places = "".join(f"{split}: images/{split}\n" for split in listed)
    (root / "data.yaml").write_text(f"# Scenes drawn by make_dataset.py\npath: .\n{places}names:\n{names}")


def main() -> None:
    """Parse the command line and write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder (default: this one, for the look of day)")
    parser.add_argument("--look", choices=list(LOOKS), default="day")
    args = parser.parse_args()
    if args.out is None and args.look != "day":
        parser.error("--look needs --out: this folder holds the scenes by day")
    write_dataset(args.out or HERE, args.look)


if __name__ == "__main__":
    main()
