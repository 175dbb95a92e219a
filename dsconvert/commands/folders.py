"""The folder that a run writes to: a new one, the given one, or the one of a stopped run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dsconvert.base.errors import InputError, printable
from dsconvert.base.filekinds import MODEL, known_kind
from dsconvert.base.files import claim_folder, refuse_inputs
from dsconvert.model.file import load_model


@contextlib.contextmanager
def run_folder(out: Path | None, base: Path, unfinished: str, resume: bool) -> Iterator[Path]:
    """Yield `out`, or a new folder named after `base` (`base`, `base2`, ...).

    With `resume`, the folder after `base` whose file `unfinished` is newest is taken. A folder that the run leaves
    empty is removed, and so are empty ones above it.

    Raises InputError when there is nothing to resume.
    """
    folder = out or (stopped(base, unfinished) if resume else claim_folder(base))
    try:
        yield folder
    except BaseException:
        if out is None:
            with contextlib.suppress(OSError):
                for made in (folder, *folder.parents[:2]):
                    made.rmdir()  # removes only empty folders: nothing was kept yet
        raise


def refuse_to_lose(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Call `files.refuse_inputs`, ignoring None. The origin of a converted model among the inputs is an input too."""
    given = [path for path in inputs if path is not None]
    for model in [path for path in given if path.is_file() and known_kind(path) == MODEL]:
        provenance = load_model(model).provenance
        options = provenance.get("options")
        calib = options.get("calib") if isinstance(options, Mapping) else None
        given += [Path(known) for known in (provenance.get("source"), calib) if isinstance(known, str) and known]
    refuse_inputs([path for path in outputs if path is not None], given)


def stopped(base: Path, unfinished: str) -> Path:
    """Return the newest folder named after `base` where a run was stopped. Raises InputError when there is none."""
    found = [p for p in base.parent.glob(f"*/{unfinished}") if _is_named_after(p.parent.name, base.name)]
    if not found:
        where = printable(str(base.parent))
        raise InputError(f"There is nothing to resume: no run of {printable(base.name)} under {where} was stopped.")
    return max(found, key=lambda p: p.stat().st_mtime_ns).parent


def _is_named_after(name: str, base: str) -> bool:
    return name == base or (name.startswith(base) and name[len(base) :].isdecimal())
