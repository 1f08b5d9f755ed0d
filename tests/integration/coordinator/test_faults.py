"""What happens to a round when replicas, stores, services or messages fail in the middle of it."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from services.common.errors import FedmeshError
from services.coordinator.domain.attempt import Kind
from services.coordinator.store.redis import record_key
from tests.support.mesh import Mesh, running_mesh, small_plan
from tests.support.service_process import ServiceProcess
from tests.support.simulated_hospital import Skipped
from tests.support.stores import RedisServer

Hook = Callable[[pb.Task], Awaitable[None]]
PHASES = [
    pb.TASK_KIND_TRAIN,
    pb.TASK_KIND_SHARE,
    pb.TASK_KIND_UPLOAD,
    pb.TASK_KIND_CONFIRM,
    pb.TASK_KIND_UNMASK,
    pb.TASK_KIND_DECRYPT,
]


def once(kind: pb.TaskKind.ValueType, act: Callable[[], Awaitable[None]]) -> Hook:
    """A hook that acts before the first task of a kind, and not again."""
    done = False

    async def hook(task: pb.Task) -> None:
        nonlocal done
        if task.kind == kind and not done:
            done = True
            await act()

    return hook


async def outage(server: RedisServer) -> None:
    """Redis is away for longer than the coordinator's looks for new tasks are apart."""
    await asyncio.to_thread(server.stop)
    await asyncio.sleep(5)
    await asyncio.to_thread(server.start)


def check_committed(mesh: Mesh, job_id: str, rounds: int) -> list[registry_pb2.CommittedRound]:
    """Every version exists once, and hospitals saw exactly the sum of the contributions that it names."""
    committed = mesh.registry.rounds[job_id]
    assert [item.version for item in committed] == list(range(1, rounds + 1))
    assert mesh.registry.jobs[job_id].status == registry_pb2.JOB_STATUS_COMPLETED, mesh.registry.jobs[job_id].reason
    for item in (item for item in committed if not item.burnt):
        expected = mesh.expected_sum(item)
        for name in item.agreeing:
            seen = mesh.hospitals[name].plaintexts[item.attempt.round, item.attempt.attempt]
            assert np.array_equal(seen, expected)
    types = mesh.registry.event_types()
    assert all(types.count(name) >= rounds for name in ("round.sealed", "round.shared", "survivors.confirmed"))
    return committed


def in_turn(kinds: list[pb.TaskKind.ValueType], act: Callable[[], Awaitable[None]]) -> Hook:
    """A hook that acts in round k before the first task of the k-th kind."""
    done: set[int] = set()

    async def hook(task: pb.Task) -> None:
        number = task.attempt.round
        if number <= len(kinds) and task.kind == kinds[number - 1] and number not in done:
            done.add(number)
            await act()

    return hook


def leader(mesh: Mesh) -> ServiceProcess:
    """The coordinator that took a lease last."""
    return max(
        mesh.coordinators, key=lambda item: max([line for line in item.log if "lease_taken" in line], default="")
    )


@pytest.mark.parametrize(
    "kinds",
    [
        [pb.TASK_KIND_UPLOAD, pb.TASK_KIND_UNMASK],
        pytest.param(PHASES, marks=[pytest.mark.slow, pytest.mark.timeout(590)]),
    ],
)
async def test_a_replica_is_killed_and_the_other_goes_on(
    tmp_path: Path, redis_server: RedisServer, kinds: list[pb.TaskKind.ValueType]
) -> None:
    plan = small_plan(len(kinds))
    async with running_mesh(tmp_path, redis_server, hospitals=4, coordinators=2, manifest=plan) as mesh:

        async def kill() -> None:
            killed = leader(mesh)
            await killed.stop(signal.SIGKILL)
            await killed.start()

        mesh.hospitals["h02"].before = in_turn(kinds, kill)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended(within_s=400)
        committed = check_committed(mesh, job_id, len(kinds))
        assert [(item.attempt.attempt, item.burnt) for item in committed] == [(1, False)] * len(kinds)


