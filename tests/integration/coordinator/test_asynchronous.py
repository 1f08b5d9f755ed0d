"""Asynchronous groups led by a real coordinator: sealed at K, with ages, also when everything is lost in between."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from services.common.errors import Code
from tests.support.mesh import Mesh, running_mesh, small_plan
from tests.support.simulated_hospital import PATIENCE_S, SimulatedHospital, Skipped
from tests.support.stores import RedisServer


def training_on(rounds: set[int]) -> Callable[[pb.Task], Awaitable[None]]:
    """A hospital that is not ready in some rounds: it still trains."""

    async def hook(task: pb.Task) -> None:
        if task.kind == pb.TASK_KIND_TRAIN and task.attempt.round in rounds:
            raise Skipped

    return hook


async def ready(hospital: SimulatedHospital, round_number: int, attempt: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (round_number, attempt, pb.TASK_KIND_TRAIN) not in hospital.answered:  # noqa: ASYNC110 - its task
            await asyncio.sleep(0.02)


async def test_groups_are_sealed_at_k_with_the_ages_that_hospitals_signed(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """h04 is late in round 1, h01 in 2, h02 in 3, and Redis is emptied in round 2 between ready and sealing."""
    plan = small_plan(3, asynchronous=(3, 1))
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=plan) as mesh:
        h = mesh.hospitals
        h["h04"].before = training_on({1})
        h["h01"].before = training_on({2})
        h["h04"].habits.ages = {2: 1}
        h["h01"].habits.ages = {3: 1}
        lost = False

        async def lose_redis(task: pb.Task) -> None:
            nonlocal lost
            if task.kind == pb.TASK_KIND_TRAIN and task.attempt.round == 3:
                raise Skipped
            if task.kind == pb.TASK_KIND_TRAIN and task.attempt.round == 2 and not lost:
                lost = True
                await asyncio.gather(*(ready(h[name], 2, task.attempt.attempt) for name in ("h03", "h04")))
                with redis_server.client() as admin:
                    admin.flushall()

        h["h02"].before = lose_redis
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        committed = mesh.registry.rounds[job_id]
        ages = [{item.hospital_id: item.age for item in done.contributions} for done in committed]
        assert ages == [{"h01": 0, "h02": 0, "h03": 0}, {"h02": 0, "h03": 0, "h04": 1}, {"h01": 1, "h03": 0, "h04": 0}]
        assert [done.attempt.attempt for done in committed] == [1, 2, 1]
        _check_sums(mesh, committed)
        sealed = [json.loads(item.body_json) for item in mesh.registry.events.values() if item.type == "round.sealed"]
        assert [item["ages"] for item in sealed] == [[0, 0, 0], [0, 0, 1], [1, 0, 0]]


def _check_sums(mesh: Mesh, committed: list[registry_pb2.CommittedRound]) -> None:
    for done in committed:
        expected = mesh.expected_sum(done)
        for name in done.agreeing:
            seen = mesh.hospitals[name].plaintexts[done.attempt.round, done.attempt.attempt]
            assert np.array_equal(seen, expected)


@pytest.mark.slow
async def test_a_contribution_beyond_the_bound_is_refused_and_its_hospital_struck(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    plan = small_plan(3, asynchronous=(3, 1))
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=plan) as mesh:
        old = mesh.hospitals["h04"]
        old.habits.ages = {3: 2}

        async def refused_first(task: pb.Task) -> None:
            if task.kind == pb.TASK_KIND_TRAIN and task.attempt.round == 3:
                async with asyncio.timeout(PATIENCE_S):
                    while not mesh.registry.strikes:  # noqa: ASYNC110 - another hospital
                        await asyncio.sleep(0.02)

        # The three of them are enough: the job would be over before.
        mesh.hospitals["h01"].before = refused_first
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        assert [error.code for error in old.refused] == [Code.STATEMENT_INVALID]
        assert "of age 2, more than 1" in old.refused[0].message
        (strike,) = mesh.registry.strikes.values()
        assert strike.hospital_id == "h04"
        last = mesh.registry.rounds[job_id][-1]
        assert [item.hospital_id for item in last.contributions] == ["h01", "h02", "h03"]
