"""Complete rounds with simulated hospitals against real coordinator and aggregator processes."""

from pathlib import Path

import numpy as np
import pytest
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from tests.support.mesh import running_mesh, small_plan
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis

EVENTS = (
    "round.sealed",
    "round.shared",
    "survivors.confirmed",
    "masks.opened",
    "sum.computed",
    "round.agreed",
    "round.finalized",
)


async def test_fifteen_hospitals_complete_a_job(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=15, manifest=small_plan(3)) as mesh:
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        job = mesh.registry.jobs[job_id]
        assert job.status == registry_pb2.JOB_STATUS_COMPLETED
        for committed in mesh.registry.rounds[job_id]:
            assert len(committed.contributions) == 15
            assert committed.upload_bytes > 1000
            assert committed.metrics_json
            expected = mesh.expected_sum(committed)
            for hospital in mesh.hospitals.values():
                seen = hospital.plaintexts[committed.attempt.round, committed.attempt.attempt]
                assert np.array_equal(seen, expected)
        assert all(hospital.versions == [1, 2, 3] for hospital in mesh.hospitals.values())
        types = mesh.registry.event_types()
        for name in EVENTS:
            assert types.count(name) == 3
        assert types.count("contribution.accepted") == 45
        seen_round = await mesh.round(job_id)
        assert seen_round.phase == pb.PHASE_COMMITTED
        assert all(item.uploaded_bytes for item in seen_round.progress)
        fallbacks = {pb.TASK_KIND_FINALIZE, pb.TASK_KIND_ATTEST}
        assert not fallbacks & {kind for hospital in mesh.hospitals.values() for kind in hospital.kinds}
        print("sealed to committed, s:", mesh.registry.committed_after)


async def test_a_job_may_have_a_part_of_the_roster(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=5, manifest=small_plan(1)) as mesh:
        await mesh.start_hospitals()
        cohort = ["h01", "h02", "h04", "h05"]
        job_id = mesh.create_job(cohort)
        await mesh.ended(cohort)
        committed = mesh.registry.rounds[job_id][0]
        assert [item.hospital_id for item in committed.contributions] == cohort
        assert np.array_equal(mesh.hospitals["h05"].plaintexts[1, 1], mesh.expected_sum(committed))
