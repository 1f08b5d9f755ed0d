"""The node's life: watch for tasks as long as it takes, do them, survive everything that is not this node's fault."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Final

from prometheus_client import Counter, Gauge

from services.common.errors import Code, FedmeshError
from services.common.telemetry import attempt_span, get_logger
from services.hospital_node.domain.ports import Mesh, NodeState
from services.hospital_node.domain.tasks import Task, TaskKind
from services.hospital_node.usecases.inbox import Inbox
from services.hospital_node.usecases.jobs import Verdict
from services.hospital_node.usecases.rounds import RoundSteps

log = get_logger(__name__)

TASKS: Final = Counter(
    "fedmesh_hospital_tasks_total", "Tasks of the coordinator by how they ended", ["kind", "outcome"]
)
# So that the first of its kind is an increase: alerts ask for these.
for _kind in TaskKind:
    for _outcome in ("failed", "dropped", "declined"):
        TASKS.labels(_kind.name, _outcome)
CONNECTED: Final = Gauge("fedmesh_hospital_connected", "1 while the coordinator's task stream is open")

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
# A service that is away for a moment is waited for within the call; a full disk needs a person.
_DISK_PAUSE_S: Final = 2.0
_DECLINE_PATIENCE_S: Final = 60.0
# For so long the first look at the key epochs may hold up the task stream.
_FIRST_LOOK_S: Final = 3.0
# The attempt went on or is forgotten: nothing is wrong.
_STALE: Final = frozenset({Code.WRONG_STATE, Code.NOT_FOUND, Code.ALREADY_CONTRIBUTED})


class Agent:
    """keep: looks after key epochs for ever; it calls what it is given after every look."""

    def __init__(
        self,
        mesh: Mesh,
        state: NodeState,
        steps: RoundSteps,
        keep: Callable[[Callable[[], None]], Coroutine[Any, Any, None]],
    ) -> None:
        self._mesh = mesh
        self._state = state
        self._steps = steps
        self._keep = keep
        self._inbox = Inbox(self.perform, self._save_cursor)
        self.connected = False

    async def run(self) -> None:
        """Watch and work until cancelled."""
        looked = asyncio.Event()
        keeper = asyncio.ensure_future(self._keep(looked.set))
        saver = asyncio.ensure_future(self._inbox.save_cursors())
        cursor = self._state.cursor()
        pause_s = _FIRST_PAUSE_S
        try:
            # So that the stream is opened with the fingerprint of the keys that there are.
            with suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_LOOK_S):
                    await looked.wait()
            while True:
                try:
                    async with aclosing(self._mesh.watch(cursor)) as stream:  # type: ignore[type-var]
                        async for fresh, task in stream:
                            self._set_connected(True)
                            pause_s = _FIRST_PAUSE_S
                            cursor = fresh or cursor
                            if task is not None:
                                self._inbox.put(cursor, task)
                    reason = "the coordinator ended the stream"
                except FedmeshError as error:
                    reason = str(error)
                self._set_connected(False, reason)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            saver.cancel()
            keeper.cancel()
            await self._inbox.close()
            await asyncio.gather(saver, keeper, return_exceptions=True)

    async def perform(self, task: Task) -> None:
        """Do one task; whatever goes wrong with it is dealt with here."""
        attempt = task.attempt
        name = f"hospital.{task.kind.name.lower()}"
        with attempt_span(name, attempt.job_id, attempt.round, attempt.attempt):
            try:
                outcome = await self._attempt(task)
            except asyncio.CancelledError:
                TASKS.labels(task.kind.name, "superseded").inc()
                raise
            TASKS.labels(task.kind.name, outcome).inc()

    async def _attempt(self, task: Task) -> str:
        while True:
            try:
                await self._steps.perform(task)
            except Verdict as verdict:
                return await self._decline(task, verdict)
            except FedmeshError as error:
                if error.code is Code.STORE_FULL:
                    # The disk may be this node's own. Newer tasks cancel this wait.
                    log.error("store_full", task=task.kind.name, attempt=str(task.attempt), reason=error.message)
                    await asyncio.sleep(_DISK_PAUSE_S)
                    continue
                return _dropped(task, error)
            except Exception as error:
                log.error("task_failed", task=task.kind.name, attempt=str(task.attempt), exc_info=error)
                return "failed"
            log.debug("task_done", task=task.kind.name, attempt=str(task.attempt))
            return "done"

    async def _decline(self, task: Task, verdict: Verdict) -> str:
        job_id, error = task.attempt.job_id, verdict.error
        log.error("job_declined", job_id=job_id, code=error.code.value, reason=verdict.particulars)
        try:
            await self._mesh.decline(job_id, error.code.value, error.message, _DECLINE_PATIENCE_S)
        except FedmeshError as refused:
            return _dropped(task, refused)
        return "declined"

    def _set_connected(self, connected: bool, reason: str = "") -> None:
        if connected and not self.connected:
            log.info("coordinator_connected")
        elif self.connected and not connected:
            log.warning("coordinator_lost", reason=reason)
        elif not connected:
            log.debug("coordinator_away", reason=reason)
        self.connected = connected
        CONNECTED.set(connected)

    async def _save_cursor(self, cursor: str) -> None:
        try:
            await asyncio.to_thread(self._state.save_cursor, cursor)
        except FedmeshError as error:
            # Tasks may be repeated, so a cursor that is not saved costs only repetitions.
            log.warning("cursor_not_saved", reason=error.message)


def _dropped(task: Task, error: FedmeshError) -> str:
    stale = error.code in _STALE
    write = log.info if stale else log.warning
    write("task_dropped", task=task.kind.name, attempt=str(task.attempt), code=error.code.value, reason=error.message)
    return "stale" if stale else "dropped"
