"""The hospital's own models: sealed files of mode 0600 in a folder of the node's own, one for each finished job.

They are sealed like model states, but under a key that follows from this hospital's member keys: the epochs' state keys
are known to every member, and nobody else is to read these.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Final

from services.common.errors import FedmeshError
from services.hospital_node.store.files import write_durably
from services.secure_sum import derive
from services.secure_sum.roster import MemberKeys
from services.secure_sum.sealed import open_state, seal_state

PERSONAL_FOLDER: Final = "personal"
# The sealed layout names an epoch; these keys have none.
_NO_EPOCH: Final = 0


class PersonalFiles:
    """See `domain.ports.PersonalStore` for the contract."""

    def __init__(self, data_dir: Path, keys: MemberKeys) -> None:
        self._folder = data_dir / PERSONAL_FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for partial in self._folder.glob(".*.partial"):
            partial.unlink()
        self._keys = keys

    def save(self, job_id: str, version: int, model: bytes) -> None:
        sealed = seal_state(_key(self._keys), _NO_EPOCH, job_id, version, model)
        write_durably(_path(self._folder, job_id), sealed)

    def load(self, job_id: str, version: int) -> bytes | None:
        with suppress(FedmeshError):
            return load_personal(self._folder, self._keys, job_id, version)
        return None


def load_personal(folder: Path, keys: MemberKeys, job_id: str, version: int) -> bytes | None:
    """A hospital's own model in a node's folder `personal`, or None; also while the node runs, and changes nothing.

    Raises: FedmeshError(CIPHERTEXT_INVALID) when it is damaged, of another version, or sealed under other keys.
    """
    try:
        sealed = _path(folder, job_id).read_bytes()
    except FileNotFoundError:
        return None
    return open_state(_key(keys), job_id, version, sealed)


def _key(keys: MemberKeys) -> bytes:
    return derive.key(keys.sealing.private_bytes_raw(), b"fedmesh personal models v1", keys.hospital_id)


def _path(folder: Path, job_id: str) -> Path:
    # A name that the centre gave must not become a path.
    return folder / hashlib.sha256(job_id.encode()).hexdigest()
