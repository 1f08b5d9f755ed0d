"""PostgreSQL goes away in the middle and comes back; the registry goes on without a restart."""

import asyncio

from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from tests.integration.registry.harness import HOSPITALS, Registry, a_round, code, storing


async def test_a_stopped_database_is_told_and_survived(registry: Registry) -> None:
    job = await registry.job()
    attempt, state = await registry.ready(job)
    request = pb.CommitRoundRequest(request_id=new_id(), round=a_round(job, 1, attempt, state))

    await asyncio.to_thread(registry.database.stop)
    assert not await registry.pool.ready()
    asked = pb.GetJobRequest(job_id=job.job_id)
    assert await code(call(registry.operator().GetJob, asked)) is Code.STORE_UNAVAILABLE
    waiting = asyncio.create_task(call(registry.service().CommitRound, request, timeout_s=20, patience_s=60))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(registry.database.start)

    assert (await waiting).job.version == 1
    assert await registry.pool.ready()
    await registry.drained()
    assert registry.audit.types()[-2:] == ["round.committed", "model.attested"]


async def test_changes_in_flight_when_the_database_restarts_happen_once(registry: Registry) -> None:
    job = await registry.job(rounds=12)

    async def restart() -> None:
        await asyncio.sleep(0.3)
        await asyncio.to_thread(registry.database.stop)
        await asyncio.to_thread(registry.database.start)

    async def commit(version: int) -> None:
        opening = pb.OpenAttemptRequest(request_id=new_id(), job_id=job.job_id, round=version)
        opened = await call(registry.service().OpenAttempt, opening, timeout_s=20, patience_s=60)
        attempt = opened.attempt.attempt
        await call(registry.service().StoreSurvivors, storing(job, version, attempt), timeout_s=20, patience_s=60)
        request = pb.CommitRoundRequest(request_id=new_id(), round=a_round(job, version, attempt, state))
        await call(registry.service().CommitRound, request, timeout_s=20, patience_s=60)

    state = await registry.upload(HOSPITALS[0], job.job_id, b"state")
    restarting = asyncio.create_task(restart())
    for version in range(1, 13):
        await commit(version)
        await asyncio.sleep(0.03)
    await restarting
    await registry.drained()
    assert registry.sql("select version, attempt from registry.rounds order by 1") == [(v, 1) for v in range(1, 13)]
    assert registry.audit.types().count("round.committed") == 12
    assert registry.audit.types().count("attempt.opened") == 12
