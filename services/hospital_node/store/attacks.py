"""Reports of attacks on the hospital's own rows: files of mode 0600 in a folder of the node's own, one a job."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Final

from services.hospital_node.domain.attacks import AttackReport
from services.hospital_node.store.files import write_durably

ATTACKS_FOLDER: Final = "attacks"


class AttackFiles:
    """See `domain.ports.AttackStore` for the contract."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / ATTACKS_FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for partial in self._folder.glob(".*.partial"):
            partial.unlink()

    def save(self, report: AttackReport) -> None:
        # A name that the centre gave must not become a path.
        name = hashlib.sha256(report.job_id.encode()).hexdigest()
        write_durably(self._folder / name, report.to_bytes())

    def has(self, job_id: str, version: int) -> bool:
        return any((one.job_id, one.version) == (job_id, version) for one in load_reports(self._folder))


def load_reports(folder: Path) -> list[AttackReport]:
    """The reports in a node's folder `attacks`, oldest first; also while the node runs. Damaged ones are left out."""
    found = []
    for path in folder.glob("[!.]*"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found.append(AttackReport.from_bytes(path.read_bytes()))
    return sorted(found, key=lambda report: report.made_at)
