"""Newline-delimited JSON, plain or gzipped, one resource a line, in bounded memory."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError

_GZIP_MAGIC: Final = b"\x1f\x8b"
# Longer than any resource without attachments; a file without line ends must not be read into memory.
_MAX_LINE_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Line:
    """One resource and where it stands: `number` counts from 1."""

    path: Path
    number: int
    resource: dict[str, Any]

    def refuse(self, why: str) -> FedmeshError:
        """The error that the line is wrong; `why` must not quote what belongs to a patient."""
        return _error(self.path, self.number, why)


def read_lines(path: Path, resource_type: str) -> Iterator[Line]:
    """The file's resources, all of `resource_type`. Empty lines are skipped.

    Raises: FedmeshError(DATA_INVALID) naming file and line: not JSON, cut off, another resource type, no id, too long,
        a damaged gzip file.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            with gzip.open(raw) if zipped else raw as stream:
                while text := stream.readline(_MAX_LINE_BYTES + 1):
                    number += 1
                    if text.strip():
                        yield Line(path, number, _resource(path, number, text, resource_type))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise _error(path, number + 1, "the gzip file is damaged or cut off here; export it again") from None
    except OSError as error:
        raise FedmeshError(Code.DATA_INVALID, f"cannot read {path.name}: {error.strerror}") from error


def _resource(path: Path, number: int, text: bytes, resource_type: str) -> dict[str, Any]:
    if len(text) > _MAX_LINE_BYTES:
        raise _error(path, number, f"is longer than {_MAX_LINE_BYTES >> 20} MiB: is this newline-delimited JSON?")
    try:
        resource = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        if not text.endswith(b"\n"):
            raise _error(path, number, "is cut off: the export or its download did not finish") from None
        raise _error(path, number, "is not JSON") from None
    found = resource.get("resourceType") if isinstance(resource, dict) else None
    if found != resource_type:
        shown = found if isinstance(found, str) and found.isalpha() and len(found) < 60 else "no resource"
        raise _error(path, number, f"is {shown}, but the file's name says {resource_type}")
    if not isinstance(resource.get("id"), str) or not resource["id"]:
        raise _error(path, number, "has no id")
    return dict(resource)


def _refuse_constant(name: str) -> None:
    """NaN and Infinity, which Python would take and JSON does not have."""
    raise ValueError(name)


def _error(path: Path, number: int, why: str) -> FedmeshError:
    return FedmeshError(Code.DATA_INVALID, f"{path.name} line {number}: {why}", file=path.name, line=number)
