"""The keys of epochs: files of mode 0600 in a folder of the node's own."""

from datetime import UTC, datetime
from pathlib import Path

from services.hospital_node.domain.ports import KeptEpoch
from services.hospital_node.store.files import destroy_file, write_durably
from services.secure_sum.epoch import EpochKeys

EPOCH_FOLDER = "epochs"
_FULL = "keys"
_RETIRED = "state"


class EpochFiles:
    """See `domain.ports.EpochStore` for the contract. `<roster>.<epoch>.keys` has both keys, `.state` the state key."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / EPOCH_FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for partial in self._folder.glob(".*.partial"):
            destroy_file(partial)

    def save(self, keys: EpochKeys) -> None:
        write_durably(self._path(keys.roster, keys.epoch, _FULL), keys.to_bytes())

    def load(self, roster_sha256: str, epoch: int) -> EpochKeys | None:
        return load_epoch(self._folder, roster_sha256, epoch)

    def kept(self) -> list[KeptEpoch]:
        found = []
        for path in sorted(self._folder.glob(f"*.{_FULL}")):
            roster, epoch, _ = path.name.split(".")
            found.append(KeptEpoch(roster, int(epoch), datetime.fromtimestamp(path.stat().st_mtime, UTC)))
        return found

    def retire(self, roster_sha256: str, epoch: int) -> None:
        full = self._path(roster_sha256, epoch, _FULL)
        if full.is_file():
            keys = EpochKeys.from_bytes(full.read_bytes()).without_group_key()
            write_durably(self._path(roster_sha256, epoch, _RETIRED), keys.to_bytes())
            destroy_file(full)

    def _path(self, roster_sha256: str, epoch: int, kind: str) -> Path:
        return _path(self._folder, roster_sha256, epoch, kind)


def load_epoch(folder: Path, roster_sha256: str, epoch: int) -> EpochKeys | None:
    """The keys of an epoch in a node's folder `epochs`, or None; also while the node runs, and changes nothing."""
    # A crash may have come between the two halves of `retire`: what is retired stays so.
    for kind in (_RETIRED, _FULL):
        path = _path(folder, roster_sha256, epoch, kind)
        if path.is_file():
            return EpochKeys.from_bytes(path.read_bytes())
    return None


def _path(folder: Path, roster_sha256: str, epoch: int, kind: str) -> Path:
    return folder / f"{roster_sha256}.{epoch}.{kind}"
