"""The whole way of a job through the registry, as each caller sees it."""

import json

import pytest
from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from services.plans.manifest import canonical_bytes
from services.transparency.canonical import canonical_json
from services.transparency.merkle import leaf_hash, tree_root
from tests.integration.registry.harness import CONSORTIUM, HOSPITALS, Registry, code, digest, manifest


async def test_a_job_runs_from_plan_to_final_model(registry: Registry) -> None:
    job = await registry.job()
    assert (job.status, job.version, job.rounds) == (pb.JOB_STATUS_RUNNING, 0, 2)
    assert list(job.hospital_ids) == list(HOSPITALS)

    after_first = await registry.commit(job, 1)
    assert (after_first.status, after_first.version) == (pb.JOB_STATUS_RUNNING, 1)
    assert after_first.state_sha256 == digest(b"state 1")
    done = await registry.commit(job, 2, b"x" * (5 << 19))
    assert (done.status, done.version, done.reason) == (pb.JOB_STATUS_COMPLETED, 2, "")
    assert done.HasField("ended_at")

    hospital = registry.hospital()
    rounds = (await call(hospital.ListRounds, pb.ListRoundsRequest(job_id=job.job_id))).rounds
    assert [item.version for item in rounds] == [1, 2]
    assert [item.hospital_id for item in rounds[0].contributions] == list(HOSPITALS)
    assert [[item.age for item in done.contributions] for done in rounds] == [
        [0] * len(HOSPITALS),
        [1] + [0] * (len(HOSPITALS) - 1),
    ]
    assert rounds[0].committed_at.seconds > 0
    newest = (await call(hospital.GetModelVersion, pb.GetModelVersionRequest(job_id=job.job_id))).model_version
    assert (newest.version, newest.final, newest.private, newest.size_bytes) == (2, True, False, 5 << 19)
    assert newest.round == rounds[1]
    assert await registry.download(hospital, newest.state_sha256) == b"x" * (5 << 19)
    metrics = (await call(registry.operator().ListMetrics, pb.ListMetricsRequest(job_id=job.job_id))).metrics
    assert [(item.version, item.name, item.value) for item in metrics] == [
        (1, "validation_auroc", 0.64),
        (1, "validation_loss", 0.31),
        (2, "validation_auroc", 0.64),
        (2, "validation_loss", 0.31),
    ]


async def test_every_step_reaches_the_audit_log_in_order(registry: Registry) -> None:
    job = await registry.job(*HOSPITALS[:4], private=True, rounds=1)
    await registry.commit(job, 1)
    await registry.drained()
    assert registry.audit.types() == [
        *["hospital.registered"] * 4,
        "roster.published",
        "epoch.published",
        "plan.proposed",
        "plan.approved",
        "job.created",
        "attempt.opened",
        "survivors.stored",
        "blob.stored",
        "round.committed",
        "model.attested",
        "job.ended",
    ]
    by_type = {event.type: event for event in registry.audit.events}
    assert by_type["plan.proposed"].actor == f"spiffe://{CONSORTIUM}/operator/alice"
    assert by_type["plan.approved"].actor == f"spiffe://{CONSORTIUM}/operator/bob"
    assert by_type["blob.stored"].actor == f"spiffe://{CONSORTIUM}/hospital/{HOSPITALS[0]}"
    body = json.loads(by_type["round.committed"].body_json)
    assert (body["version"], body["private"], body["plan_id"]) == (1, True, job.plan_id)
    leaves = [
        canonical_json({**sent, "attempt": 1, "job_id": job.job_id, "version": 1}) for sent in body["contributions"]
    ]
    assert len(leaves) == 4
    assert body["contributions_root"] == tree_root(map(leaf_hash, leaves)).hex()


