"""Draw the figures of README.md and docs/method.md, and write the tables whose numbers are computed.

`python docs/figures.py` writes docs/img/*.svg, and the parts of the pages between `<!-- figures.py: NAME -->` and
`<!-- end -->`. Accuracy comes from docs/accuracy.json, everything else from the code. So nobody types these numbers,
and tests/project/test_figures.py fails where a page or a figure is older than its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.codes.trellis_table import table, windows
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import IntegerConv, QConv
from dsconvert.graph.ir import Node

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SET = "COCO: 500 images"  # of docs/accuracy.json
DEFAULT = "dsconvert default (mixed, 4 bit size)"
SECOND = ", second draw"

BLUE, ORANGE, GREY, INK = "#1f5fa8", "#b4540a", "#8a8f98", "#22262b"
FILLS = ("#dce8f6", "#f9e5d3")  # of a first and a second block

# What README's table shows: a name for the reader, and the name in docs/accuracy.json.
ROWS = (
    ("float32 ONNX", "float32"),
    ("ONNX Runtime int8", "ONNX Runtime int8, exact products"),
    ("OpenVINO NNCF int8", "OpenVINO NNCF int8"),
    ("**dsconvert, default**", DEFAULT),
)
# What the picture shows: the label, its place beside the point (pixels), and where the text is anchored.
PEERS = {
    "OpenVINO NNCF int8": ("OpenVINO NNCF int8", 10, 24, "start"),
    "ONNX Runtime int8, exact products": ("ONNX Runtime int8", -9, -6, "end"),
    "ONNX Runtime int8, convolutions only, exact products": ("ONNX Runtime int8, convolutions only", -9, 16, "end"),
    "Ultralytics' way of int8 ONNX, exact products": ("int8 as Ultralytics exports it", 9, 5, "start"),
}
OURS = {
    "dsconvert mixed, 0.725 MB": ("--target-size 0.725MB", 9, 4, "start"),
    "dsconvert mixed, 3 bit size": ("bytes of 3 bits", 9, -3, "start"),
    DEFAULT: ("default", 9, 14, "start"),
    "dsconvert 8 bit": ("--bits 8", 9, -4, "start"),
}


# --- the worked example of docs/method.md -------------------------------------------------------------------------

WEIGHT = ((0.31, -0.12, 0.05, 0.02), (-0.40, 0.22, -0.07, 0.09))  # (2 output channels, 4 input channels), 1x1
FORMAT = WeightFormat(bits=4, block_size=2, code=FREE)
BIAS = (0.05, -0.02)  # CDSb
PIXEL = (200, 50, 128, 10)  # bytes of the four input channels at one position
INPUT, OUTPUT = QParams(1 / 255, 0), QParams(0.004, 128)


def example() -> dict[str, Any]:
    """Every number of the worked example, by the functions that `quantize` and the integer executor use."""
    weight = torch.tensor(WEIGHT)[:, :, None, None]
    found = DSTensor.nearest(weight, FORMAT)
    conv = QConv(found, torch.tensor(BIAS))
    node = Node("conv", "layer", ("images",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    step = IntegerConv.of(node, conv, INPUT, OUTPUT, "cpu")
    q = torch.tensor(PIXEL, dtype=torch.float32).reshape(1, 4, 1, 1)
    real = (weight.flatten(1) @ (q.flatten() * INPUT.scale)) + torch.tensor(BIAS)
    made = step.integers(q).flatten()
    return {
        "vqk": found.vqk.flatten(1).tolist(),
        "m": found.m.flatten(1).tolist(),
        "cds": found.cds_w.tolist(),
        "merged": found.merged().flatten(1).tolist(),
        "weight": found.weight().flatten(1).tolist(),
        "bias": conv.bias_int(INPUT.scale).tolist(),
        "sums": step.sums(q).flatten().tolist(),
        "multiplier": step.multiplier.tolist(),
        "out": made.tolist(),
        "value": ((made - OUTPUT.zero_point) * OUTPUT.scale).tolist(),
        "real": real.tolist(),
        "bits": found.weight_bits,
    }


def _listed(numbers: Sequence[float], digits: int = 0) -> str:
    return ", ".join(f"{n:.{digits}f}" for n in numbers)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def _by_channel(rows: Sequence[tuple[str, Callable[[int], str]]]) -> str:
    """A table of the worked example: for each row its name and what an output channel has there."""
    heads = ("", "output channel 0", "output channel 1")
    return "\n".join(_table(heads, [(name, *map(cell, range(2))) for name, cell in rows]))


def example_table() -> str:
    """The worked example's weights, a row for each step and a column for each output channel."""
    e = example()
    return _by_channel([
        ("float weights `W`", lambda o: _listed(WEIGHT[o], 2)),
        ("quantized weights `VQK`, 4 bits each", lambda o: _listed(e["vqk"][o])),
        ("group scales `m`, one a block of two", lambda o: _listed(e["m"][o])),
        ("int8 weights `m VQK`", lambda o: _listed(e["merged"][o])),
        ("per-channel scale `CDSw`", lambda o: f"{e['cds'][o]:.6f}"),
        ("weights they stand for, `W'`", lambda o: _listed(e["weight"][o], 3)),
    ])  # fmt: skip


