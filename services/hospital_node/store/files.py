"""Files that are either whole and on the disk, or not there."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_durably(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file of mode 0600 so that after a crash its name has all of the content or does not exist.

    content: the bytes, or pieces of them, each of which is written before the next is asked for.

    Raises: FedmeshError(STORE_FULL or STORE_UNAVAILABLE); nothing is left then. Whatever the pieces raise.
    """
    _write(path, content, durable=True)


def write_for_now(path: Path, content: Iterable[bytes]) -> None:
    """As `write_durably`, but a crash of the machine (not of the process) may lose or damage the file.

    For what can be made again from something durable; `sync_file` makes it last.
    """
    _write(path, content, durable=False)


def sync_file(path: Path) -> None:
    """Make a file and its name durable. Raises: FedmeshError(STORE_FULL or STORE_UNAVAILABLE)."""
    with _file_errors(path):
        _sync(path, os.O_RDONLY)
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def destroy_file(path: Path) -> None:
    """Overwrite a file with zeros, in place, then delete it; harmless when there is none.

    Raises: FedmeshError(STORE_UNAVAILABLE).
    """
    with contextlib.suppress(FileNotFoundError), _file_errors(path):
        with path.open("r+b", buffering=0) as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            os.fsync(file.fileno())
        path.unlink()
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _write(path: Path, content: bytes | Iterable[bytes], *, durable: bool) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _file_errors(path):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for piece in (content,) if isinstance(content, bytes) else content:
                    file.write(piece)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            partial.rename(path)
            if durable:
                _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise FedmeshError(
                Code.STORE_FULL, f"the disk of {path.parent} is full: nothing was kept; make room on it"
            ) from error
        raise FedmeshError(Code.STORE_UNAVAILABLE, f"cannot write in {path.parent}: {error.strerror}") from error


def _sync(path: Path, flags: int) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