async def test_redis_stops_for_five_seconds(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(3)) as mesh:

        async def interrupt() -> None:
            await outage(redis_server)

        mesh.hospitals["h03"].before = once(pb.TASK_KIND_UPLOAD, interrupt)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        check_committed(mesh, job_id, 3)


async def test_reports_that_redis_lost_in_an_outage_are_asked_for_again(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """As when another master takes over that the last reports had not reached: the attempt is not given up for it."""
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1)) as mesh:
        reports = [f"r:{Kind.READY.value}:{name}" for name in ("h01", "h02", "h04")]

        def forget(record: str) -> None:
            with redis_server.client() as admin:
                while not all(admin.hexists(record, report) for report in reports):
                    time.sleep(0.05)
                admin.hdel(record, *reports, f"n:{Kind.READY.value}")

        async def lose() -> None:
            await asyncio.to_thread(forget, record_key(job_id))
            await outage(redis_server)

        mesh.hospitals["h03"].before = once(pb.TASK_KIND_TRAIN, lose)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        (committed,) = check_committed(mesh, job_id, 1)
        assert (committed.attempt.attempt, len(committed.agreeing) >= 3) == (1, True)


@pytest.mark.parametrize(
    "kinds",
    [
        [pb.TASK_KIND_UPLOAD, pb.TASK_KIND_DECRYPT],
        pytest.param(PHASES, marks=[pytest.mark.slow, pytest.mark.timeout(590)]),
    ],
)
async def test_a_flushed_redis_costs_an_attempt_before_survivors_are_stored_and_nothing_afterwards(
    tmp_path: Path, redis_server: RedisServer, kinds: list[pb.TaskKind.ValueType]
) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(len(kinds))) as mesh:

        async def flush() -> None:
            with redis_server.client() as admin:
                admin.flushall()

        hook = in_turn(kinds, flush)
        for hospital in mesh.hospitals.values():
            hospital.before = hook
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended(within_s=400)
        committed = check_committed(mesh, job_id, len(kinds))
        for kind, item in zip(kinds, committed, strict=True):
            assert not item.burnt
            if kind in (pb.TASK_KIND_UNMASK, pb.TASK_KIND_DECRYPT):
                assert len(mesh.registry.attempts[job_id, item.version]) == 1
            else:
                assert len(mesh.registry.attempts[job_id, item.version]) == 2


async def test_survivors_that_do_not_come_back_after_a_loss_burn_the_version(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(2, phase_s=4.0)) as mesh:
        lost: list[int] = []

        async def lose(task: pb.Task) -> None:
            if task.kind == pb.TASK_KIND_UNMASK and not lost:
                lost.append(task.attempt.round)
                with redis_server.client() as admin:
                    admin.flushall()
            if lost and task.attempt.round == 1 and task.kind not in (pb.TASK_KIND_BURNT, pb.TASK_KIND_JOB_ENDED):
                raise Skipped

        mesh.hospitals["h01"].before = lose
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        first, second = check_committed(mesh, job_id, 2)
        assert first.burnt
        assert "only 3 of 4 hospitals sent their part again" in first.burnt_reason
        assert not second.burnt
        assert second.state_sha256


async def test_calls_and_answers_are_lost_everywhere(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, coordinators=2, manifest=small_plan(2)) as mesh:
        mesh.registry.flaky = 20
        for hospital in mesh.hospitals.values():
            hospital.habits.drops = 30
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        committed = check_committed(mesh, job_id, 2)
        assert not any(item.burnt for item in committed)
        assert not mesh.registry.strikes


async def test_a_job_waits_for_the_first_key_epoch_and_says_so(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1)) as mesh:
        mesh.registry.epoch = 0
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        reason = ""
        while "no key epoch" not in reason:
            with pytest.raises(FedmeshError) as caught:
                await mesh.round(job_id)
            reason = caught.value.message
            await asyncio.sleep(0.1)
        mesh.registry.epoch = 2
        await mesh.ended()
        check_committed(mesh, job_id, 1)