def _product(byte: int, weight: int) -> str:
    return f"{byte} × {weight}" if weight >= 0 else f"{byte} × ({weight})"


def integer_table() -> str:
    """The worked example's arithmetic at one position."""
    e = example()
    products = [" + ".join(_product(q, w) for q, w in zip(PIXEL, row, strict=True)) for row in e["merged"]]
    return _by_channel([
        ("bias `CDSb` in units of the sum, int32", lambda o: str(e["bias"][o])),
        ("sum `acc`, int32", lambda o: f"{products[o]} + bias = {e['sums'][o]:.0f}"),
        ("multiplier `sx CDSw / sy`, float32", lambda o: f"{e['multiplier'][o]:.6f}"),
        ("output byte `qy`", lambda o: f"{e['out'][o]:.0f}"),
        ("number it stands for", lambda o: f"{e['value'][o]:.3f}"),
        ("the float layer's output", lambda o: f"{e['real'][o]:.3f}"),
    ])  # fmt: skip


# --- accuracy -----------------------------------------------------------------------------------------------------


def measured() -> dict[str, Mapping[str, Any]]:
    """The rows of the 500 COCO images, by name."""
    found = json.loads((DOCS / "accuracy.json").read_text())[SET]
    return {row["name"]: row for row in found["rows"]}


def readme_table() -> str:
    """README's table: four files, and a sentence about the second fit."""
    rows = measured()
    cells = []
    for label, name in ROWS:
        r = rows[name]
        lost = f"{r['drop']:.2f} ({r['low']:.2f} to {r['high']:.2f})" if name != "float32" else ""
        boxes = f"{100 * r['lost']:.1f} %" if name != "float32" else ""
        cells.append((label, f"{r['bytes'] / 1e6:.2f}", lost, boxes))
    again = rows[DEFAULT + SECOND]
    lines = [
        *_table(("file", "MB", "mAP50-95 lost, points (95 % interval)", "boxes lost"), cells),
        "",
        f"A second fit of the default, with another seed, lost {again['drop']:.2f} points and "
        f"{100 * again['lost']:.1f} % of the boxes.",
    ]
    return "\n".join(lines)


# --- drawing ------------------------------------------------------------------------------------------------------


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """An SVG file with a white ground, readable in light and dark pages."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="13" fill="{INK}">'
    )
    ground = f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>", ""])


def text(x: float, y: float, said: str, anchor: str = "start", **more: Any) -> str:
    """A line of text."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GREY, width: float = 1) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A filled box with a thin edge."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" fill="{fill}" '
        f'stroke="{GREY}" stroke-width="0.8"/>'
    )


def size_accuracy() -> str:
    """File size against the points of mAP50-95 lost, with 95 % intervals."""
    rows = measured()
    width, height, left, right, top, bottom = 720, 430, 64, 700, 46, 372
    most_mb, most_points = 4.0, 4.2

    def at(mb: float, points: float) -> tuple[float, float]:
        return left + mb / most_mb * (right - left), top + max(points, 0.0) / most_points * (bottom - top)

    parts = [text(left, 24, "Less is better on both axes: the best place is the top left corner", font_weight="bold")]
    for points in range(5):
        y = at(0, points)[1]
        parts += [line(left, y, right, y, "#e3e5e8"), text(left - 8, y + 4, str(points), "end")]
    for mb in range(5):
        x = at(mb, 0)[0]
        parts += [line(x, top, x, bottom, "#e3e5e8"), text(x, bottom + 18, str(mb), "middle")]
    parts += [text((left + right) / 2, bottom + 40, "size of the file, MB (float32: 7.5)", "middle")]
    middle = (top + bottom) / 2
    parts += [text(20, middle, "points of mAP50-95 lost", "middle", transform=f"rotate(-90 20 {middle:.0f})")]
    path = " ".join("{:.1f},{:.1f}".format(*at(rows[n]["bytes"] / 1e6, rows[n]["drop"])) for n in OURS)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>')
    for names, colour in ((PEERS, ORANGE), (OURS, BLUE)):
        for name, (label, dx, dy, anchor) in names.items():
            r = rows[name]
            x, y = at(r["bytes"] / 1e6, r["drop"])
            ends = (at(0, r["low"])[1], at(0, r["high"])[1])
            parts.append(line(x, ends[0], x, ends[1], colour, 1.2))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
            parts.append(text(x + dx, y + dy, label, anchor, fill=colour))
    mnn = rows["MNN, 4-bit weights"]
    x = at(mnn["bytes"] / 1e6, 0)[0]
    parts.append(text(x, bottom - 22, f"MNN, 4-bit weights: {mnn['drop']:.1f} points", "middle", fill=ORANGE))
    parts.append(f'<path d="M{x:.1f} {bottom - 4} l-5 -9 h10 z" fill="{ORANGE}"/>')
    parts.append(f'<circle cx="{right - 150}" cy="{top + 6}" r="4.5" fill="{BLUE}"/>')
    parts.append(text(right - 140, top + 10, "dsconvert", fill=BLUE))
    parts.append(f'<circle cx="{right - 70}" cy="{top + 6}" r="4.5" fill="{ORANGE}"/>')
    parts.append(text(right - 60, top + 10, "others", fill=ORANGE))
    title = "yolov5n on 500 COCO images: size of the file against the points of mAP50-95 that it loses"
    return svg(width, height, title, parts)


