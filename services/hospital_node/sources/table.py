"""One local file as a DuckDB relation of texts, opened so that it can reach nothing else."""

import codecs
import csv
import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import duckdb

from services.common.errors import Code, FedmeshError

ROW_NUMBER: Final = "file_row_number"
FILE_NUMBER: Final = "file_number"
_PARQUET_MAGIC: Final = b"PAR1"
# DuckDB expands these in a path.
_GLOB: Final = re.compile(r"[*?\[\]{}]")
_FLOATING: Final = frozenset({"FLOAT", "DOUBLE"})
# Types whose text is the value; nested types, blobs and intervals have no meaning as a cell.
_CELL_TYPES: Final = re.compile(
    r"^(VARCHAR|BOOLEAN|U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*\)|DATE|TIMESTAMP.*|ENUM\(.*\)|UUID|\"?NULL\"?)$"
)
_INTERRUPTED: Final = "Query interrupted"
_HEAD_BYTES: Final = 1 << 16
_MAX_LINE_BYTES: Final = 1 << 20
_MEMORY_LIMIT: Final = "512MB"


@contextmanager
def sandbox(paths: Iterable[Path], scratch: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database that can read `paths` and nothing else: no network, no extensions, no other files.

    It takes at most _MEMORY_LIMIT; what does not fit is an error, or goes to files in the folder `scratch`.

    Raises: FedmeshError(DATA_INVALID) for a path that DuckDB would expand as a pattern.
    """
    paths = list(paths)
    for path in paths:
        if _GLOB.search(str(path.resolve())):
            raise FedmeshError(Code.DATA_INVALID, f"{path.name}: * ? [ ] {{ }} are not allowed in a data file's path")
    database = duckdb.connect(
        ":memory:",
        config={
            "threads": "1",
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": "" if scratch is None else str(scratch),
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
        },
    )
    try:
        allowed = ", ".join(literal(str(path.resolve())) for path in paths)
        database.execute(f"SET allowed_paths = [{allowed}]")
        database.execute("SET enable_external_access = false")
        # DuckDB draws a bar on standard output when a query takes two seconds, whoever listens there.
        database.execute("SET enable_progress_bar = false")
        database.execute("SET lock_configuration = true")
        with interruptible():
            yield database
    finally:
        database.close()


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C during a query of DuckDB is Ctrl-C: DuckDB itself raises a RuntimeError for it."""
    try:
        yield
    except RuntimeError as error:
        if str(error) == _INTERRUPTED:
            raise KeyboardInterrupt from error
        raise


@contextmanager
def reading(*paths: Path) -> Iterator[None]:
    """Turn DuckDB's errors into DATA_INVALID. Its messages quote lines of the file, so only the line number is kept."""
    try:
        yield
    except duckdb.Error as error:
        text = str(error)
        # Of several files, DuckDB's message names the one.
        named = [path for path in paths if str(path.resolve()) in text] or list(paths)
        line = re.search(r"Line: (\d+)", text)
        where = f" at line {line.group(1)}" if line else ""
        what = " or ".join(path.name for path in named)
        raise FedmeshError(
            Code.DATA_INVALID, f"{what} is damaged{where}: it cannot be read as {kind(named[0])}"
        ) from None


def kind(path: Path) -> str:
    """'Parquet' or 'CSV', by the file's first bytes.

    Raises: FedmeshError(DATA_INVALID) for an empty file or anything else.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise FedmeshError(Code.DATA_INVALID, f"cannot read {path.name}: {error.strerror}") from error
    if not head.strip():
        raise FedmeshError(Code.DATA_INVALID, f"{path.name} is empty")
    if head.startswith(_PARQUET_MAGIC):
        return "Parquet"
    try:
        # Incremental: the last character may be cut in two by the end of `head`.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        is_text = False
    else:
        is_text = b"\0" not in head
    if not is_text:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name} is neither Parquet nor CSV in UTF-8")
    return "CSV"


def create_source(database: duckdb.DuckDBPyConnection, path: Path, view: str) -> dict[str, str]:
    """Make `view` over the file, with ROW_NUMBER counting data rows from 1. Returns column name -> SQL type.

    Raises: FedmeshError(DATA_INVALID).
    """
    location = literal(str(path.resolve()))
    if kind(path) == "Parquet":
        relation = f"read_parquet({location})"
    else:
        columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in _csv_header(path))
        # RFC 4180, strict: a broken quote or a row of another length is an error, never a guess.
        relation = (
            f"read_csv({location}, auto_detect = false, columns = {{{columns}}}, header = true, delim = ',', "
            "quote = '\"', escape = '\"', strict_mode = true, null_padding = false, nullstr = '')"
        )
    with reading(path):
        database.execute(f"CREATE VIEW {view} AS SELECT *, row_number() OVER () AS {ROW_NUMBER} FROM {relation}")  # noqa: S608
        described = database.execute(f"DESCRIBE {view}").fetchall()
    return {name: sql_type for name, sql_type, *_ in described if name != ROW_NUMBER}


def require_columns(name: str, available: dict[str, str], needed: list[str]) -> None:
    """Raises: FedmeshError(DATA_INVALID) naming every column that is missing (with the column that may be meant) or
    has an unusable type. `name` says what has the columns: a file's name, a database."""
    missing = [column for column in needed if column not in available]
    if missing:
        spare = [column for column in available if column not in needed]
        raise FedmeshError(
            Code.DATA_INVALID,
            f"{name} lacks {len(missing)} column{'s' if len(missing) > 1 else ''}: "
            f"{', '.join(_with_near_name(column, spare) for column in missing)}",
            missing=",".join(missing),
        )
    wrong = [f"{column} is {available[column]}" for column in needed if not _CELL_TYPES.match(available[column])]
    if wrong:
        raise FedmeshError(
            Code.DATA_INVALID, f"{name} has columns that are not texts, numbers or dates: {'; '.join(wrong)}"
        )


def _with_near_name(missing: str, spare: list[str]) -> str:
    """The missing column's name, and the unused column whose name is nearest, if one is near."""
    folded = {_folded(column): column for column in spare}
    near = difflib.get_close_matches(_folded(missing), folded, n=1, cutoff=0.75)
    return f"{missing} (is it {folded[near[0]]!r}? map it in data.mapping)" if near else missing


def _folded(column: str) -> str:
    return re.sub(r"[^a-z0-9]", "", column.lower())


def as_text(column: str, sql_type: str) -> str:
    """SQL for a column's cells as trimmed text, NULL when empty; a whole number is the same text in every type."""
    text = f"CAST({identifier(column)} AS VARCHAR)"
    if sql_type in _FLOATING or sql_type.startswith("DECIMAL"):
        text = f"regexp_replace({text}, '\\.0+$', '')"
    return f"nullif(trim({text}), '')"


def identifier(name: str) -> str:
    """A quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A quoted SQL string."""
    return "'" + text.replace("'", "''") + "'"


def _csv_header(path: Path) -> list[str]:
    with path.open("rb") as stream:
        line = stream.readline(_MAX_LINE_BYTES)
    names = next(csv.reader([line.decode("utf-8-sig", errors="replace").rstrip("\r\n")]), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        what = f"columns {', '.join(twice)} twice" if twice and twice != [""] else "a column without a name"
        raise FedmeshError(Code.DATA_INVALID, f"{path.name}: its first line, the CSV header, has {what}")
    return names
