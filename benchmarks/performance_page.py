"""docs/performance.md from the results of `speed.py`: figures against their targets, tables, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from notes import kept

Results = Mapping[str, Mapping[str, Any]]
NAMES = {
    "float32": "float32 ONNX", "packed": "**dsconvert packed**", "fused": "dsconvert fused",
    "blocked": "dsconvert blocked",
    "int8": "dsconvert int8 layout", "ort-convs": "ONNX Runtime quantize_static, convolutions only",
    "ort-all": "ONNX Runtime quantize_static, all but Detect's decoding", "nncf": "OpenVINO NNCF int8",
    "nncf weights": "OpenVINO NNCF int8, weights alone", "checkpoint": "the checkpoint `.pt` (float16)",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A ratio with a target: what, against what, at most, found, and its 95 % interval where there is one."""

    what: str
    against: str
    most: float
    value: float
    interval: tuple[float, float] | None = None

    @property
    def row(self) -> str:
        """The table's line."""
        spread = f"{self.interval[0]:.2f} to {self.interval[1]:.2f}" if self.interval else ""
        holds = "yes" if self.value <= self.most else "**no**"
        return f"| {self.what} | {self.against} | {self.most:.2f} | {self.value:.2f} | {spread} | {holds} |"


def figures(r: Results) -> list[Figure]:
    """Every ratio with a target that was measured."""
    found = []

    def timed(what: str, against: str, most: float, ratio: Mapping[str, float]) -> None:
        found.append(Figure(what, against, most, ratio["value"], (ratio["low"], ratio["high"])))

    if "sizes" in r:
        size = r["sizes"]["bytes"]
        peer = min(size["ort-convs"], size["ort-all"])
        found += [
            Figure("packed file", "ONNX Runtime int8 file", 0.48, size["packed"] / peer),
            Figure("packed file", "NNCF int8 weights", 0.48, size["packed"] / size["nncf weights"]),
            Figure("packed file", "the checkpoint `.pt`", 0.28, size["packed"] / size["checkpoint"]),
        ]
    if "latency" in r:
        peer_name = "quantize_static, the faster: " + r["latency"]["faster peer"]
        for name in ("packed", "fused"):
            if f"{name} / faster peer" in r["latency"]:
                timed(f"latency, {name}, ONNX Runtime", "float32", 0.50, r["latency"]["ratios"][name])
                timed(f"latency, {name}, ONNX Runtime", peer_name, 0.85, r["latency"][f"{name} / faster peer"])
    if "openvino" in r:
        timed("latency, blocked, OpenVINO", "NNCF int8", 1.00, r["openvino"]["ratios"]["blocked"])
    if "load" in r:
        timed("session load, packed", "float32", 1.50, r["load"]["ratios"]["packed"])
        if "fused" in r["load"]["ratios"]:
            timed("session load, fused", "float32", 1.50, r["load"]["ratios"]["fused"])
    if "quantize" in r:
        q = r["quantize"]
        found.append(
            Figure(f"quantize, {q['images']} decoded images", "NNCF post-training quantization", 6.0, q["ratio"])
        )
    return found


def write_page(r: Results, target: Path) -> None:
    """The page, and its curves beside it."""
    lines = ["# Performance", "", *_machines(r), "## Figures", ""]
    lines += ["| figure | against | at most | found | 95 % interval | holds |", "|---|---|---|---|---|---|"]
    lines += [f.row for f in figures(r)]
    lines += [
        "", "Ratios of latencies: calls in turn in one process, medians, bootstrap over rounds. Ratios of load times: "
        "fresh processes in turn.", "", *kept(target),
    ]  # fmt: skip
    for name, section in (("sizes", _sizes), ("latency", _latency), ("openvino", _openvino), ("load", _load),
                          ("quantize", _quantize), ("profile", _profile), ("roofline", _roofline)):  # fmt: skip
        if name in r:
            lines += [*section(r[name]), ""]
    target.parent.mkdir(parents=True, exist_ok=True)
    if "growth" in r:
        plot(r["growth"], target.with_suffix(".svg"))
        lines += [*_growth(r["growth"], target.with_suffix(".svg").name), ""]
    target.write_text("\n".join(lines))


