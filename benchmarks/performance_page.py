"""docs/performance.md from docs/performance.json, the results of `speed.py`: figures, tables, curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from notes import kept

Results = Mapping[str, Mapping[str, Any]]
NAMES = {
    "float32": "float32 ONNX", "packed": "**dsconvert packed**", "fused": "dsconvert fused",
    "blocked": "dsconvert blocked", "openvino": "dsconvert openvino",
    "int8": "dsconvert int8 layout", "ort-convs": "ONNX Runtime quantize_static, convolutions only",
    "ort-all": "ONNX Runtime quantize_static, all but Detect's decoding", "nncf": "OpenVINO NNCF int8",
    "nncf weights": "OpenVINO NNCF int8, weights alone", "checkpoint": "the checkpoint `.pt` (float16)",
    "ultralytics": "Ultralytics' way of int8 ONNX (MinMax on Conv, Gemm, MatMul)", "mnn32": "MNN float32",
    "mnn4": "MNN, 4-bit weights in blocks of 32 (hqq)", "mnn3": "MNN, 3-bit weights in blocks of 32 (hqq)",
}  # fmt: skip


ABOUT = (
    "This page has the size and speed of converted networks, beside files of other tools, and the time that conversion "
    "takes. The first table has the figures that have a target."
)
# Seconds of a size of yolov5 against n's, at most.
NETWORKS = {"s": 2.5, "m": 6.0, "x": 25.0}
BUSY = {1: 2.5, 3: 6.0}  # beside so many neighbours a core, against idle, at most
FEW_IMAGES, MANY_IMAGES = 128, 512
STARTS = ("dsconvert --help", "import dsconvert")  # which are no slower than before


@dataclass(frozen=True)
class Figure:
    """A number with a target: what, against what, at most, found, and its spread where there is one: a 95 % interval,
    or the least and the most of the turns. `chance`: it holds, too, where its interval reaches the target."""

    what: str
    against: str
    most: float
    value: float
    interval: tuple[float, float] | None = None
    chance: bool = False

    @property
    def row(self) -> str:
        """The table's line."""
        spread = f"{self.interval[0]:.2f} to {self.interval[1]:.2f}" if self.interval else ""
        least = self.interval[0] if self.chance and self.interval else self.value
        holds = "yes" if least <= self.most else "**no**"
        return f"| {self.what} | {self.against} | {self.most:.2f} | {self.value:.2f} | {spread} | {holds} |"


def figures(r: Results) -> list[Figure]:
    """Every ratio with a target that was measured."""
    return [*_file_figures(r), *_conversion_figures(r)]


def _timed(what: str, against: str, most: float, ratio: Mapping[str, float], chance: bool = False) -> Figure:
    return Figure(what, against, most, ratio["value"], (ratio["low"], ratio["high"]), chance)


def _in_turns(what: str, against: str, most: float, found: Mapping[str, Any]) -> Figure:
    low, high = found["turns"]
    return Figure(what, against, most, found["ratio"], (low, high))


def _file_figures(r: Results) -> list[Figure]:
    found = []
    if "sizes" in r:
        size = r["sizes"]["bytes"]
        peer = min(size[n] for n in ("ort-convs", "ort-all", "ultralytics") if n in size)
        found += [
            Figure("packed file", "ONNX Runtime int8 file", 0.48, size["packed"] / peer),
            Figure("packed file", "NNCF int8 weights", 0.48, size["packed"] / size["nncf weights"]),
            Figure("packed file", "the checkpoint `.pt`", 0.28, size["packed"] / size["checkpoint"]),
        ]
    if "latency" in r:
        peer_name = "quantize_static, the fastest: " + r["latency"]["faster peer"]
        for name in ("packed", "fused"):
            if f"{name} / faster peer" in r["latency"]:
                found += [
                    _timed(f"latency, {name}, ONNX Runtime", "float32", 0.50, r["latency"]["ratios"][name]),
                    _timed(f"latency, {name}, ONNX Runtime", peer_name, 0.85, r["latency"][f"{name} / faster peer"]),
                ]
    for layout in ("blocked", "openvino"):
        if f"{layout} in f32" in r.get("openvino", {}).get("ratios", {}):
            ratio = r["openvino"]["ratios"][f"{layout} in f32"]
            what = f"latency, {layout}, OpenVINO, float parts of both in f32"
            found.append(_timed(what, "NNCF int8", 1.00, ratio))
    for name in ("packed", "fused"):
        if name in r.get("load", {}).get("ratios", {}):
            found.append(_timed(f"session load, {name}", "float32", 1.50, r["load"]["ratios"][name]))
    return found


