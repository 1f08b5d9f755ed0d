"""What all steps of a round work with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Final, ParamSpec, TypeVar

from services.common.clock import Clock
from services.common.errors import FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.policy import Policy
from services.hospital_node.domain.ports import (
    AttackStore,
    Ledger,
    MeasuredStore,
    Mesh,
    NodeState,
    NoiseAdder,
    PersonalStore,
    SecureSum,
    Trainer,
    Worker,
)
from services.hospital_node.domain.sums import SumTerms
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.epochs import Epochs
from services.hospital_node.usecases.jobs import Accepted, Jobs, JobSession, verdict_of
from services.hospital_node.usecases.rosters import Rosters
from services.hospital_node.usecases.spending import Spending
from services.hospital_node.usecases.states import ModelStates
from services.secure_sum.roster import MemberKeys
from services.secure_sum.wire import layout_of

P = ParamSpec("P")
T = TypeVar("T")
log = get_logger(__name__)

# Bounds of the patience with a service that is away: the deadline is the coordinator's, and clocks differ.
_LEAST_PATIENCE_S: Final = 5.0
# For so long a store may be away when a machine is lost, whatever the deadline says. The coordinator then gives more
# time to those who still try, and whoever is not waited for any more gets a newer task, which ends the wait.
_OUTAGE_S: Final = 30.0
_MOST_PATIENCE_S: Final = 600.0


@dataclass(frozen=True)
class Tools:
    """What the steps work with.

    worker: runs training; summer: runs the secure sum, which never waits for training. keys: this hospital's own, for
    what it signs. segments: how many segments of a sum this hospital recomputes. spool: makes an empty file for an
    encrypted sum.
    """

    mesh: Mesh
    ledger: Ledger
    spending: Spending
    state: NodeState
    worker: Worker
    summer: Worker
    secure_sum: SecureSum
    noise: NoiseAdder
    jobs: Jobs
    rosters: Rosters
    epochs: Epochs
    states: ModelStates
    personal: PersonalStore
    measured: MeasuredStore
    attacks: AttackStore
    keys: MemberKeys
    policy: Policy
    clock: Clock
    segments: int
    spool: Callable[[], IO[bytes]]


class Steps:
    """A part of the steps. Every step may be repeated and needs no step before it in memory."""

    def __init__(self, tools: Tools) -> None:
        self._t = tools

    def patience(self, task: Task) -> float:
        """For how long a service that is away is waited for in a task, seconds."""
        if task.deadline is None:
            return _LEAST_PATIENCE_S
        left = (task.deadline - self._t.clock.now()).total_seconds()
        return min(max(left, _OUTAGE_S), _MOST_PATIENCE_S)

    async def accepted(self, task: Task) -> Accepted:
        """Raises: as `Jobs.accept`."""
        return await self._t.jobs.accept(task, self.patience(task))

    async def terms(self, task: Task) -> SumTerms:
        """What the task's sum is bound to. Raises: as `Jobs.accept` and `Epochs.get`."""
        accepted = await self.accepted(task)
        encoding, length = accepted.manifest.encoding, accepted.manifest.vector_length
        keys = await self._t.epochs.get(accepted.roster, task.epoch, self.patience(task))
        layout = layout_of(encoding.parameter_set, length, encoding.lanes)
        oldest = accepted.manifest.rounds.oldest
        return SumTerms(task.attempt, accepted.roster, keys, tuple(sorted(task.cohort)), layout, oldest)

    def session(self, task: Task) -> JobSession:
        """What is kept in memory of the task's job."""
        return self._t.jobs.session(task.attempt.job_id)

    async def trainer(self, task: Task) -> Trainer:
        """Raises: as `Jobs.trainer`."""
        return await self._t.jobs.trainer(task, self.patience(task))

    async def base_state(self, task: Task) -> bytes:
        """The state that the task's attempt builds on."""
        key = (task.base_version, task.base_state_sha256)

        async def make() -> bytes:
            if not task.base_state_sha256:
                # Version 0, or every version so far was used up without a state.
                trainer = await self.trainer(task)
                return await self.train(trainer.initial_state)
            accepted = await self.accepted(task)
            return await self._t.states.open_base(task, accepted.roster, self.patience(task))

        return await self.session(task).base.get(key, make)

    async def train(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a slow step of this node's own; a failure is a verdict."""
        try:
            return await self._t.worker.run(function, *args, **kwargs)
        except Exception as error:
            if not isinstance(error, FedmeshError):
                log.error("training_failed", exc_info=error)
            raise verdict_of(error) from error

    async def sum(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step of the secure sum."""
        return await self._t.summer.run(function, *args, **kwargs)
