"""What rounds told of a job's model, until the job has ended and this hospital has signed its checks: one file a job.

Nothing in it is this hospital's alone: it follows from opened sums, which every hospital of the job has.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from services.hospital_node.domain.ports import Measured
from services.hospital_node.store.files import destroy_file, write_durably

FOLDER: Final = "measured"


class MeasuredFiles:
    """See `domain.ports.MeasuredStore` for the contract."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for partial in self._folder.glob(".*.partial"):
            partial.unlink()

    def note(self, job_id: str, seen: Measured) -> None:
        known = self.load(job_id)
        values = known.values if seen.values is None else seen.values
        document = {
            "peaks": {str(number): peak for number, peak in {**known.peaks, **seen.peaks}.items()},
            "values": [] if values is None else values.tolist(),
        }
        write_durably(self._path(job_id), json.dumps(document).encode())

    def load(self, job_id: str) -> Measured:
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            document: dict[str, Any] = json.loads(self._path(job_id).read_bytes())
            peaks = {int(number): float(peak) for number, peak in document["peaks"].items()}
            values = document["values"]
            return Measured(peaks, np.array(values, dtype=np.int64) if values else None)
        return Measured({}, None)

    def forget(self, job_id: str) -> None:
        destroy_file(self._path(job_id))

    def _path(self, job_id: str) -> Path:
        # A name that the centre gave must not become a path.
        return self._folder / hashlib.sha256(job_id.encode()).hexdigest()