async def test_the_registry_is_away_for_a_while(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(2)) as mesh:

        async def interrupt() -> None:
            mesh.registry.away = True
            asyncio.get_running_loop().call_later(4, setattr, mesh.registry, "away", False)

        mesh.hospitals["h01"].before = once(pb.TASK_KIND_UPLOAD, interrupt)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        check_committed(mesh, job_id, 2)


@pytest.mark.parametrize("kind", [pb.TASK_KIND_UPLOAD, pb.TASK_KIND_DECRYPT])
async def test_an_attempt_whose_time_ran_out_while_the_registry_was_away_is_not_given_up(
    tmp_path: Path, redis_server: RedisServer, kind: pb.TaskKind.ValueType
) -> None:
    """Neither is what hospitals send thrown away in the moment in which it comes, nor a version burnt for nothing."""
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1, phase_s=4.0)) as mesh:
        returned = asyncio.Event()
        struck: list[int] = []

        async def come_back() -> None:
            await said("dependency_away")
            mesh.registry.away = False
            await said("attempt_prolonged")
            returned.set()

        async def said(event: str) -> None:
            while not any(event in line for line in leader(mesh).log):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.05)

        async def wait(task: pb.Task) -> None:
            if task.kind == kind:
                if not waiting:
                    mesh.registry.away = True
                    struck.append(task.attempt.attempt)
                    waiting.append(asyncio.create_task(come_back()))
                await returned.wait()

        waiting: list[asyncio.Task[None]] = []
        for hospital in mesh.hospitals.values():
            hospital.before = wait
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        (only,) = check_committed(mesh, job_id, 1)
        assert ([only.attempt.attempt], only.burnt) == (struck, False)


async def test_the_aggregator_is_killed_and_started_again(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(2)) as mesh:
        aggregator = mesh.aggregators[0]

        async def restart() -> None:
            await aggregator.stop(signal.SIGKILL)
            await aggregator.start()

        mesh.hospitals["h01"].before = once(pb.TASK_KIND_UPLOAD, restart)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        committed = check_committed(mesh, job_id, 2)
        assert [item.attempt.attempt for item in committed] == [1, 1]


async def test_too_few_ready_hospitals_end_the_job_after_its_attempts(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    rounds = {"absence_grace_s": 0.2, "answer_grace_s": 0.2, "max_attempts": 2}
    plan = small_plan(1, ready_s=1.0)
    async with running_mesh(tmp_path, redis_server, manifest=plan, coordinator={"rounds": rounds}) as mesh:
        await mesh.start_hospitals(["h01", "h02"])
        job_id = mesh.create_job()
        await mesh.ended(["h01", "h02"])
        job = mesh.registry.jobs[job_id]
        assert job.status == registry_pb2.JOB_STATUS_FAILED
        assert "only 2 of 4 hospitals were ready" in job.reason
        assert "h03 (gone)" in job.reason
        assert [bool(reason) for reason in mesh.registry.attempts[job_id, 1]] == [False, True]
        assert mesh.registry.event_types().count("attempt.aborted") == 2


async def test_repeated_attempts_are_limited_by_the_plans_privacy(tmp_path: Path, redis_server: RedisServer) -> None:
    plan = small_plan(1, phase_s=1.5, extra_attempts=1)
    async with running_mesh(tmp_path, redis_server, manifest=plan) as mesh:

        async def stall(task: pb.Task) -> None:
            if task.kind == pb.TASK_KIND_CONFIRM:
                raise Skipped

        for hospital in mesh.hospitals.values():
            hospital.before = stall
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        assert "the plan's privacy allows 1 repeated attempts" in mesh.registry.jobs[job_id].reason
        assert len(mesh.registry.attempts[job_id, 1]) >= 2


async def test_an_operators_cancellation_reaches_the_hospitals(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server) as mesh:

        async def cancel() -> None:
            mesh.registry.cancel(job_id, "wrong plan")
            await asyncio.sleep(1)

        for hospital in mesh.hospitals.values():
            hospital.before = once(pb.TASK_KIND_DECRYPT, cancel)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        assert all(hospital.end_reason == "cancelled: wrong plan" for hospital in mesh.hospitals.values())
        assert (await mesh.round(job_id)).phase == pb.PHASE_ABORTED
