"""Files that commands are told to write."""

import os
from pathlib import Path

from services.common.errors import Code, FedmeshError


def require_writable(*paths: Path | None) -> None:
    """Find out before anything takes time whether files can be written; None is none.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the one that cannot, and why.
    """
    for path in paths:
        if path is None:
            continue
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: no such folder")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: no permission")