def _conversion_figures(r: Results) -> list[Figure]:
    found = []
    if "quantize" in r:
        what = f"quantize, {r['quantize']['images']} decoded images"
        found.append(_in_turns(what, "NNCF post-training quantization", 3.0, r["quantize"]))
    for p in r.get("busy", {}).get("by neighbours", ()):
        if p["a core"] in BUSY:
            what = f"the demo's quantize beside {p['a core']} busy process{'es' * (p['a core'] > 1)} a core"
            found.append(_in_turns(what, "the same, idle", BUSY[p["a core"]], p))
    points = {p["images"]: p for p in r.get("many", {}).get("points", ())}
    if min(points, default=0) == FEW_IMAGES and MANY_IMAGES in points:
        found.append(_in_turns(f"quantize, {MANY_IMAGES} images", f"{FEW_IMAGES} images", 2.5, points[MANY_IMAGES]))
    if "memory" in r:
        m = r["memory"]
        what = f"peak memory of quantize, {m['samples']} images at {m['imgsz']}"
        found.append(Figure(what, "GiB", 4.0, m["peak_bytes"] / 2**30))
    seconds = {p["size"]: p["seconds"] for p in r.get("networks", {}).get("by size", ())}
    for size, most in NETWORKS.items():
        if {"n", size} <= set(seconds):
            found.append(Figure(f"quantize, yolov5{size}", "yolov5n", most, seconds[size] / seconds["n"]))
    for name in STARTS:
        if "start" in r:
            found.append(_timed(f"`{name}`", "before numba", 1.0, r["start"]["starts"][name]["ratio"], chance=True))
    return found


def write_page(r: Results, target: Path) -> None:
    """The page, and its curves beside it."""
    lines = ["# Performance", "", ABOUT, "", "## Figures", ""]
    lines += ["| figure | against | at most | found | spread | holds |", "|---|---|---|---|---|---|"]
    lines += [f.row for f in figures(r)]
    lines += [
        "", "- Ratios of latencies are ratios of medians. The files take turns in one process, and a bootstrap over "
        "rounds gives a 95 % interval. Ratios of load times and of starts are made in the same way, with fresh "
        "processes.",
        "- Ratios of seconds are ratios of the medians of a few turns. Their spread is the least and the most of one "
        "turn.",
        "- A start holds if its interval reaches the target.", "", *kept(target),
    ]  # fmt: skip
    for name, section in SECTIONS.items():
        if name in r:
            lines += [*section(r[name]), ""]
    target.parent.mkdir(parents=True, exist_ok=True)
    if {"growth", "networks"} & set(r):
        plot(r, target.with_suffix(".svg"))
        lines += [*_growth(r, target.with_suffix(".svg").name), ""]
    lines += _machines(r)
    target.write_text("\n".join(lines))


