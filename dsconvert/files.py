"""Writing files so that a reader only ever sees the old one or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsconvert.errors import InputError, Unusable


class NameRefused(Unusable):
    """The disk takes no file of that name; of another name it would."""


def write_atomic(path: Path, data: bytes, force: bool) -> None:
    """Write beside, fsync, then rename into place. Raises InputError when the file is there and force is off,
    when the folder cannot be written, or for what `check_target` refuses."""
    with written_whole(path, force) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def written_whole(path: Path, force: bool, suffix: str = ".part") -> Iterator[Path]:
    """A file beside `path` to be filled, by a library that wants a name (and `suffix`, for what it writes); it takes
    the place of `path` at the end of the block, and is gone when the block fails. Errors as `write_atomic`."""
    check_target(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # of a long name a part: with what is added it would be longer than disks allow
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:20]}.", suffix=suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if force:
            os.replace(temporary, path)
        else:
            _place(temporary, path)
        _sync_folder(path.parent)
    except FileExistsError:
        os.unlink(temporary)
        raise _exists(path) from None
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _place(temporary: Path, path: Path) -> None:
    """Rename where no file is. Raises FileExistsError where one is, which stays."""
    os.link(temporary, path)  # unlike rename, fails when another run made the file meanwhile
    os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_target(path: Path, force: bool) -> None:
    """Raises InputError for a file to write that is there without force, that is a link (what it points to may belong
    to someone else), or that is no ordinary file: better before minutes of work than after."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None
    if stat.S_ISLNK(mode):
        raise InputError(f"{path} cannot be written: it is a link; name the file that it points to, or another.")
    if not stat.S_ISREG(mode):
        kind = "it is a folder" if stat.S_ISDIR(mode) else "it is a device or a pipe, no ordinary file"
        raise InputError(f"{path} cannot be written: {kind}.")
    if not force:
        raise _exists(path)


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises InputError when a file or folder to write is one that is read, under whatever name: --force is for results
    of earlier runs, not for what the user gave. What does not exist yet is neither."""
    read = {key: path for path in inputs if (key := _identity(path))}
    for path in outputs:
        if (given := read.get(_identity(path) or (0, 0))) is not None:
            same = "" if given == path else f" ({path})"
            raise InputError(f"{given} is an input and would be overwritten{same}; give another --out.")


def _identity(path: Path) -> tuple[int, int] | None:
    """What two names of one file or folder share, as os.path.samefile compares it; None where there is nothing."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


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


def _unwritable(path: Path, error: OSError | ValueError) -> InputError:
    """A name that is too long, or in characters that this disk has not, is the file's own fault; all else would befall
    the next file too."""
    if not isinstance(error, OSError):
        return NameRefused(f"{path} cannot be written: its name holds a character that no name may hold.")
    odd = error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
    return (NameRefused if odd else InputError)(f"{path} cannot be written: {error.strerror}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
