"""Parquet and CSV files as a source: one, or several that together are one."""

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.cohort import Loaded
from services.hospital_node.sources.table import (
    FILE_NUMBER,
    ROW_NUMBER,
    as_text,
    create_source,
    identifier,
    reading,
    require_columns,
)


@dataclass(frozen=True)
class FileSource:
    """Local files, Parquet or CSV, told apart by content. Every file has all the columns that are needed."""

    files: tuple[Path, ...]
    scratch: Path | None = None
    _before: dict[Path, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        first = self.files[0].name
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more"

    def load(self, database: duckdb.DuckDBPyConnection, needed: list[str]) -> Loaded:
        """See `Source.load`. Raises: FedmeshError(DATA_INVALID)."""
        self._before.update({path: _sha256(path) for path in self.files})
        selects = []
        for number, path in enumerate(self.files):
            available = create_source(database, path, f"file_{number}")
            require_columns(path.name, available, needed)
            texts = ", ".join(f"{as_text(name, available[name])} AS {identifier(name)}" for name in needed)
            selects.append(f"SELECT {texts}, {ROW_NUMBER}, {number} AS {FILE_NUMBER} FROM file_{number}")  # noqa: S608
        database.execute(f"CREATE VIEW source AS {' UNION ALL '.join(selects)}")
        return Loaded(tuple(path.name for path in self.files))

    def reading(self) -> AbstractContextManager[None]:
        """See `Source.reading`."""
        return reading(*self.files)

    def digest(self, database: duckdb.DuckDBPyConnection) -> str:
        """SHA-256 of the file's bytes; of several, the SHA-256 of theirs. Raises: FedmeshError(DATA_INVALID)."""
        digests = [_sha256(path) for path in self.files]
        for path, digest in zip(self.files, digests, strict=True):
            if self._before[path] != digest:
                raise FedmeshError(
                    Code.DATA_INVALID, f"{path.name} changed while it was read; read it again once it is complete"
                )
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FedmeshError(Code.DATA_INVALID, f"cannot read {path.name}: {error.strerror}") from error
