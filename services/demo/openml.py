"""A data set of OpenML as columns of texts, fetched with the standard library.

scikit-learn's reader needs pandas for texts, and would drop the columns that OpenML calls identifiers.
"""

import hashlib
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.demo.storage import storing

ADDRESS: Final = "https://api.openml.org"
# Of one answer of the socket, not of the whole: some 20 MB may take long on a slow line.
TIMEOUT_S: Final = 30.0
_CHUNK_BYTES: Final = 1 << 18
_MAX_BYTES: Final = 1 << 28
_ELSEWHERE: Final = (
    "Use --data DIR with a folder that holds diabetic_data.parquet (or .csv) and partition15.csv, or leave both "
    "options out for the synthetic cohort"
)
_QUOTED: Final = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ATTRIBUTE: Final = re.compile(rf"@attribute\s+({_QUOTED}|\S+)\s+(\S.*)", re.IGNORECASE)
_CELL: Final = re.compile(rf"\s*({_QUOTED}|[^,]*?)\s*,")
_NUMERIC: Final = frozenset({"numeric", "real", "integer"})


def fetch(data_id: int, staging: Path, address: str = ADDRESS) -> dict[str, list[str]]:
    """Fetch a data set: texts by column, in the file's order, missing values as `?`.

    staging: where the download may lie meanwhile; it is deleted.

    Raises: FedmeshError: SERVICE_UNAVAILABLE when OpenML does not answer or gives half a file; DATA_INVALID for an
    answer that is no such data set; as `storing` for a disk that refuses.
    """
    described = _description(data_id, address)
    try:
        _download(f"{address}/data/v1/download/{described['file_id']}", staging, described.get("md5_checksum"))
        with storing(staging.parent), staging.open(encoding="utf-8", errors="replace") as lines:
            return read_arff(lines)
    finally:
        if staging.parent.is_dir():
            staging.unlink(missing_ok=True)


def read_arff(lines: Iterable[str]) -> dict[str, list[str]]:
    """Columns of a dense ARFF file. A whole number is written without a fraction, whatever its column's type.

    Raises: FedmeshError(DATA_INVALID) naming the line.
    """
    numbered = enumerate(lines, start=1)
    types: dict[str, str] = {}
    for _number, line in numbered:
        if line.strip().lower() == "@data":
            break
        if found := _ATTRIBUTE.match(line.strip()):
            types[_plain(found[1])] = found[2].strip().lower()
    if not types:
        raise FedmeshError(Code.DATA_INVALID, "what OpenML sent is not an ARFF file: it declares no attribute")
    columns: list[list[str]] = [[] for _ in types]
    # Most cells repeat: one text for all of them saves hundreds of megabytes.
    known: dict[str, str] = {}
    for number, line in numbered:
        text = line.strip()
        if not text or text.startswith("%"):
            continue
        cells = _cells(text)
        if len(cells) != len(columns) or text.startswith("{"):
            raise FedmeshError(
                Code.DATA_INVALID, f"line {number} of OpenML's file has {len(cells)} values, expected {len(columns)}"
            )
        for column, cell in zip(columns, cells, strict=True):
            column.append(known.setdefault(cell, cell))
    return {
        name: _whole_numbers(column) if kind in _NUMERIC else column
        for (name, kind), column in zip(types.items(), columns, strict=True)
    }


def _cells(text: str) -> list[str]:
    if "'" in text or '"' in text or "\\" in text:
        return [_plain(cell) for cell in _CELL.findall(text + ",")]
    return [cell.strip() for cell in text.split(",")]


def _plain(cell: str) -> str:
    """A name or value without its quotes."""
    if len(cell) >= 2 and cell[0] == cell[-1] and cell[0] in "'\"":
        return re.sub(r"\\(.)", r"\1", cell[1:-1])
    return cell


def _whole_numbers(column: list[str]) -> list[str]:
    known = {cell: _number(cell) for cell in set(column)}
    return [known[cell] for cell in column]


def _number(text: str) -> str:
    """`11.0` and `1.1e1` as `11`: levels and exclusions of a plan are compared as texts."""
    if text.isdecimal() and not text.startswith("0"):
        return text
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value.is_integer() else text


def _description(data_id: int, address: str) -> dict[str, Any]:
    with _network(), _opened(f"{address}/api/v1/json/data/{data_id}") as response:
        body = response.read(_CHUNK_BYTES)
    try:
        described = json.loads(body)["data_set_description"]
        if str(described["format"]).lower() != "arff":
            raise FedmeshError(Code.DATA_INVALID, f"OpenML's data set {data_id} is not an ARFF file")
        return {**described, "file_id": int(described["file_id"])}
    except (ValueError, KeyError, TypeError) as error:
        raise FedmeshError(
            Code.DATA_INVALID, f"OpenML's description of data set {data_id} cannot be read. {_ELSEWHERE}"
        ) from error


def _download(address: str, target: Path, md5: object) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    size = 0
    with _network():
        response = _opened(address)
    with response, storing(target.parent), target.open("wb") as file:
        while chunk := _read(response):
            size += len(chunk)
            if size > _MAX_BYTES:
                raise FedmeshError(Code.DATA_INVALID, f"OpenML's file has more than {_MAX_BYTES >> 20} MiB")
            digest.update(chunk)
            file.write(chunk)
    if md5 and digest.hexdigest() != str(md5).lower():
        raise FedmeshError(
            Code.SERVICE_UNAVAILABLE, f"what came from OpenML is not the whole file: try again. {_ELSEWHERE}"
        )


def _opened(address: str) -> Any:
    request = urllib.request.Request(address, headers={"User-Agent": "fedmesh"})  # noqa: S310 - an address of ours
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310 - as above


def _read(response: Any) -> bytes:
    with _network():
        chunk: bytes = response.read(_CHUNK_BYTES)
    return chunk


@contextmanager
def _network() -> Iterator[None]:
    """Only for calls of a socket: what else goes wrong has another reason than the network."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise FedmeshError(
            Code.SERVICE_UNAVAILABLE, f"OpenML answered with HTTP status {error.code}: try again later. {_ELSEWHERE}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise FedmeshError(
            Code.SERVICE_UNAVAILABLE,
            f"no answer from OpenML ({reason}): this machine may have no internet access. {_ELSEWHERE}",
        ) from error
