"""A Dockerfile's instructions run without Docker: every stage is a copy of one Debian tree, every RUN a chroot into it.

Only what our Dockerfile uses is known: FROM, COPY, RUN, USER, WORKDIR, ENV, ENTRYPOINT, CMD; anything else is an error.
Layers, caches and registries are not part of it. Needs root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One stage while it is built: its tree, and how commands run in it."""

    tree: Path
    user: str = "root"
    folder: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    entry: list[str] = field(default_factory=list)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in the tree, as the stage's user, in its folder."""
        inner = ["/usr/bin/env", "-C", self.folder, *(f"{k}={v}" for k, v in self.env.items()), *command]
        # its own /proc, as in a container: libraries read there what the processor can do
        own = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={self.tree / 'proc'}"]
        chroot = [*own, "chroot", f"--userspec={self.user}", str(self.tree), *inner]
        # the image's environment, not this machine's, but for how it reaches the network
        kept = {k: v for k, v in os.environ.items() if "PROXY" in k.upper() or k.startswith(("PIP_", "SSL_"))}
        path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        done = subprocess.run(chroot, env=kept | {"PATH": path, "HOME": "/root"}, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done


def instructions(text: str) -> list[tuple[str, str]]:
    """(FROM, COPY, ...; the rest of the line), continued lines joined, comments out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, rest in (line.strip().split(" ", 1) for line in joined.splitlines())]


def sent(dockerignore: str, names: list[str]) -> list[str]:
    """The files that Docker gets, where .dockerignore shuts everything out and then lets single paths in."""
    first, *rest = [line for line in dockerignore.splitlines() if line and not line.startswith("**/__pycache__")]
    assert first == "*"
    assert all(line.startswith("!") for line in rest)
    return [n for n in names if any(n == r[1:] or n.startswith(f"{r[1:]}/") for r in rest)]


def build(dockerfile: Path, context: list[Path], base: Path, work: Path) -> Stage:
    """The last stage, built in `work` from the base tree; the context is these files below the Dockerfile's folder."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, rest in instructions(dockerfile.read_text()):
        if name == "FROM":
            alias = rest.split(" AS ")[1] if " AS " in rest else str(len(stages))
            subprocess.run(["cp", "-a", str(base), str(work / alias)], check=True)
            stage = stages[alias] = Stage(work / alias)
            continue
        assert stage, "nothing stands before FROM"
        if name == "COPY" and rest.startswith("--from="):
            source, here, there = rest.removeprefix("--from=").split()
            target = stage.tree / there.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", str(stages[source].tree / here.lstrip("/")), str(target)], check=True)
        elif name == "COPY":
            here, there = rest.split()
            assert here == "."
            for path in context:
                target = stage.tree / there.lstrip("/") / path.relative_to(dockerfile.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target, follow_symlinks=False)
        elif name == "RUN":
            stage.run("/bin/sh", "-c", rest)
        elif name == "USER":
            stage.user = rest
        elif name == "WORKDIR":
            stage.folder = rest
            (stage.tree / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            stage.env |= dict(pair.split("=", 1) for pair in rest.split())
        elif name == "ENTRYPOINT":
            stage.entry = json.loads(rest)
        else:
            assert name == "CMD", f"{name} {rest}"
    assert stage
    return stage
