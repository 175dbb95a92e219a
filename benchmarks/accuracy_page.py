"""docs/accuracy.md from docs/accuracy.json, the results of `accuracy.py`: one section for every set of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from notes import kept

from dsconvert.scoring.accuracy import CONFIDENT

Found = Mapping[str, Any]  # what `accuracy.py` found on one set of images
SECOND = ", second draw"
DEFAULT = "dsconvert default (mixed, 4 bit size)"
DATA_FREE = "dsconvert default, data-free"
DECIDES = 500  # images from which on a table needs no such warning
FEW = (
    "The intervals are wide, as the images are few. Another draw moves a drop by another point. So this table cannot "
    "tell apart files within a point of each other."
)
COLUMNS = (
    "| model | mAP50-95 | mAP50 | drop, points | 95 % interval | boxes lost | new | score moved | file MB | "
    "bits a weight | DSConv layers |"
)
LEGEND = (
    "*Drop* is the loss of mAP50-95 against float32 on the same images, in points. Its interval is a paired "
    "bootstrap over images.",
    f"*Boxes* are detections with a score above {CONFIDENT}. Two boxes are the same if they have one class and an "
    "IoU of 0.5. *Lost* is the share of float32's boxes that a file does not have. *New* is the share of a file's "
    "boxes that float32 does not have. *Score moved* is the mean absolute difference of the scores of all others. "
    "Brackets hold 95 % intervals, from the same draws of images.",
    "Every row is a file that was run: ONNX in ONNX Runtime, NNCF and layout openvino in OpenVINO, MNN in MNN. The "
    "float parts of a file run in float32, in OpenVINO too. OpenVINO by itself would choose bfloat16 on CPUs that "
    "have it.",
    "The first layer and Detect are int8 in every dsconvert row, and activations are uint8. *DSConv layers* is the "
    "size of all other layers' quantized weights and group scales, against float32. *Default* spends the bytes of 4 "
    "bits where they save most (`dsconvert quantize` without `--bits`).",
    "*Exact products* means ONNX Runtime's option `session.x64quantprecision`. By default, products of ordinary "
    "int8 weights saturate on a CPU without VNNI. dsconvert's weights cannot saturate, so its rows are the same on "
    "every CPU.",
    "*Ultralytics' way* is `quantize_static` with its defaults (MinMax, one scale for all of a layer's weights, "
    "int8 activations) on Conv, Gemm and MatMul.",
    "*MNN* is `mnnconvert --weightQuantBits 4 --weightQuantBlock 32 --hqq`. Its activations stay float, and it "
    "takes no images.",
)


def row_line(row: Found) -> str:
    """One row of a table."""
    bits = f"{row['weight bits']:.2f}" if row["weight bits"] else ""
    smaller = f"1/{row['smaller']:.1f}" if row["smaller"] else ""
    return (
        f"| {row['name']} | {row['map']:.4f} | {row['map50']:.4f} | {row['drop']:.2f} | {row['low']:.2f} to "
        f"{row['high']:.2f} | {boxes_of(row)} | "
        f"{row['bytes'] / 1e6:.2f} | {bits} | {smaller} |"
    )


def boxes_of(row: Found) -> str:
    """The three columns of boxes, with their intervals."""
    if "box intervals" not in row:  # measured before there were any
        return f"{100 * row['lost']:.1f} % | {100 * row['new']:.1f} % | {row['moved']:.3f}"
    lost, new, (low, high) = row["box intervals"]
    moved = f"{row['moved']:.3f} ({low:.3f} to {high:.3f})"
    return f"{_share(row['lost'], lost)} | {_share(row['new'], new)} | {moved}"


def _share(found: float, interval: Sequence[float]) -> str:
    """A share and its interval in per cent."""
    low, high = (100 * end for end in interval)
    return f"{100 * found:.1f} % ({low:.1f} to {high:.1f})"


def table(rows: Sequence[Found]) -> list[str]:
    """A table of some rows."""
    return [COLUMNS, "|---|---|---|---|---|---|---|---|---|---|---|", *map(row_line, rows), ""]


def draws(rows: Sequence[Found]) -> list[str]:
    """Both draws of every row that has two, and their mean."""
    by_name = {row["name"]: row for row in rows}
    pairs = [(row, by_name[name + SECOND]) for name, row in by_name.items() if name + SECOND in by_name]
    if not pairs:
        return []
    lines = [
        "| model | drop | second draw | mean | boxes lost, mean | new, mean | score moved, mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for a, b in pairs:
        mean = {k: (a[k] + b[k]) / 2 for k in ("drop", "lost", "new", "moved")}
        lines.append(
            f"| {a['name']} | {a['drop']:.2f} | {b['drop']:.2f} | {mean['drop']:.2f} | {100 * mean['lost']:.1f} % | "
            f"{100 * mean['new']:.1f} % | {mean['moved']:.3f} |"
        )
    return [
        "### Two draws",
        "",
        "The same fit with another `--seed`, which draws other calibration pixels:",
        "",
        *lines,
        "",
    ]


def section(name: str, found: Found) -> list[str]:
    """What one set of images says."""
    rows = found["rows"]

    def group(*names: str) -> list[Found]:
        return [row for row in rows if row["group"] in names]

    def titled(title: str, chosen: Sequence[Found]) -> list[str]:
        return [f"### {title}", "", *table(chosen)] if chosen else []

    default = [row for row in rows if row["name"] in (DEFAULT, DATA_FREE)]
    four = [row for row in rows if row["name"] == "dsconvert 4 bit everywhere"]
    lines = [f"## {name}", ""]
    if len_images := found["images"]:
        few = f" {FEW}" if len_images < DECIDES else ""
        lines += [f"{len_images} validation images at {found['imgsz']} pixels.{few}", ""]
    lines += table(group("main", "frontier", "data-free"))
    lines += draws(rows)
    if group("images"):
        lines += titled("How many calibration images", [*group("images"), *default])
    if group("ablation"):
        lines += titled(
            "What each step is worth (4 bits everywhere; the last row is the product)", group("ablation") + four
        )
    if group("block"):
        lines += titled("Block size", [*four, *group("block")])
    if group("block float"):
        lines += titled(
            "The paper's activations: block floating point, blocks of 32 channels (in torch)", group("block float")
        )
    return lines


def source(name: str, found: Found) -> list[str]:
    """Where a set's figures are from."""
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    made = f"{found['date']}, {threads} of {found['cpu']}, {found['rounds']} draws of images for an interval."
    return [f"{name}: {made}", "", f"    {found['command']}", ""]


