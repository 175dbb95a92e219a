"""Writing files so that a reader only ever sees the old one or the whole new one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dsconvert.errors import InputError


def write_atomic(path: Path, data: bytes, force: bool) -> None:
    """Write beside, fsync, then rename into place. Raises InputError when the file is there and force is off,
    or when the folder cannot be written."""
    if path.exists() and not force:
        raise _exists(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if force:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike rename, fails when another run made the file meanwhile
            os.unlink(temporary)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        os.unlink(temporary)
        raise _exists(path) from None
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}.") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def free_folder(base: Path) -> Path:
    """`base`, or `base2`, `base3`, ... : the first that does not exist."""
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}{number}")
    return folder


def claim_folder(base: Path) -> Path:
    """Make the first of `base`, `base2`, `base3`, ... that does not exist; of two runs each gets its own.

    Raises InputError when it cannot be made."""
    while True:
        folder = free_folder(base)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run was faster
            if not folder.exists():
                raise InputError(f"{folder} cannot be written: it is a link to nowhere.") from None
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}.") from None
        else:
            return folder


def check_writable(folder: Path) -> None:
    """Raises InputError when files in the folder, which need not exist yet, could not be written: better before
    minutes of work than after."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder} cannot be written: {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: {place} is read-only.")


def _exists(path: Path) -> InputError:
    return InputError(f"{path} already exists; give --force to replace it, or another --out.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
