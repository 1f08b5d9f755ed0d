"""The hospital node's composition root."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Final

from services.common.clock import SystemClock
from services.common.credentials import CredentialFolder
from services.common.grpc.client import MeshChannel
from services.common.grpc.server import start_metrics
from services.common.tasks import end_tasks
from services.common.telemetry import get_logger, setup_telemetry, shutdown_telemetry
from services.hospital_node.agent import Agent
from services.hospital_node.audit_log import GrpcAuditLog
from services.hospital_node.authority import certificate_from
from services.hospital_node.config import HospitalConfig, RenewalConfig, check_config, read_log_key, read_membership
from services.hospital_node.domain.policy import Policy
from services.hospital_node.domain.ports import LocalJob, TrainerFactory
from services.hospital_node.mesh import GrpcMesh
from services.hospital_node.noise import ShareOfNoise
from services.hospital_node.probe import health_probe
from services.hospital_node.secret_sum import MaskedSums
from services.hospital_node.store.attacks import AttackFiles
from services.hospital_node.store.epochs import EpochFiles
from services.hospital_node.store.ledger import SqliteLedger
from services.hospital_node.store.measured import MeasuredFiles
from services.hospital_node.store.personal import PersonalFiles
from services.hospital_node.store.state import SqliteNodeState, open_data_dir
from services.hospital_node.usecases.epochs import Epochs
from services.hospital_node.usecases.jobs import Jobs
from services.hospital_node.usecases.renewal import Renewal
from services.hospital_node.usecases.rosters import Rosters
from services.hospital_node.usecases.rounds import RoundSteps
from services.hospital_node.usecases.spending import Spending
from services.hospital_node.usecases.states import ModelStates
from services.hospital_node.usecases.steps import Tools
from services.hospital_node.usecases.witness import Witness
from services.hospital_node.worker import WorkerThread
from services.plans.manifest import PlanManifest
from services.privacy.budget import Limit

log = get_logger(__name__)

# Encrypted sums up to this size are held in memory while they are checked and opened.
_SPOOLED_BYTES: Final = 4 * 1024 * 1024


async def main(config: HospitalConfig) -> None:
    """Run the node until SIGTERM or SIGINT.

    Raises: FedmeshError(CONFIG_INVALID) for files, addresses or a data folder that cannot be used.
    """
    setup_telemetry(f"hospital/{config.hospital_id}", config.telemetry)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    worker = WorkerThread()
    await run_node(config, local_trainers(config), worker, stop)
    shutdown_telemetry()
    if worker.busy:
        # TensorFlow or SEAL runs on the worker thread and cannot be interrupted; ending the interpreter under a thread
        # inside native code crashes. Everything that must last is on the disk already.
        _kill_children()
        sys.stderr.flush()
        os._exit(0)


def _kill_children() -> None:
    """End what the abandoned thread has started: a compiler, which leads a process group with TFF's executor in it."""
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in listing.read_text().split():
            pid = int(child)
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) == pid:
                    os.killpg(pid, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGKILL)


async def run_node(config: HospitalConfig, trainers: TrainerFactory, worker: WorkerThread, stop: asyncio.Event) -> None:
    """Wire the node and run it until `stop` is set.

    Raises: as `main`.
    """
    check_config(config)
    async with AsyncExitStack() as stack:
        lock = open_data_dir(config.data_dir)
        stack.callback(os.close, lock)
        channels = [
            await stack.enter_async_context(MeshChannel(client.target, config.tls))
            for client in (config.registry, config.coordinator, config.aggregator)
        ]
        state = SqliteNodeState(config.data_dir)
        tools = _tools(config, channels, trainers, worker, state)
        agent = Agent(tools.mesh, tools.state, RoundSteps(tools), tools.epochs.keep)
        if config.metrics_listen is not None:
            start_metrics(config.metrics_listen)
        await stack.enter_async_context(health_probe(config.health_listen, lambda: agent.connected))
        await stack.enter_async_context(_witnessing(config, state))
        keeping = [asyncio.ensure_future(tools.spending.keep())]
        if config.renewal is not None:
            keeping.append(asyncio.ensure_future(_renewal(config, config.renewal, channels[0]).keep()))
        else:
            log.warning("no_renewal", reason="the configuration has no section `renewal`")
        stack.push_async_callback(tools.spending.close)
        stack.push_async_callback(end_tasks, keeping)
        log.info("started", hospital=config.hospital_id, roster=tools.rosters.newest.sha256[:16])
        await _until(stop, agent)
        log.info("stopping", training=worker.busy)


