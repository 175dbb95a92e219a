"""Exported files in ONNX Runtime's wheel for ARM, on an emulated processor: are their integers those that are had here?

    python benchmarks/arm.py

Needs Debian's qemu-user-static and apt-get; for layout fast and its kernel also gcc-aarch64-linux-gnu, and the library
here (make ops). A tree of Debian packages for arm64 and the wheels are fetched into --work, where nothing is installed.
Two processors are played: the Cortex-A72 of a Raspberry Pi 4, and the A76 of a Raspberry Pi 5, which has dot products
of bytes. An emulator says nothing of speed. Layout openvino is left out: what its convolutions give is real, and sums
of reals depend on their order.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from dsconvert.base.size import Size
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.record import save_quantized
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, write_quantized
from dsconvert.export.weights.layouts import LAYOUTS, layout_named
from dsconvert.model.file import load_model
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.engines import as_input, session
from dsconvert.onnxfile.operators import library
from dsconvert.onnxfile.source import giving
from dsconvert.yolo.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "calib" / "demo"
QEMU, COMPILER = "qemu-aarch64-static", "aarch64-linux-gnu-gcc"
PACKAGES = ("python3.11", "libstdc++6")
WHEELS = ("onnxruntime", "numpy", "protobuf", "flatbuffers", "packaging")
TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
ENDS = {
    "none": Ends(), "--nms": Ends(nms=Nms()), "--uint8-input": Ends(input_type="uint8"),
    "--half-input": Ends(input_type="float16"), "--dynamic-batch": Ends(dynamic_batch=True),
}  # fmt: skip
NEAR = 1e-5  # of a number: float decoding by another library's exponential; of pixels, of the image's side
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Processor:
    """One that the emulator plays. ONNX Runtime reads what it is from /proc/cpuinfo, which is this computer's own."""

    name: str  # for people
    qemu: str  # for the emulator
    part: str  # ARM's number of it
    features: str  # what it has, in Linux's words


