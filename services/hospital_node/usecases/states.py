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
        version, state = await self._open(task, roster, blob, task.base_version, patience_s)
        await self._adopt(task.attempt.job_id, version, task.base_state_sha256)
        return state

    async def open_proposed(self, task: Task, roster: Roster, patience_s: float) -> bytes:
        """The state that an attempt's finalizer proposes.

        Raises: FedmeshError(CIPHERTEXT_INVALID) when it is not sealed as a state of this version.
        """
        blob = await self._sealed(task, task.next_state_sha256, patience_s)
        version, state = await self._open(task, roster, blob, task.attempt.round, patience_s)
        if version != task.attempt.round:
            raise FedmeshError(Code.CIPHERTEXT_INVALID, f"the proposed state is version {version}'s")
        return state

    async def adopt_committed(self, task: Task, sha256: str, newest: int, roster: Roster, patience_s: float) -> None:
        """Keep a committed state, byte for byte. newest: the job's version; the state's own may be older after a burn.

        Raises: as `open_base`.
        """
        blob = await self._sealed(task, sha256, patience_s)
        version, _ = await self._open(task, roster, blob, newest, patience_s)
        await self._adopt(task.attempt.job_id, version, sha256)
        log.info("version_adopted", job_id=task.attempt.job_id, version=version, state=sha256)

    async def keep(self, job_id: str, sealed: SealedState) -> None:
        """Keep a state that may be committed."""
        await asyncio.to_thread(self._state.save_blob, job_id, sealed.sealed)

    async def _adopt(self, job_id: str, version: int, sha256: str) -> None:
        known = await asyncio.to_thread(self._state.adopted_version, job_id)
        if version < known:
            raise FedmeshError(
                Code.WRONG_STATE, f"version {known} of job {job_id} was committed: it does not go back to {version}"
            )
        await asyncio.to_thread(self._state.adopt, job_id, version, sha256)

    async def _sealed(self, task: Task, sha256: str, patience_s: float) -> bytes:
        content = await asyncio.to_thread(self._state.blob, sha256)
        if content is None:
            content = await self._mesh.download_blob(sha256, patience_s)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise FedmeshError(Code.INTERNAL, f"the registry sent a state that does not have the SHA-256 {sha256}")
            await asyncio.to_thread(self._state.save_blob, task.attempt.job_id, content)
        return content

    async def _open(self, task: Task, roster: Roster, blob: bytes, newest: int, patience_s: float) -> tuple[int, bytes]:
        keys = await self._epochs.get(roster, sealed_epoch(blob), patience_s)
        return await asyncio.to_thread(open_newest, keys, task.attempt.job_id, newest, blob)


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
