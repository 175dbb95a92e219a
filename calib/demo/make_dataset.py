"""Draw the demo dataset in YOLO layout:  python calib/demo/make_dataset.py

images/train holds the first scenes of the stream train.py learns from; calib and val are other seeds altogether.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
from scenes import NAMES, draw_scene

HERE = Path(__file__).resolve().parent
# split: first seed and number of scenes
SPLITS = {"train": (0, 300), "calib": (1_000_000, 64), "val": (2_000_000, 100)}
JPEG_QUALITY = 85


def write_scene(root: Path, split: str, index: int) -> None:
    """Write scene `index` of a split: its image and its label file."""
    image, labels = draw_scene(SPLITS[split][0] + index)
    parameters = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    cv2.imwrite(str(root / "images" / split / f"{index:04d}.jpg"), image[..., ::-1], parameters)
    lines = [f"{int(kind)} " + " ".join(f"{v:.6f}" for v in box) + "\n" for kind, *box in labels.tolist()]
    (root / "labels" / split / f"{index:04d}.txt").write_text("".join(lines))


def main() -> None:
    """Parse the command line and write every split and data.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    root = parser.parse_args().out
    for split, (_, count) in SPLITS.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_scene(root, split, index)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    text = "# Scenes drawn by make_dataset.py\npath: .\ntrain: images/train\nval: images/val\ncalib: images/calib\n"
    (root / "data.yaml").write_text(text + "names:\n" + names)


if __name__ == "__main__":
    main()
