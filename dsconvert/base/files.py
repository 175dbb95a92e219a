"""Write files so that a reader only sees the old file or the complete new one, on the disks that people have.

Memory cards (FAT, exFAT), network drives (SMB, Google Drive, gcsfuse) and shared folders of virtual machines have no
hard links, cannot sync a folder, or know no permissions. What a disk cannot do is skipped; any other failure counts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

from dsconvert.base.errors import InputError, Unusable


class NameRefused(Unusable):
    """The disk accepts no file with this name; another name may work."""


# the errors by which disks and systems report that they cannot do something
CANNOT = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
NO_LINKS = CANNOT | {errno.EMLINK, errno.EXDEV}
NO_FOLDERS = CANNOT | {errno.EBADF, errno.EISDIR}  # systems that cannot open folders like files
LONGEST = 20  # characters of the file's name that its temporary name has, as names have at most 255 bytes


def write_atomic(path: Path, data: bytes, force: bool) -> None:
    """Write a file beside `path`, sync it, and rename it into place.

    Raises InputError when the file exists and `force` is off, when the folder cannot be written to, or as
    `check_target` does.
    """
    with written_whole(path, force) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def written_whole(path: Path, force: bool, suffix: str = ".part") -> Iterator[Path]:
    """Yield a file beside `path` that a library can fill by its name.

    It replaces `path` at the end of the block, and is removed if the block fails. Raises InputError as `write_atomic`
    does.

    suffix: of the temporary file, for libraries that choose a format by it.
    """
    check_target(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:LONGEST]}.", suffix=suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as stream, _able(CANNOT):
            os.fsync(stream.fileno())
        with _able(CANNOT):
            os.chmod(temporary, 0o666 & ~_umask())
        if force:
            os.replace(temporary, path)
        else:
            _place(temporary, path)
        _sync_folder(path.parent)
    except FileExistsError:
        temporary.unlink(missing_ok=True)
        raise already_there(path) from None
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _place(temporary: Path, path: Path) -> None:
    """Rename a file to a name that does not exist.

    Raises FileExistsError if it does, and leaves that file as it is.
    """
    link: Callable[[Path, Path], None] | None = getattr(os, "link", None)
    linked = False
    with _able(NO_LINKS):
        if link is not None:
            link(temporary, path)  # unlike a rename, this fails if another run made the file meanwhile
            linked = True
    if linked:
        os.unlink(temporary)
        return
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # claims the name for this run
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    with _able(NO_FOLDERS):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _able(without: set[int]) -> Iterator[None]:
    """Ignore errors of these kinds in the block."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in without:
            raise


def check_target(path: Path, force: bool) -> None:
    """Raise InputError for a file to write that exists without `force`, that is a link, or that is not an ordinary
    file.

    The target of a link may belong to someone else. Checking before minutes of work is better than after.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None
    if stat.S_ISLNK(mode):
        raise InputError(f"{path} cannot be written: it is a link; name the file that it points to, or another.")
    if not stat.S_ISREG(mode):
        kind = "it is a folder" if stat.S_ISDIR(mode) else "it is a device or a pipe, not an ordinary file"
        raise InputError(f"{path} cannot be written: {kind}.")
    if not force:
        raise already_there(path)


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise InputError when a file or folder to write is also one that is read, under any name.

    `force` is meant for results of earlier runs, not for the user's inputs.
    """
    read = {key: path for path in inputs if (key := _identity(path))}
    for path in outputs:
        if (given := read.get(_identity(path) or (0, 0))) is not None:
            same = "" if given == path else f" ({path})"
            raise InputError.naming("{} is an input and would be overwritten{}; give another {name}.", given, same)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what all names of one file or folder share, as os.path.samefile compares it; None if there is nothing."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def free_folder(base: Path) -> Path:
    """Return the first of `base`, `base2`, `base3`, ... that does not exist."""
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}{number}")
    return folder


def claim_folder(base: Path) -> Path:
    """Create the first of `base`, `base2`, `base3`, ... that does not exist; runs at the same time get different ones.

    Raises InputError when it cannot be created.
    """
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
    """Raise InputError if files in the folder, which need not exist yet, could not be written.

    A file is written and removed to find out, before minutes of work rather than after.
    """
    place = existing(folder)
    if not place.is_dir():
        raise InputError(f"{folder} cannot be written: {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: {place} is read-only.")
    try:
        _probe(place)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _probe(folder: Path) -> None:
    """Write a file as `written_whole` would, and remove it."""
    handle, name = tempfile.mkstemp(prefix=".dsconvert.", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(b"x" * 512)
            stream.flush()
            with _able(CANNOT):
                os.fsync(stream.fileno())
    finally:
        os.unlink(name)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


_SCRATCH: ContextVar[Path | None] = ContextVar("scratch", default=None)


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[None]:
    """Create temporary folders inside this folder, or in the nearest existing one above it, during the block.

    The disk of the results has room for them more likely than the system's.
    """
    token = _SCRATCH.set(existing(folder).absolute())
    try:
        yield
    finally:
        _SCRATCH.reset(token)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder, in the place of `scratch_in` or the system's.

    It is removed afterwards, even on SIGTERM.
    """
    place = _SCRATCH.get()
    try:
        folder = Path(tempfile.mkdtemp(prefix=".dsconvert-", dir=place))
    except OSError as error:
        raise InputError(f"{place or 'The folder for temporary files'} cannot be written: {error.strerror}.") from None
    try:
        with _removed_when_told_to_end(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _removed_when_told_to_end(folder: Path) -> Iterator[None]:
    """Remove the folder on SIGTERM and SIGHUP, which end a process without reaching any `finally`. (Ctrl-C is an
    exception.)
    """
    before: dict[int, signal._HANDLER] = {}

    def remove(number: int, frame: FrameType | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(number, before[number] or signal.SIG_DFL)
        signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, remove)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def needs_room(folder: Path, size: int, error: OSError) -> InputError:
    """Return the error for temporary files of so many bytes that do not fit into the folder."""
    return InputError.naming(
        "{} has no room for temporary files ({}): at least {:.1f} MB are needed; give {name} on a larger disk.",
        folder.parent, error.strerror or "it is full", size / 1e6,
    )  # fmt: skip


def already_there(path: Path) -> InputError:
    """Return the error for a file that must not be replaced."""
    return InputError.naming("{} already exists; give {force=True} to replace it, or another {name}.", path)


def _unwritable(path: Path, error: OSError | ValueError) -> InputError:
    """Return the error for a file that cannot be written.

    A name that is too long, or has characters that this disk does not accept, is the fault of this file alone. Any
    other error would also affect the next file.
    """
    if not isinstance(error, OSError):
        return NameRefused(f"{path} cannot be written: its name holds a character that no name may hold.")
    odd = error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
    return (NameRefused if odd else InputError)(f"{path} cannot be written: {error.strerror}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
