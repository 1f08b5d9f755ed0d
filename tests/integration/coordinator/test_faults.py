"""What happens to a round when hospitals, replicas or stores fail in the middle of it."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from tests.support.mesh import Mesh, running_mesh, small_plan
from tests.support.simulated_hospital import Died
from tests.support.stores import RedisServer

Hook = Callable[[pb.Task], Awaitable[None]]


def once(kind: pb.TaskKind.ValueType, act: Callable[[], Awaitable[None]]) -> Hook:
    """A hook that acts before the first task of a kind, and not again."""
    done = False

    async def hook(task: pb.Task) -> None:
        nonlocal done
        if task.kind == kind and not done:
            done = True
            await act()

    return hook


def check_committed(mesh: Mesh, job_id: str, rounds: int) -> list[registry_pb2.CommittedRound]:
    """Every version exists once, and hospitals saw exactly the sum of the contributions that it names."""
    committed = mesh.registry.rounds[job_id]
    assert [item.version for item in committed] == list(range(1, rounds + 1))
    assert mesh.registry.jobs[job_id].status == registry_pb2.JOB_STATUS_COMPLETED, mesh.registry.jobs[job_id].reason
    for item in committed:
        expected = mesh.expected_sum(item)
        for name in item.agreeing:
            seen = mesh.hospitals[name].plaintexts[item.attempt.round, item.attempt.attempt]
            assert np.array_equal(seen, expected)
    types = mesh.registry.event_types()
    assert all(
        types.count(name) >= rounds for name in ("round.sealed", "sum.closed", "round.agreed", "round.finalized")
    )
    return committed


@pytest.mark.parametrize(
    "kind",
    [
        pb.TASK_KIND_TRAIN,
        pb.TASK_KIND_UPLOAD,
        pb.TASK_KIND_DECRYPT,
        pb.TASK_KIND_FINALIZE,
        pb.TASK_KIND_ATTEST,
    ],
)
async def test_a_hospital_dies_in_a_phase(
    tmp_path: Path, redis_server: RedisServer, kind: pb.TaskKind.ValueType
) -> None:
    dead: list[str] = []
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(2)) as mesh:
        for name, hospital in mesh.hospitals.items():

            async def die(task: pb.Task, name: str = name) -> None:
                if task.kind == kind and not dead:
                    dead.append(name)
                    raise Died

            hospital.before = die
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        while not dead:  # noqa: ASYNC110 - any of the hospitals
            await asyncio.sleep(0.02)
        await mesh.ended([name for name in mesh.hospitals if name not in dead])
        committed = check_committed(mesh, job_id, 2)
        assert dead[0] not in [item.hospital_id for item in committed[1].contributions]
        assert committed[0].attempt.attempt == 1
        if kind == pb.TASK_KIND_FINALIZE:
            assert committed[0].finalizer != dead[0]


async def test_a_replica_is_killed_and_the_other_goes_on(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, coordinators=2, manifest=small_plan(3)) as mesh:

        async def kill() -> None:
            leading = next(item for item in mesh.coordinators if any("lease_taken" in line for line in item.log))
            await leading.stop(signal.SIGKILL)

        mesh.hospitals["h02"].before = once(pb.TASK_KIND_DECRYPT, kill)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        committed = check_committed(mesh, job_id, 3)
        assert [item.attempt.attempt for item in committed] == [1, 1, 1]


async def test_redis_stops_for_five_seconds(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(3)) as mesh:

        async def interrupt() -> None:
            await asyncio.to_thread(redis_server.stop)
            await asyncio.sleep(5)
            await asyncio.to_thread(redis_server.start)

        mesh.hospitals["h03"].before = once(pb.TASK_KIND_UPLOAD, interrupt)
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        check_committed(mesh, job_id, 3)


@pytest.mark.parametrize("kind", [pb.TASK_KIND_UPLOAD, pb.TASK_KIND_ATTEST])
async def test_a_flushed_redis_costs_an_attempt_and_nothing_committed(
    tmp_path: Path, redis_server: RedisServer, kind: pb.TaskKind.ValueType
) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(2)) as mesh:

        async def flush() -> None:
            with redis_server.client() as admin:
                admin.flushall()

        mesh.hospitals["h01"].before = once(kind, flush)
        mesh.hospitals["h02"].before = mesh.hospitals["h01"].before
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        check_committed(mesh, job_id, 2)
        assert len(mesh.registry.attempts[job_id, 1]) == 2


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


async def test_a_disputed_state_stops_the_job(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4) as mesh:
        for hospital in mesh.hospitals.values():
            hospital.lies = True
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        job = mesh.registry.jobs[job_id]
        assert job.status == registry_pb2.JOB_STATUS_FAILED
        assert "disputed" in job.reason
        assert "attempt.aborted" in mesh.registry.event_types()
        assert not mesh.registry.rounds[job_id]
        assert all("disputed" in hospital.end_reason for hospital in mesh.hospitals.values())


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
    plan = small_plan(1, phase_s=1.0, extra_attempts=1)
    async with running_mesh(tmp_path, redis_server, manifest=plan) as mesh:

        async def stall(task: pb.Task) -> None:
            if task.kind == pb.TASK_KIND_DECRYPT:
                await asyncio.sleep(2)

        for hospital in mesh.hospitals.values():
            hospital.before = stall
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        assert "the plan's privacy allows 1 repeated attempts" in mesh.registry.jobs[job_id].reason
        assert len(mesh.registry.attempts[job_id, 1]) == 2


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