def block() -> str:
    """One output channel of the worked example: two blocks of two weights."""
    e = example()
    rows = (
        ("float weights", "W", "32 bits each", _cells(WEIGHT[0], 2)),
        ("quantized weights", "VQK", "4 bits each", _cells(e["vqk"][0])),
        ("group scale", "m (KDS)", "4 bits a block", _cells(e["m"][0])),
        ("int8 weights", "m VQK", "what the CPU multiplies", _cells(e["merged"][0])),
        ("per-channel scale", "CDSw", "32 bits a channel", [f"{e['cds'][0]:.5f}"]),
        ("result", "W' = CDSw m VQK", "", _cells(e["weight"][0], 3)),
    )
    parts = [
        text(254, 26, "block 1", font_weight="bold"),
        text(414, 26, "block 2", font_weight="bold"),
    ]
    for index, (name, symbol, cost, cells) in enumerate(rows):
        y = 40 + 44 * index
        parts += [text(16, y + 15, name, font_weight="bold"), text(16, y + 31, symbol, fill="#555b63", font_size="12")]
        step = 320 / len(cells)
        for place, said in enumerate(cells):
            fill = "#eceef1" if len(cells) == 1 else FILLS[place * 2 // len(cells)]
            parts += [box(200 + step * place, y, step - 6, 34, fill)]
            parts += [text(200 + step * place + (step - 6) / 2, y + 22, said, "middle")]
        parts.append(text(532, y + 22, cost, fill="#555b63"))
    title = "One output channel: four float weights, stored as 4-bit integers with two group scales and one scale"
    return svg(700, 314, title, parts)


def _cells(numbers: Sequence[float], digits: int = 0) -> list[str]:
    return [f"{n:.{digits}f}".replace("-", "−") for n in numbers]


BITS, STRING = 2, (1, 3, 0, 2, 2, 1)  # bits of a weight, and the bits stored for six weights of one output channel


def trellis_rows() -> list[tuple[str, int]]:
    """The window and the quantized weight at each place of the figure's string."""
    code = torch.tensor([STRING], dtype=torch.uint8)
    seen = windows(code, BITS)[0].tolist()
    return [(f"{w:08b}", int(table(BITS)[w])) for w in seen]


def trellis() -> str:
    """How a quantized weight is read off the last eight bits of its channel's string."""
    found, parts = trellis_rows(), []
    first, size = 150, 74
    parts += [text(16, 46, "stored bits"), text(16, 62, "2 a weight", fill="#555b63", font_size="12")]
    for place, bits in enumerate(STRING):
        x = first + size * place
        middle = x + (size - 6) / 2
        parts += [box(x, 30, size - 6, 32, FILLS[0]), text(middle, 51, f"{bits:02b}", "middle", font_size="15")]
        parts += [text(middle, 20, f"weight {place + 1}", "middle", font_size="12", fill="#555b63")]
    for row, place in enumerate((3, 4, 5)):
        y = 84 + 46 * row
        begin, end = first + size * (place - 3), first + size * (place + 1) - 6
        parts += [line(begin, y, end, y, BLUE, 2)]
        parts += [line(side, y, side, y - 7, BLUE, 2) for side in (begin, end)]
        window, value = found[place]
        index = int(window, 2)
        said = f"last 8 bits {window} = {index},  table[{index}] = {value}".replace("-", "−")
        parts.append(text(end, y + 19, said, "end"))
        weight = f"VQK {place + 1} = {value}".replace("-", "−")
        parts.append(text(end + 12, y + 5, weight, font_weight="bold", fill=BLUE))
    title = "A trellis: each quantized weight is a table entry, chosen by the last eight bits of the string"
    return svg(720, 224, title, parts)


FIGURES: dict[str, Callable[[], str]] = {"size-accuracy": size_accuracy, "block": block, "trellis": trellis}
TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "accuracy": (ROOT / "README.md", readme_table),
    "example": (DOCS / "method.md", example_table),
    "arithmetic": (DOCS / "method.md", integer_table),
}


def filled(page: str, name: str, made: str) -> str:
    """A page with the part of that name replaced. Raises ValueError where the page has no such part."""
    part = re.compile(rf"(<!-- figures.py: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not part.search(page):
        raise ValueError(f"there is no part {name}")
    return part.sub(lambda found: f"{found[1]}{made}\n{found[2]}", page)


def main() -> None:
    """Write every figure and every table."""
    for name, drawn in FIGURES.items():
        (DOCS / "img" / f"{name}.svg").write_text(drawn())
    for name, (path, made) in TABLES.items():
        path.write_text(filled(path.read_text(), name, made()))


if __name__ == "__main__":
    main()