def write_page(results: Mapping[str, Found], target: Path) -> None:
    """The page, and a picture of the last set beside it."""
    lines = ["# Accuracy", "", *kept(target)]
    for name, found in results.items():
        lines += section(name, found)
    lines += [
        "## How the tables are read",
        "",
        *(f"- {line}" for line in LEGEND),
        "",
        "![size against accuracy](accuracy.svg)",
        "",
    ]
    lines += ["## Where they are from", ""]
    for name, found in results.items():
        lines += source(name, found)
    target.write_text("\n".join(lines))
    plot(max(results.values(), key=lambda found: found["images"]), target.with_suffix(".svg"))


def plot(found: Found, target: Path) -> None:
    """File size against mAP for the main and frontier rows of the largest set."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dsconvert"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = [row for row in found["rows"] if row["group"] in ("main", "frontier")]
    points = {row["name"]: (row["bytes"] / 1e6, row["map"]) for row in rows}
    for label, marker, chosen in (
        ("dsconvert, mixed widths", "o-", lambda n: "mixed" in n and "openvino" not in n),
        ("dsconvert, one width", "s", lambda n: n.startswith("dsconvert") and "mixed" not in n and "openvino" not in n),
        ("int8 peers", "^", lambda n: "int8" in n),
        ("MNN, low-bit weights", "v", lambda n: n.startswith("MNN")),
    ):
        if picked := sorted(point for name, point in points.items() if chosen(name)):
            axes.plot(*zip(*picked, strict=True), marker, label=label)
    whole = found["rows"][0]
    axes.axhline(whole["map"], linestyle=":", label=f"float32 ({whole['bytes'] / 1e6:.1f} MB)")
    axes.set(xlabel="file, MB", ylabel="mAP50-95")
    axes.legend(loc="lower right")
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)
