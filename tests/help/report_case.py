"""A folder to report on: a tiny converted model with names nobody should trust, its checkpoint, pictures, labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
from conftest import convert, smooth_picture, tiny_network
from pt_writer import yolov5_bytes

from dsconvert.graph.ir import display_name
from dsconvert.model.file import model_bytes

SCRIPT = "<script>alert(1)</script>"
ESCAPES = "\x1b]0;owned\x07\x9b31m\u202etac $x^2$ & \"quoted\" 'kind' {{ 7 * 7 }}"
HOSTILE = (SCRIPT, ESCAPES)


def make_case(folder: Path) -> Path:
    """best.pt, q/model.safetensors, q/quantize.json, data.yaml and three labelled pictures; returns the model."""
    network, head = tiny_network()
    model = convert(network, head, smooth_picture())
    named = dataclasses.replace(head, names=HOSTILE)
    (folder / "best.pt").write_bytes(yolov5_bytes(network, named))
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        picture = cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (100, 80))
        cv2.imwrite(str(folder / "images" / f"{i}<b>.png"), picture)
        (folder / "labels" / f"{i}<b>.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    (folder / "data.yaml").write_text(f"path: .\nval: images\nnames: {json.dumps(HOSTILE)}\n")
    provenance = {
        "source": str(folder / "best.pt"),
        "source_sha256": hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest(),
        "command": f"dsconvert quantize {SCRIPT}",
        "options": {"calib": str(folder / "images")},
        "damage": {
            node.name: {str(b): 1.0 / (i + b) for b in (2, 3, 4, 5, 6, 8)}
            for i, node in enumerate(model.graph.convs()[1:-4])
        },
    }
    made = dataclasses.replace(model, head=named, provenance=provenance)
    (folder / "q").mkdir()
    (folder / "q/model.safetensors").write_bytes(model_bytes(made))
    layers = [{"name": display_name(n), "sqnr_db": 10.0 + i} for i, n in enumerate(model.graph.convs())]
    note = {
        "provenance": provenance,
        "layers": layers,
        "finetune": {"curve": [{"step": 40 * i, "held_back": 1 / (i + 1)} for i in range(4)]},
    }
    (folder / "q/quantize.json").write_text(json.dumps(note))
    return folder / "q/model.safetensors"