def _machines(r: Results) -> list[str]:
    """List the machines, each once, and what was measured there: of what, when, how busy it was, by which command."""
    by_machine: dict[str, list[list[str]]] = {}
    for name, found in r.items():
        m = found["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
        subject = f"{m['checkpoint']}, {m['imgsz']} pixels" if "checkpoint" in m else ""
        row = [name, subject, found.get("date", ""), f"{m.get('load', '')}", f"`{found['command']}`"]
        about = f"These ran on {m['threads']} threads of {m['cpu']} ({m['int8']}). The versions are {versions}."
        by_machine.setdefault(about, []).append(row)
    lines = ["## Where the figures are from", ""]
    for about, rows in by_machine.items():
        head = ("what", "of", "on", "load average before it", "command")
        lines += [about, "", *_table(head, rows), ""]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def label(name: str) -> str:
    """A file's name in the tables; "nncf in f32" is a file, and the type that what is float in it runs in."""
    file, _, precision = name.partition(" in ")
    if not precision:
        return NAMES[file]
    return f"{NAMES[file]}, {'' if file == 'float32' else 'its float parts '}in {precision}"


def _sizes(s: Mapping[str, Any]) -> list[str]:
    packed = s["bytes"]["packed"]
    rows = [(NAMES[n], f"{size / 1e6:.3f}", f"{packed / size:.2f}") for n, size in s["bytes"].items()]
    return ["## Size", "", *_table(("file", "MB", "packed is"), rows)]


def _times(s: Mapping[str, Any], title: str, peaks: Mapping[str, int] | None = None) -> list[str]:
    rows = []
    for name, t in s["models"].items():
        q = s["ratios"][name]
        cells = [label(name), f"{t['median_ms']:.1f}", f"{t['min_ms']:.1f}", f"{t['spread_ms']:.1f}",
                 f"{q['value']:.2f}", f"{q['low']:.2f} to {q['high']:.2f}"]  # fmt: skip
        rows.append(cells + ([f"{peaks[name] / 2**20:.0f}"] if peaks else []))
    head = ("file", "median ms", "min", "spread", f"against {label(s['base'])}", "95 % interval")
    return [f"## {title}", "", *_table(head + (("peak MiB",) if peaks else ()), rows)]


def _latency(s: Mapping[str, Any]) -> list[str]:
    return _times(s, "Latency in ONNX Runtime")


def _openvino(s: Mapping[str, Any]) -> list[str]:
    return [
        *_times(s, "Latency in OpenVINO"), "",
        "The float parts of a file run in the type that is named. Accuracy is measured with f32. OpenVINO by itself "
        "chooses bf16 on a CPU that has it (`INFERENCE_PRECISION_HINT`).",
    ]  # fmt: skip


def _mnn(s: Mapping[str, Any]) -> list[str]:
    return [
        *_times(s, "Latency in MNN, and of ours in ONNX Runtime beside it"), "",
        "MNN turns its weights into float32 when it loads a file. So only the file is small.",
    ]  # fmt: skip


def _load(s: Mapping[str, Any]) -> list[str]:
    return _times(s, "Load time in ONNX Runtime, and peak memory", s["peak bytes"])


def _seconds(times: Sequence[float]) -> str:
    return ", ".join(f"{t:.1f}" for t in times)


def _quantize(s: Mapping[str, Any]) -> list[str]:
    return [
        "## Conversion", "",
        f"quantize fitted {s['images']} images in {_seconds(s['seconds'])} s. Decoding them took {s['decoding']:.1f} s "
        f"more. In turn with it, NNCF {s['nncf']} took {_seconds(s['nncf seconds'])} s on the same decoded images. The "
        "ratio in the table of figures is the ratio of the medians.",
    ]  # fmt: skip


def _busy(s: Mapping[str, Any]) -> list[str]:
    rows = [
        (str(p["a core"]), _seconds(p["seconds"]), _seconds(p["idle seconds"]), f"{p['ratio']:.2f}",
         f"{p['turns'][0]:.2f} to {p['turns'][1]:.2f}", str(1 + p["a core"]))
        for p in s["by neighbours"]
    ]  # fmt: skip
    head = ("busy processes a core", "seconds", "idle seconds", "ratio", "turns", "fair share")
    return [
        "## Beside busy neighbours", "",
        f"The demo's `dsconvert quantize` ran on {s['cores']} cores, as a whole command. A busy process computes "
        "without end and never waits. Before and after each run beside busy processes, quantize ran alone; the mean of "
        "both is the idle time. The system gives every process the same share of a core. So beside n busy processes, a "
        "program that only computes takes n + 1 times as long. That is the fair share. A larger ratio means that the "
        "program waited for threads of its own.", "", *_table(head, rows),
    ]  # fmt: skip


def _many(s: Mapping[str, Any]) -> list[str]:
    rows = [
        (str(p["images"]), _seconds(p["seconds"]), f"{p['ratio']:.2f}", f"{p['peak_bytes'] / 2**30:.2f}")
        for p in s["points"]
    ]
    head = ("images", "seconds", f"against {s['points'][0]['images']}", "peak GiB")
    text = f"quantize ran with its defaults at {s['imgsz']} pixels, on decoded images, in fresh processes in turn."
    return ["## Many images", "", text, "", *_table(head, rows)]


def _memory(s: Mapping[str, Any]) -> list[str]:
    return [
        "## Memory", "",
        f"`dsconvert quantize --samples {s['samples']}` at {s['imgsz']} pixels held {s['peak_bytes'] / 2**30:.2f} GiB "
        f"at its peak and took {s['seconds']:.0f} s with decoding. Mapped pages of files count as held.",
    ]  # fmt: skip


def _start(s: Mapping[str, Any]) -> list[str]:
    rows = [
        (f"`{name}`", f"{t['now']['median_ms']:.0f}", f"{t['before']['median_ms']:.0f}", f"{t['ratio']['value']:.3f}",
         f"{t['ratio']['low']:.3f} to {t['ratio']['high']:.3f}")
        for name, t in s["starts"].items()
    ]  # fmt: skip
    head = ("start", "ms now", "ms before", "ratio", "95 % interval")
    text = (
        f"The times are medians of {s['processes']} fresh processes each, in turn. *Before* is the last commit without "
        "compiled loops."
    )
    return ["## Start", "", text, "", *_table(head, rows)]


def _profile(s: Mapping[str, Any]) -> list[str]:
    names = [n for n in ("float32", "ort-all", "packed") if n in s]
    kinds = sorted({k for n in names for k in s[n]}, key=lambda k: (-max(s[n].get(k, 0.0) for n in names), k))
    rows = [[k, *(f"{s[n][k]:.2f}" if k in s[n] else "" for n in names)] for k in kinds]
    shown = [row for row in rows if any(float(cell or 0) >= 0.05 for cell in row[1:])]
    total = ["all", *(f"{sum(s[n].values()):.2f}" for n in names)]
    return [
        "## Profile", "", "The table has milliseconds a frame by kind of node, from ONNX Runtime's profiler. The "
        "profiler slows every node down a little. Kinds below 0.05 ms are left out.", "",
        *_table(("node", *(NAMES[n] for n in names)), [*shown, total]),
    ]  # fmt: skip


def _roofline(s: Mapping[str, Any]) -> list[str]:
    best = max(s["peak GMAC/s"].values())
    rows = [(name, f"{value:.0f}") for name, value in s["peak GMAC/s"].items()]
    reached = [("the whole packed file", s["packed ms"]), ("its QLinearConv nodes", s["QLinearConv ms"])]
    shares = [
        (name, f"{ms:.2f}", f"{s['macs'] / ms / 1e6:.0f}", f"{s['macs'] / ms / 1e6 / best:.2f}")
        for name, ms in reached
        if ms
    ]
    return [
        "## Roofline", "", f"The network has {s['macs'] / 1e9:.2f} G multiplications. Int8 kernels alone reach at most "
        "so many GMAC/s:", "", *_table(("kernel", "GMAC/s"), rows), "",
        *_table(("packed", "ms", "GMAC/s", "of the best kernel"), shares),
    ]  # fmt: skip


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the y ~ x^p through the points: 1 is linear."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _growth(r: Results, picture: str) -> list[str]:
    def row(p: Mapping[str, Any], first: Sequence[str]) -> list[str]:
        return [*first, f"{p['images']}", f"{p['seconds']:.1f}", f"{p['peak_bytes'] / 2**30:.2f}"]

    images, sizes = by_images(r), by_size(r)
    pixels = " and ".join(str(n) for n in sorted({r[n]["imgsz"] for n in ("growth", "networks") if n in r}))
    lines = ["## Growth", "", f"quantize ran at 4 bits and {pixels} pixels on decoded images. Every point is "
             "a fresh process.", "", f"![growth]({picture})", ""]  # fmt: skip
    if images:
        lines += _table(("images", "seconds", "peak GiB"), [row(p, ()) for p in images])
        if len(images) > 1:
            p = exponent([q["images"] for q in images], [q["seconds"] for q in images])
            lines += ["", f"Seconds grow with images to the power {p:.2f}."]
        lines.append("")
    if sizes:
        rows = [row(p, (f"yolov5{p['size']}, random weights", f"{p['parameters'] / 1e6:.1f}")) for p in sizes]
        lines += _table(("network", "M parameters", "images", "seconds", "peak GiB"), rows)
        if len(sizes) > 1:
            p = exponent([q["parameters"] for q in sizes], [q["seconds"] for q in sizes])
            lines += ["", f"Seconds grow with parameters to the power {p:.2f}."]
    return lines


def by_images(r: Results) -> Sequence[Mapping[str, Any]]:
    """Points of growth with images, none where it was not measured."""
    return list(r.get("growth", {}).get("by images", ()))


def by_size(r: Results) -> Sequence[Mapping[str, Any]]:
    """Points of growth with the network, none where it was not measured."""
    return list(r.get("networks", {}).get("by size", ()))


def plot(r: Results, target: Path) -> None:
    """Seconds against images, and against parameters."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dsconvert"
    from matplotlib import pyplot

    panels = [(by_images(r), "images", 1.0, "images"), (by_size(r), "parameters", 1e6, "M parameters")]
    panels = [p for p in panels if p[0]]
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(9, 3.6), squeeze=False)
    for panel, (points, key, unit, name) in zip(axes[0], panels, strict=False):
        x, y = ([p[k] / u for p in points] for k, u in ((key, unit), ("seconds", 1.0)))
        panel.plot(x, y, "o-", label="measured")
        panel.plot(x, [y[0] * v / x[0] for v in x], ":", label="linear from the first")
        panel.set(xlabel=name, ylabel="seconds", xscale="log", yscale="log")
        panel.legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "sizes": _sizes, "latency": _latency, "openvino": _openvino, "mnn": _mnn, "load": _load, "start": _start,
    "quantize": _quantize, "busy": _busy, "many": _many, "memory": _memory, "profile": _profile, "roofline": _roofline,
}  # fmt: skip
