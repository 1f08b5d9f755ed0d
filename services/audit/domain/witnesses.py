"""What witnesses tell the log: cosignatures and alarms, as they are stored."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

# What a signed checkpoint without cosignatures may take: origin, size, root, one signature.
MAX_NOTE_CHARACTERS: Final = 4096
MAX_REASON: Final = 500
MAX_ALARMS_OF_A_HOSPITAL: Final = 1000


@dataclass(frozen=True)
class Cosigned:
    """A witness's cosignature. public_key: 32 bytes, as the witness named it. line: with its newline."""

    size: int
    hospital_id: str
    public_key: bytes
    line: str
    cosigned_at: datetime


class AlarmKind(StrEnum):
    """What a witness found wrong; see `AlarmKind` in the proto."""

    FORK = "fork"
    ROLLBACK = "rollback"
    BAD_CHECKPOINT = "bad_checkpoint"
    UNPROVABLE = "unprovable"


@dataclass(frozen=True)
class Alarm:
    """What a witness refused. held, seen: checkpoints as C2SP notes; held is empty when it never saw one."""

    hospital_id: str
    kind: AlarmKind
    held: str
    seen: str
    reason: str
    recorded_at: datetime

    @property
    def alarm_id(self) -> bytes:
        """SHA-256 over hospital, kind and both checkpoints: the same alarm again has the same id."""
        parts = (self.hospital_id, self.kind.value, self.held, self.seen)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part.encode()).to_bytes(4, "big") + part.encode())
        return digest.digest()
