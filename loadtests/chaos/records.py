"""The ledger of truth: what was seen to be acknowledged, appended to files as it happens, and read back afterwards."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

# Of the statuses a caller may end with, after retries, those that an error budget pays for.
FAILURES: Final = frozenset(
    {"UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "ABORTED", "RESOURCE_EXHAUSTED", "CANCELLED"}
)


@dataclass(frozen=True)
class Call:
    """One call. at: seconds since the epoch when it was due. latency_ms: from then to its end, retries and all.

    status: the gRPC status name it ended with.
    """

    at: float
    latency_ms: float
    kind: str
    status: str

    @property
    def failed(self) -> bool:
        return self.status in FAILURES


class Appender:
    """Appends JSON lines; each is with the kernel when `add` returns, so that the writer's own death loses none."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, *row: Any) -> None:
        os.write(self._handle, json.dumps(row, separators=(",", ":")).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)


def rows(path: Path) -> Iterator[list[Any]]:
    """What was appended; a last line that is not whole is left out. No file is no rows."""
    if not path.exists():
        return
    for text in path.read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            yield json.loads(text)


def read_calls(path: Path) -> list[Call]:
    return [Call(*row) for row in rows(path)]