def _renewal(config: HospitalConfig, settings: RenewalConfig, registry: MeshChannel) -> Renewal:
    ask = certificate_from(registry, config.limits.call_timeout_s)
    return Renewal(config.hospital_id, CredentialFolder(settings.folder), ask, SystemClock())


@asynccontextmanager
async def _witnessing(config: HospitalConfig, state: SqliteNodeState) -> AsyncIterator[None]:
    """Witness the audit log for as long as the block lasts."""
    if config.witness is None:
        log.warning("no_witness", reason="the configuration has no section `witness`")
        yield
        return
    keys, founding = read_membership(config)
    consortium = founding.statement.consortium
    async with MeshChannel(config.witness.audit.target, config.tls) as channel:
        witness = Witness(
            GrpcAuditLog(channel, config.limits.call_timeout_s),
            state.witness,
            keys,
            consortium,
            read_log_key(config.witness, consortium),
            SystemClock(),
            config.witness.spot_checks,
        )
        looking = asyncio.ensure_future(witness.keep(config.witness.interval_s))
        try:
            yield
        finally:
            await end_tasks([looking])


def _tools(
    config: HospitalConfig,
    channels: list[MeshChannel],
    trainers: TrainerFactory,
    worker: WorkerThread,
    state: SqliteNodeState,
) -> Tools:
    keys, founding = read_membership(config)
    clock = SystemClock()
    ledger = SqliteLedger(config.data_dir, clock, Limit(config.privacy.epsilon_limit, config.privacy.delta_limit))
    log.info("ledger_opened", epsilon_left=ledger.left(config.population))
    # The secure sum has a thread of its own: a group that waits must not wait for another job's training.
    summer = WorkerThread("secure-sum")
    registry, coordinator, aggregator = channels
    mesh = GrpcMesh(config.hospital_id, lambda: epochs.fingerprint(), registry, coordinator, aggregator, config.limits)
    rosters = Rosters(founding, state, mesh)
    epochs = Epochs(keys, rosters, EpochFiles(config.data_dir), mesh, summer, clock, state.attempts.epochs_in_use)
    policy = _policy(config)
    return Tools(
        mesh=mesh,
        ledger=ledger,
        spending=Spending(keys, rosters, ledger, mesh),
        state=state,
        worker=worker,
        summer=summer,
        secure_sum=MaskedSums(keys, state.attempts),
        noise=ShareOfNoise(),
        jobs=Jobs(mesh, ledger, worker, trainers, policy, rosters, config.limits.max_jobs),
        rosters=rosters,
        epochs=epochs,
        states=ModelStates(state, mesh, epochs),
        personal=PersonalFiles(config.data_dir, keys),
        measured=MeasuredFiles(config.data_dir),
        attacks=AttackFiles(config.data_dir),
        keys=keys,
        policy=policy,
        clock=clock,
        segments=config.checks.segments,
        spool=lambda: _spool(config.data_dir),
    )


def _spool(data_dir: Path) -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES, mode="w+b", dir=str(data_dir))


async def _until(stop: asyncio.Event, agent: Agent) -> None:
    """Run the agent until `stop`; if the agent fails, raise what it raised."""
    running = asyncio.ensure_future(agent.run())
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if running.cancelled():
        raise RuntimeError("the agent ended, though nobody told it to")
    if not running.done():
        running.cancel()
        await asyncio.wait([running])
    if not running.cancelled():
        running.result()


def local_trainers(config: HospitalConfig) -> TrainerFactory:
    """Trainers on the configured data; their libraries load with the first job."""

    def open_job(manifest: PlanManifest) -> LocalJob:
        from services.hospital_node.local import open_local_job

        return open_local_job(manifest, config.data, _cache(config))

    return open_job


def _cache(config: HospitalConfig) -> Path:
    return config.compile_cache or config.data_dir / "compiled"


def _policy(config: HospitalConfig) -> Policy:
    return Policy(
        hospital_id=config.hospital_id,
        population=config.population,
        max_plan_epsilon=config.privacy.max_plan_epsilon,
        max_plan_delta=config.privacy.max_plan_delta,
        allow_without_privacy=config.privacy.allow_without_privacy,
        max_rounds=config.limits.max_rounds,
        max_vector_length=config.limits.max_vector_length,
        plan_families=frozenset(config.plan_families),
        least_colluders=config.privacy.least_colluders,
    )
