"""What a run is, and what is asked of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.common.grpc.objective import AVAILABILITY, FAILED, QUICK_S

MEMBERS: Final = 15
_FAILED: Final = frozenset(code.name for code in FAILED) | {"CANCELLED"}
# The objectives (ADR 23). An upload is bytes and no control-plane call: it has the objective of its failures alone.
FAILED_RATIO: Final = 1.0 - AVAILABILITY
P99_MS: Final = QUICK_S * 1000
# Costs grow with what causes them, and not with anything else. Twice as much is beyond what two runs differ by.
GROWTH: Final = 2.0
# A waiting hospital is a TLS connection, a stream and a few objects; the stack has 1,000 of them in a pod of 768 MiB.
STREAM_MIB: Final = 0.5
# 1,000 hospitals that only wait take at most a third of a core, most of it for heartbeats.
STREAM_CORES: Final = 0.0003


@dataclass(frozen=True)
class Options:
    """hospitals: how many wait on task streams in each step, growing. seconds: length of each scenario. rate, uploads,
    events: calls a second of the control-plane mix, of uploads of the smallest model, and to the audit log. params:
    integers that an upload carries, by model. folder: emptied first. p99_ms: limit of all scenarios but uploads.
    """

    folder: Path
    report: Path | None = None
    hospitals: tuple[int, ...] = (15, 50, 150, 500, 1000)
    seconds: float = 26.0
    rate: float = 80.0
    uploads: float = 20.0
    events: float = 40.0
    params: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    p99_ms: float = P99_MS


@dataclass(frozen=True)
class Sample:
    """A call that ended. ms: since it was due, with all retries. status: of gRPC. size: payload bytes."""

    scenario: str
    name: str
    ms: float
    status: str
    size: int = 0

    @property
    def failed(self) -> bool:
        """Whether the objectives count it as failed."""
        return self.status in _FAILED
