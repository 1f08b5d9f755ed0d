"""Model states: kept and sent only sealed, opened for training and comparison."""

import asyncio
import hashlib

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.ports import Mesh, NodeState
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.epochs import Epochs
from services.hospital_node.usecases.jobs import SealedState
from services.secure_sum.epoch import EpochKeys
from services.secure_sum.roster import Roster
from services.secure_sum.sealed import open_state, seal_state, sealed_epoch

log = get_logger(__name__)


class ModelStates:
    """The states of jobs by the SHA-256 of their sealed bytes: this node's copy, else the registry's."""

    def __init__(self, state: NodeState, mesh: Mesh, epochs: Epochs) -> None:
        self._state = state
        self._mesh = mesh
        self._epochs = epochs

    async def open_base(self, task: Task, roster: Roster, patience_s: float) -> bytes:
        """The state that an attempt builds on. A hospital that was away learns of the committed version by it.

        Raises: FedmeshError(CIPHERTEXT_INVALID) when it is not a state of the job up to the task's base version;
            (WRONG_STATE) when it is older than one that this hospital knows to be committed.
        """
        blob = await self._sealed(task, task.base_state_sha256, patience_s)
        keys = await self._keys(roster, blob, patience_s)
        _, state = await asyncio.to_thread(self._adopt, keys, task.attempt.job_id, task.base_version, blob)
        return state

    async def open_proposed(self, task: Task, roster: Roster, patience_s: float) -> bytes:
        """The state that an attempt's finalizer proposes.

        Raises: FedmeshError(CIPHERTEXT_INVALID) when it is not sealed as a state of this version.
        """
        blob = await self._sealed(task, task.next_state_sha256, patience_s)
        keys = await self._keys(roster, blob, patience_s)
        version, state = await asyncio.to_thread(open_newest, keys, task.attempt.job_id, task.attempt.round, blob)
        if version != task.attempt.round:
            raise FedmeshError(Code.CIPHERTEXT_INVALID, f"the proposed state is version {version}'s")
        return state

    async def adopt_committed(self, task: Task, sha256: str, newest: int, roster: Roster, patience_s: float) -> None:
        """Keep a committed state, byte for byte. newest: the job's version; the state's own may be older after a burn.

        Raises: as `open_base`.
        """
        blob = await self._sealed(task, sha256, patience_s)
        keys = await self._keys(roster, blob, patience_s)
        version, _ = await asyncio.to_thread(self._adopt, keys, task.attempt.job_id, newest, blob)
        log.info("version_adopted", job_id=task.attempt.job_id, version=version, state=sha256)

    async def keep(self, job_id: str, sealed: SealedState) -> None:
        """Keep a state that may be committed."""
        await asyncio.to_thread(self._state.save_blob, job_id, sealed.sealed)

    def _adopt(self, keys: EpochKeys, job_id: str, newest: int, blob: bytes) -> tuple[int, bytes]:
        """Open a sealed state and keep it as what was committed; its version and the state. Raises: as `open_base`."""
        version, state = open_newest(keys, job_id, newest, blob)
        known = self._state.adopt(job_id, version, hashlib.sha256(blob).hexdigest())
        if version < known:
            raise FedmeshError(
                Code.WRONG_STATE, f"version {known} of job {job_id} was committed: it does not go back to {version}"
            )
        return version, state

    async def _sealed(self, task: Task, sha256: str, patience_s: float) -> bytes:
        content = await asyncio.to_thread(self._state.blob, sha256)
        if content is None:
            content = await self._mesh.download_blob(sha256, patience_s)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise FedmeshError(Code.INTERNAL, f"the registry sent a state that does not have the SHA-256 {sha256}")
            await asyncio.to_thread(self._state.save_blob, task.attempt.job_id, content)
        return content

    async def _keys(self, roster: Roster, blob: bytes, patience_s: float) -> EpochKeys:
        return await self._epochs.get(roster, sealed_epoch(blob), patience_s)


def seal(keys: EpochKeys, job_id: str, version: int, state: bytes) -> SealedState:
    """Seal the state of a version under an epoch's state key."""
    sealed = seal_state(keys.state_key, keys.epoch, job_id, version, state)
    return SealedState(state, sealed, hashlib.sha256(sealed).hexdigest())


def open_newest(keys: EpochKeys, job_id: str, newest: int, blob: bytes) -> tuple[int, bytes]:
    """(version, state) of a sealed state of a job whose newest version is `newest`.

    Its own version is the one that it was made as: burnt versions after it have its state.

    Raises: FedmeshError(CIPHERTEXT_INVALID).
    """
    for version in range(newest, 0, -1):
        try:
            return version, open_state(keys.state_key, job_id, version, blob)
        except FedmeshError:
            continue
    raise FedmeshError(
        Code.CIPHERTEXT_INVALID, "the sealed state is damaged, or not of this job, its versions and its key epoch"
    )