def _machines(r: Results) -> list[str]:
    """Commands and machines, each named once."""
    by_machine: dict[str, list[str]] = {}
    for name, found in r.items():
        m = found["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
        text = (f"{m['checkpoint']} at {m['imgsz']} pixels on {m['threads']} threads of {m['cpu']} ({m['int8']}), "
                f"{versions}, by `{found['command']}`")  # fmt: skip
        by_machine.setdefault(text, []).append(name)
    return [line for text, names in by_machine.items() for line in (f"{', '.join(names)}: {text}.", "")]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def _sizes(s: Mapping[str, Any]) -> list[str]:
    packed = s["bytes"]["packed"]
    rows = [(NAMES[n], f"{size / 1e6:.3f}", f"{packed / size:.2f}") for n, size in s["bytes"].items()]
    return ["## Size", "", *_table(("file", "MB", "packed is"), rows)]


def _times(s: Mapping[str, Any], title: str, peaks: Mapping[str, int] | None = None) -> list[str]:
    rows = []
    for name, t in s["models"].items():
        q = s["ratios"][name]
        cells = [NAMES[name], f"{t['median_ms']:.1f}", f"{t['min_ms']:.1f}", f"{t['spread_ms']:.1f}",
                 f"{q['value']:.2f}", f"{q['low']:.2f} to {q['high']:.2f}"]  # fmt: skip
        rows.append(cells + ([f"{peaks[name] / 2**20:.0f}"] if peaks else []))
    head = ("file", "median ms", "min", "spread", f"against {s['base']}", "95 % interval")
    return [f"## {title}", "", *_table(head + (("peak MiB",) if peaks else ()), rows)]


def _latency(s: Mapping[str, Any]) -> list[str]:
    return _times(s, "Latency in ONNX Runtime")


def _openvino(s: Mapping[str, Any]) -> list[str]:
    return _times(s, "Latency in OpenVINO")


def _load(s: Mapping[str, Any]) -> list[str]:
    return _times(s, "Load time in ONNX Runtime, and peak memory", s["peak bytes"])


def _quantize(s: Mapping[str, Any]) -> list[str]:
    ours, theirs = (", ".join(f"{t:.1f}" for t in s[kind]) for kind in ("seconds", "nncf seconds"))
    return [
        "## Conversion", "",
        f"quantize fitted {s['images']} images in {ours} s (decoding took {s['decoding']:.1f} s more); in turn with "
        f"it, NNCF {s['nncf']} took {theirs} s on the same, decoded. The ratio is that of the medians.",
    ]  # fmt: skip


def _profile(s: Mapping[str, Any]) -> list[str]:
    names = [n for n in ("float32", "ort-all", "packed") if n in s]
    kinds = sorted({k for n in names for k in s[n]}, key=lambda k: -max(s[n].get(k, 0.0) for n in names))
    rows = [[k, *(f"{s[n][k]:.2f}" if k in s[n] else "" for n in names)] for k in kinds]
    shown = [row for row in rows if any(float(cell or 0) >= 0.05 for cell in row[1:])]
    total = ["all", *(f"{sum(s[n].values()):.2f}" for n in names)]
    return [
        "## Profile", "", "Milliseconds a frame by kind of node (ONNX Runtime's profiler, which slows every node "
        "down a little; kinds below 0.05 ms left out).", "",
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
        "## Roofline", "", f"The network has {s['macs'] / 1e9:.2f} G multiplications. The most that int8 kernels reach "
        "by themselves, GMAC/s:", "", *_table(("kernel", "GMAC/s"), rows), "",
        *_table(("packed", "ms", "GMAC/s", "of the best kernel"), shares),
    ]  # fmt: skip


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the y ~ x^p through the points: 1 is linear."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _growth(s: Mapping[str, Any], picture: str) -> list[str]:
    def row(p: Mapping[str, Any], first: Sequence[str]) -> list[str]:
        return [*first, f"{p['images']}", f"{p['seconds']:.1f}", f"{p['peak_bytes'] / 2**30:.2f}"]

    lines = ["## Growth", "", f"quantize at 4 bits, {s['imgsz']} pixels, images decoded beforehand; every point a "
             "fresh process.", "", f"![growth]({picture})", ""]  # fmt: skip
    if s["by images"]:
        points = s["by images"]
        lines += _table(("images", "seconds", "peak GiB"), [row(p, ()) for p in points])
        if len(points) > 1:
            p = exponent([q["images"] for q in points], [q["seconds"] for q in points])
            lines += ["", f"Seconds grow with images to the power {p:.2f}."]
        lines.append("")
    if s["by size"]:
        points = s["by size"]
        rows = [row(p, (f"yolov5{p['size']}, random weights", f"{p['parameters'] / 1e6:.1f}")) for p in points]
        lines += _table(("network", "M parameters", "images", "seconds", "peak GiB"), rows)
        if len(points) > 1:
            p = exponent([q["parameters"] for q in points], [q["seconds"] for q in points])
            lines += ["", f"Seconds grow with parameters to the power {p:.2f}."]
    return lines


def plot(s: Mapping[str, Any], target: Path) -> None:
    """Seconds against images, and against parameters."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dsconvert"
    from matplotlib import pyplot

    panels = [("by images", "images", 1.0, "images"), ("by size", "parameters", 1e6, "M parameters")]
    panels = [p for p in panels if s[p[0]]]
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(9, 3.6), squeeze=False)
    for panel, (part, key, unit, label) in zip(axes[0], panels, strict=False):
        x, y = ([p[k] / u for p in s[part]] for k, u in ((key, unit), ("seconds", 1.0)))
        panel.plot(x, y, "o-", label="measured")
        panel.plot(x, [y[0] * v / x[0] for v in x], ":", label="linear from the first")
        panel.set(xlabel=label, ylabel="seconds", xscale="log", yscale="log")
        panel.legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
