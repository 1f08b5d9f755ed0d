"""Files that the demonstration writes: whole or not at all, and a clear error when the disk refuses."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy.typing as npt

from services.embedded.accounts import folder_error

_KNOWN: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Explain why a folder cannot be written.

    Raises: FedmeshError: STORE_FULL on a full disk, CONFIG_INVALID for anything else that the system refuses.
    """
    try:
        yield
    except OSError as error:
        raise folder_error(folder, error) from error
    except duckdb.IOException as error:
        raise folder_error(folder, _as_os_error(error)) from error


def _as_os_error(error: duckdb.IOException) -> OSError:
    """DuckDB tells the system's reason in words only."""
    text = str(error)
    number = next((number for number in _KNOWN if os.strerror(number) in text), errno.EIO)
    return OSError(number, os.strerror(number))


def write_text(path: Path, text: str) -> None:
    """Write a file: readers see the old text or the new. Raises: as `storing`."""
    with storing(path.parent), _staged(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_table(path: Path, kind: str, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write columns as texts to a file, whole or not at all. kind: `parquet` or `csv`. Raises: as `storing`.

    columns: an array of objects must hold texts already.
    """
    texts = {name: v if v.dtype == object else v.astype(str).astype(object) for name, v in columns.items()}
    with storing(path.parent), _staged(path) as staging, duckdb.connect() as connection:
        connection.execute("set enable_progress_bar = false")
        connection.register("rows_to_write", texts)
        target = staging.as_posix().replace("'", "''")
        connection.table("rows_to_write").query("rows_to_write", f"copy rows_to_write to '{target}' (format {kind})")


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    staging = path.with_name(f".{path.name}.part")
    try:
        yield staging
        staging.replace(path)
    except BaseException:  # Ctrl-C too: half a file must not be taken for one
        if path.parent.is_dir():
            staging.unlink(missing_ok=True)
        raise