PROCESSORS = (
    Processor("Cortex-A72 (Raspberry Pi 4)", "cortex-a72", "0xd08", "fp asimd evtstrm crc32 cpuid"),
    Processor("Cortex-A76 (Raspberry Pi 5)", "cortex-a76", "0xd0b",
              "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
)  # fmt: skip


def done(command: list[str], **how: Any) -> str:
    """What a command printed. Ends this program where it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... failed: {(ran.stderr or ran.stdout).strip()[-800:]}")
    return ran.stdout


def debian_tree(work: Path) -> Path:
    """Python for arm64 as Debian has it, unpacked and not installed."""
    root = work / "root"
    if (root / "usr/bin/python3.11").exists():
        return root
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    (work / "status").touch()
    config = work / "apt.conf"
    config.write_text(
        f'APT::Architecture "arm64"; APT::Architectures {{"arm64";}};\nDir::State "{work}/state";\n'
        f'Dir::State::status "{work}/status";\nDir::Cache "{work}/cache";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(config)}
    done(["apt-get", "update", "-q"], env=environment)
    done(["apt-get", "install", "-qy", "--no-install-recommends", "--download-only", *PACKAGES], env=environment)
    root.mkdir(exist_ok=True)
    for package in sorted((work / "cache/archives").glob("*.deb")):
        done(["dpkg-deb", "-x", str(package), str(root)])
    return root


def wheels(work: Path) -> Path:
    """A folder with ONNX Runtime for aarch64, of the version that is here."""
    site = work / "site"
    if (site / "onnxruntime").exists():
        return site
    platforms = [word for tag in TAGS for word in ("--platform", tag)]
    versions = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    names = [f"{name}=={versions[name]}" if name in versions else name for name in WHEELS]
    done([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
          "3.11", "--dest", str(work / "wheels"), *platforms, *names])  # fmt: skip
    for wheel in (work / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    return site


def compiled(work: Path) -> tuple[Path, Path] | None:
    """The operator library for ARM and the program that tries its kernels; None where there is no compiler for it."""
    if shutil.which(COMPILER) is None:
        return None
    made, tried = work / "libdsconvert_ops.so", work / "exact"
    kernels = [str(ROOT / "ops/src" / name) for name in ("arm.c", "choose.c", "plain.c", "x86.c")]
    usual = [COMPILER, "-std=gnu11", "-O2", "-pthread", "-Wall", "-Wextra"]
    done(
        [*usual, "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(made), str(ROOT / "ops/src/register.c"), *kernels]
    )
    done([*usual, "-o", str(tried), str(ROOT / "ops/tests/exact.c"), *kernels])
    return made, tried


def play(processor: Processor, root: Path) -> list[str]:
    """The command that runs a program of the tree on it."""
    block = (
        f"BogoMIPS\t: 108.00\nFeatures\t: {processor.features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        f"CPU variant\t: 0x0\nCPU part\t: {processor.part}\nCPU revision\t: 3\n\n"
    )
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text("".join(f"processor\t: {i}\n{block}" for i in range(os.cpu_count() or 1)))
    return [QEMU, "-L", str(root), "-cpu", processor.qemu]


def drawn(count: int, side: tuple[int, int]) -> NDArray[np.float32]:
    """Images (count, 3, *side), 0..1: smooth colours with some grain, on the grid of bytes."""
    rng = np.random.default_rng(0)
    coarse = rng.random((count, 3, side[0] // 32, side[1] // 32))
    smooth = coarse.repeat(32, 2).repeat(32, 3)
    mixed = 0.7 * smooth + 0.3 * rng.random(smooth.shape)
    return np.asarray(np.rint(255 * mixed) / 255, np.float32)


def write_files(model: DSModel, size: Size, folder: Path, layouts: list[str]) -> list[str]:
    """NAME.onnx with its integer maps as outputs too, NAME.in.npy and NAME.here.npz, of every layout and option."""
    names = []
    for layout in layouts:
        for option, ends in ENDS.items():
            name = f"{layout}{option}".removesuffix("none")
            written = write_quantized(model, layout_named(layout), size, ends)
            maps = [written.places[value].name for value in model.graph.outputs]
            made = giving(written.model, maps).SerializeToString()
            kind = {"uint8": np.uint8, "float16": np.float16}.get(ends.input_type, np.float32)
            feed = as_input(drawn(2 if ends.dynamic_batch else 1, size.pair), kind)
            outputs = [o.name for o in onnx.load_from_string(made).graph.output]
            here = session(made, 2).run(outputs, {"images": feed})
            (folder / f"{name}.onnx").write_bytes(made)
            np.save(folder / f"{name}.in.npy", feed)
            np.savez(folder / f"{name}.here.npz", **dict(zip(outputs, here, strict=True)))
            names.append(name)
    return names


def differences(here: Arrays, there: Arrays, side: int) -> Iterator[tuple[str, bool, float]]:
    """Of each output: its name, whether it is of integers that are not equal, by how much floats are apart."""
    for name, one in here.items():
        other = there[name]
        if one.shape != other.shape:
            yield name, True, float("inf")
        elif one.dtype == np.uint8:
            yield name, not np.array_equal(one, other), 0.0
        else:
            apart = np.abs(one - other) / np.maximum(np.abs(one), 1.0)
            apart[..., :4] = np.abs(one - other)[..., :4] / side
            yield name, False, float(apart.max(initial=0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/arm", help="where all of it is kept")
    parser.add_argument("--model", type=Path, help="a model.safetensors (default: the demo, quantized)")
    parser.add_argument("--imgsz", type=int, help="pixels of the files' input (default: the model's)")
    given = parser.parse_args()
    if missing := next((name for name in (QEMU, "apt-get", "dpkg-deb") if shutil.which(name) is None), None):
        raise SystemExit(f"There is no {missing}; on Debian, apt-get install qemu-user-static.")
    work = given.work.resolve()
    folder = work / "files"
    folder.mkdir(parents=True, exist_ok=True)
    root, site, ops = debian_tree(work), wheels(work), compiled(work)
    path = given.model or work / "demo" / "model.safetensors"
    if not path.exists():
        options = QuantizeOptions(calib=DEMO / "images/calib", imgsz=320, samples=16)
        save_quantized(quantize(load_checkpoint(DEMO / "demo.pt"), options), path.parent, force=True)
    exact = [x for x in LAYOUTS.values() if x.rounds_between and not x.real]
    layouts = [x.name for x in exact if not x.tables or (ops and library())]
    model = load_model(path)
    size = Size.of(given.imgsz or model.imgsz)
    names, side = write_files(model, size, folder, layouts), max(size.pair)
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1"}
    bad = 0
    print(f"{path.name} at {size} pixels, onnxruntime {ort.__version__}, {done([QEMU, '--version']).splitlines()[0]}")
    for processor in PROCESSORS:
        command = play(processor, root)
        if ops:
            print(f"{processor.name}: kernels {', '.join(done([*command, str(ops[1])]).split(chr(10))).strip(', ')}")
        inside = ["-E", "LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu", "-E", f"PYTHONPATH={site}",
                  "-E", f"PYTHONHOME={root / 'usr'}", str(root / "usr/bin/python3.11")]  # fmt: skip
        program = [str(Path(__file__).with_name("arm_inside.py")), str(folder), *([str(ops[0])] if ops else [])]
        done([*command, *inside, *program], env=environment)
        for name in names:
            here, there = (dict(np.load(folder / f"{name}.{where}.npz")) for where in ("here", "arm"))
            found = list(differences(here, there, side))
            wrong = [output for output, unequal, apart in found if unequal or apart > NEAR]
            maps = sum(here[output].dtype == np.uint8 for output, *_ in found)
            furthest = max(apart for *_, apart in found)
            said = f"WRONG: {', '.join(wrong)}" if wrong else f"{maps} maps equal, floats within {furthest:.1e}"
            print(f"{processor.name}: {name}: {said}", flush=True)
            bad += len(wrong)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
