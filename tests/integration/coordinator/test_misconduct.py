"""Hospitals that lie: refused by name before anybody else is bothered, or outvoted, or the end of the version."""

import asyncio
import urllib.request
from pathlib import Path

import numpy as np
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from services.embedded.processes import free_port
from tests.support.mesh import Mesh, running_mesh, small_plan
from tests.support.simulated_hospital import Away
from tests.support.stores import RedisServer

LIES = [
    pb.TASK_KIND_TRAIN,
    pb.TASK_KIND_SHARE,
    pb.TASK_KIND_UPLOAD,
    pb.TASK_KIND_CONFIRM,
    pb.TASK_KIND_UNMASK,
    pb.TASK_KIND_DECRYPT,
]
PATIENT = {"rounds": {"absence_grace_s": 0.5, "answer_grace_s": 0.5}}


def check_sums(mesh: Mesh, job_id: str) -> list[registry_pb2.CommittedRound]:
    committed = mesh.registry.rounds[job_id]
    for item in committed:
        for name in item.agreeing:
            seen = mesh.hospitals[name].plaintexts[item.attempt.round, item.attempt.attempt]
            assert np.array_equal(seen, mesh.expected_sum(item))
    return committed


async def test_a_liar_is_refused_in_every_phase_and_the_others_go_on(tmp_path: Path, redis_server: RedisServer) -> None:
    plan = small_plan(len(LIES), ready_s=120, phase_s=120)
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=plan, coordinator=PATIENT) as mesh:
        liar = mesh.hospitals["h03"]

        async def lie(task: pb.Task) -> None:
            liar.habits.lies = {LIES[task.attempt.round - 1]} if task.attempt.round <= len(LIES) else set()

        def leave(task: pb.Task) -> None:
            raise Away(lambda: mesh.registry.jobs[task.attempt.job_id].version >= task.attempt.round)

        liar.before, liar.after_refusal = lie, leave
        for name in ("h01", "h02", "h04"):
            mesh.hospitals[name].awaited = [liar]
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended(["h01", "h02", "h04"])
        committed = check_sums(mesh, job_id)
        assert [item.attempt.attempt for item in committed] == [1] * len(LIES)
        counted = ["h03" in [item.hospital_id for item in done.contributions] for done in committed]
        assert counted == [False, False, False, True, True, True]
        refused = LIES[:-1]
        assert len(liar.refused) == len(refused)
        struck = [(item.hospital_id, item.code, item.attempt.round) for item in mesh.registry.strikes.values()]
        assert struck == [("h03", "statement-invalid", number) for number in range(1, len(refused) + 1)]
        assert mesh.registry.event_types().count("call.refused") == len(refused)
        # Whoever saw another sum is named when it comes in time; it never agrees.
        assert "h03" not in committed[-1].agreeing


async def test_shares_that_do_not_open_abort_and_name_their_dealer(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1), coordinator=PATIENT) as mesh:
        dealer = mesh.hospitals["h02"]

        async def deal(task: pb.Task) -> None:
            dealer.habits.deals_badly = task.attempt.attempt == 1

        dealer.before = deal
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        assert check_sums(mesh, job_id)[0].attempt.attempt == 2
        assert "no good shares of h02" in mesh.registry.attempts[job_id, 1][1]
        assert {item.hospital_id for item in mesh.registry.strikes.values()} == {"h02"}


async def test_two_statements_over_one_ciphertext_do_not_count(tmp_path: Path, redis_server: RedisServer) -> None:
    """With the second one in the list of survivors, every hospital that checks the sum would blame the aggregator."""
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1), coordinator=PATIENT) as mesh:
        mesh.hospitals["h02"].habits.signs_twice = True
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        (done,) = check_sums(mesh, job_id)
        assert [item.hospital_id for item in done.contributions] == ["h01", "h03", "h04"]


async def test_a_seed_that_was_not_shared_burns_the_version_and_names_its_dealer(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(2), coordinator=PATIENT) as mesh:
        dealer = mesh.hospitals["h02"]

        async def deal(task: pb.Task) -> None:
            dealer.habits.deals_crookedly = task.attempt.round == 1

        dealer.before = deal
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        first, second = check_sums(mesh, job_id)
        assert first.burnt
        assert "the opened seed of h02 is not the one that it advertised" in first.burnt_reason
        assert not second.burnt
        assert {item.hospital_id for item in mesh.registry.strikes.values()} == {"h02"}


async def test_states_that_differ_in_their_last_bits_are_attested(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1), coordinator=PATIENT) as mesh:
        for name in ("h03", "h04"):
            mesh.hospitals[name].habits.other_state = True
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        committed = check_sums(mesh, job_id)[0]
        assert len(committed.attesting) >= 3
        assert pb.TASK_KIND_ATTEST in {kind for hospital in mesh.hospitals.values() for kind in hospital.kinds}


async def test_a_disputed_state_stops_the_job_and_is_counted(tmp_path: Path, redis_server: RedisServer) -> None:
    address = f"127.0.0.1:{free_port()}"
    settings = PATIENT | {"server": {"metrics_listen": address}}
    async with running_mesh(tmp_path, redis_server, hospitals=4, coordinator=settings) as mesh:
        for name in ("h03", "h04"):
            mesh.hospitals[name].habits.other_state = True
        for hospital in mesh.hospitals.values():
            hospital.habits.lies = {pb.TASK_KIND_ATTEST}
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        job = mesh.registry.jobs[job_id]
        assert job.status == registry_pb2.JOB_STATUS_FAILED
        assert "disputed" in job.reason
        assert "attempt.aborted" in mesh.registry.event_types()
        assert not mesh.registry.rounds[job_id]
        assert all("disputed" in hospital.end_reason for hospital in mesh.hospitals.values())
        page = await asyncio.to_thread(_page, address)
        assert 'fedmesh_coordinator_jobs_failed_total{cause="disputed"} 1.0' in page
        assert 'fedmesh_coordinator_jobs_failed_total{cause="attempts"} 0.0' in page


def _page(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


async def test_a_state_that_was_not_stored_is_asked_of_another(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1), coordinator=PATIENT) as mesh:
        named: list[str] = []

        async def note(task: pb.Task) -> None:
            if task.kind == pb.TASK_KIND_DECRYPT:
                named.append(task.finalizer)
                mesh.registry.unstored = {task.finalizer}

        for hospital in mesh.hospitals.values():
            hospital.before = note
        await mesh.start_hospitals()
        job_id = mesh.create_job()
        await mesh.ended()
        assert check_sums(mesh, job_id)[0].finalizer not in named