async def test_lists_are_paged_newest_first(registry: Registry) -> None:
    job = await registry.job()
    others = []
    for _ in range(4):
        request = pb.CreateJobRequest(request_id=new_id(), plan_id=job.plan_id, hospital_ids=HOSPITALS)
        others.append((await call(registry.operator().CreateJob, request)).job.job_id)
    seen, token, pages = [], "", 0
    while True:
        page = await call(registry.operator().ListJobs, pb.ListJobsRequest(page_size=2, page_token=token))
        seen += [item.job_id for item in page.jobs]
        pages, token = pages + 1, page.next_page_token
        if not token:
            break
    assert seen == [*reversed(others), job.job_id]
    assert pages == 3
    await registry.commit(job, 1)
    await registry.commit(job, 2)
    running = await call(registry.service().ListJobs, pb.ListJobsRequest(status=pb.JOB_STATUS_RUNNING))
    assert [item.job_id for item in running.jobs] == [*reversed(others)]
    versions = await call(registry.operator().ListModelVersions, pb.ListModelVersionsRequest(page_size=1))
    rest = pb.ListModelVersionsRequest(page_size=1, page_token=versions.next_page_token, job_id=job.job_id)
    assert [item.version for item in versions.model_versions] == [2]
    last = await call(registry.operator().ListModelVersions, rest)
    assert ([item.version for item in last.model_versions], last.next_page_token) == ([1], "")
    plans = await call(registry.operator().ListPlans, pb.ListPlansRequest())
    assert [(item.plan_id, item.manifest) for item in plans.plans] == [(job.plan_id, b"")]
    plan = await call(registry.hospital().GetPlan, pb.GetPlanRequest(plan_id=job.plan_id))
    assert plan.plan.manifest == canonical_bytes(manifest())


@pytest.mark.parametrize(
    "request_message",
    [
        pb.ListJobsRequest(page_size=501),
        pb.ListJobsRequest(page_token="?"),
        pb.ListJobsRequest(status=99),  # type: ignore[arg-type]
    ],
)
async def test_a_page_that_cannot_be_is_refused(registry: Registry, request_message: pb.ListJobsRequest) -> None:
    assert await code(call(registry.operator().ListJobs, request_message)) is Code.INVALID_ARGUMENT


async def test_a_long_list_of_rounds_fits_in_a_message(registry: Registry) -> None:
    hospitals = tuple(f"h{number:02d}-{'x' * 58}" for number in range(16))
    job = await registry.job(*hospitals, rounds=400)
    await registry.commit(job, 1)
    registry.sql("update registry.jobs set version = 400")
    registry.sql(
        "insert into registry.attempts (job_id, round, attempt, reason, opened_at) select job_id, v, 1, '', opened_at"
        " from registry.attempts, generate_series(2, 400) v"
    )
    columns = (
        "attempt, sum_sha256, state_sha256, contributions_root, agreeing, dissenting, attesting, finalizer,"
        " metrics_json, upload_bytes, sealed_at, committed_at, content_sha256"
    )
    registry.sql(
        f"insert into registry.rounds (job_id, version, {columns})"
        f" select job_id, v, {columns} from registry.rounds, generate_series(2, 400) v"
    )
    registry.sql(
        "insert into registry.contributions select hospital_id, job_id, v, ciphertext_sha256"
        " from registry.contributions, generate_series(2, 400) v"
    )
    seen: list[int] = []
    while len(seen) < 400:
        request = pb.ListRoundsRequest(job_id=job.job_id, after_version=seen[-1] if seen else 0, page_size=500)
        seen += [item.version for item in (await call(registry.service().ListRounds, request)).rounds]
    assert seen == list(range(1, 401))
    token, versions = "", []
    while True:
        asked = pb.ListModelVersionsRequest(page_size=500, page_token=token)
        page = await call(registry.operator().ListModelVersions, asked)
        versions += [item.version for item in page.model_versions]
        token = page.next_page_token
        if not token:
            break
    assert versions[0] == 400
    assert sorted(versions) == list(range(1, 401))
