"""Files that are either whole and on the disk, or not there."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 so that after a crash its name has all of the content or does not exist.

    Raises: FedmeshError(STORE_FULL or STORE_UNAVAILABLE); nothing is left then.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if error.errno in _FULL:
            raise FedmeshError(
                Code.STORE_FULL, f"the disk of {path.parent} is full: nothing was kept; make room on it"
            ) from error
        raise FedmeshError(Code.STORE_UNAVAILABLE, f"cannot write in {path.parent}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
