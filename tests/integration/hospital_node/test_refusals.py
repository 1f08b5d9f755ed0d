"""What a hospital does not do, and how it says so."""

import asyncio
import hashlib
import os
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2
from prometheus_client import REGISTRY

from services.common.errors import Code, FedmeshError
from services.hospital_node.store.ledger import read_ledger
from services.plans.document import validate
from services.plans.manifest import PlanManifest, canonical_bytes
from tests.integration.hospital_node.conftest import HOSPITALS, Consortium
from tests.support.hospital import changed_plan, deadline


async def declined(consortium: Consortium, code: Code, *words: str, **fields: Any) -> str:
    """Ask a hospital to train; it must decline the job."""
    consortium.centre.reports.clear()
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, **fields))
    request = (await consortium.centre.reported("decline", ["h1"]))["h1"]
    assert (request.job_id, request.code) == (consortium.job_id, code.value), request
    assert all(word in request.reason for word in words), request.reason
    assert consortium.centre.count("ready") == 0
    return str(request.reason)


async def test_plans_that_are_refused(consortium: Consortium) -> None:
    await consortium.start(["h1"])
    consortium.create_job(changed_plan("readmission-logistic"))
    await declined(consortium, Code.PRIVACY_REFUSED, "no privacy")
    consortium.create_job(cohort=HOSPITALS[:2])
    await declined(consortium, Code.PRIVACY_REFUSED, "a cohort of 2", "3 are needed")
    consortium.create_job(cohort=(*HOSPITALS, "h5"))
    await declined(consortium, Code.PRIVACY_REFUSED, "not members", "h5")
    consortium.create_job()
    await declined(consortium, Code.PLAN_INVALID, "its roster", roster_sha256="ab" * 32)
    consortium.centre.jobs[consortium.job_id].roster_sha256 = "ab" * 32
    await declined(consortium, Code.STATEMENT_INVALID, "does not follow", roster_sha256="ab" * 32)
    consortium.create_job(changed_plan(privacy={"epsilon": 2.0}))
    await declined(consortium, Code.PRIVACY_REFUSED, "2", "0.5")
    family = {"kind": "installed", "family": "weighted", "length": 9, "expected_patients": 100}
    plan = {**changed_plan().model_dump(mode="json"), "algorithm": family}
    consortium.create_job(validate(PlanManifest, plan, "plan", Code.PLAN_INVALID))
    await declined(consortium, Code.PLAN_INVALID, "'weighted', which this hospital does not allow")
    consortium.create_job()
    consortium.centre.plans[consortium.plan_id] = canonical_bytes(changed_plan(rounds={"count": 3}))
    await declined(consortium, Code.PLAN_INVALID, "SHA-256")
    consortium.create_job()
    consortium.centre.jobs[consortium.job_id].hospital_ids.append("h5")
    consortium.centre.jobs[consortium.job_id].rounds += 1
    await declined(consortium, Code.PLAN_INVALID, "cohort", "rounds", cohort=HOSPITALS)
    consortium.create_job()
    await consortium.trained(["h1"])


async def test_plan_beyond_the_nodes_limits(consortium: Consortium) -> None:
    consortium.reconfigure("h1", limits={"max_rounds": 5})
    await consortium.start(["h1"])
    consortium.create_job(changed_plan(rounds={"count": 6}))
    await declined(consortium, Code.PLAN_INVALID, "6", "5")


async def test_a_guarantee_against_fewer_colluders_takes_the_hospitals_own_consent(consortium: Consortium) -> None:
    """Four hospitals tolerate one colluder: h1 demands that by default, h2 agreed to none."""
    consortium.reconfigure("h2", privacy={"least_colluders": 0})
    await consortium.start(["h1", "h2"])
    consortium.create_job(changed_plan(privacy={"colluders": 0}))
    await declined(consortium, Code.PRIVACY_REFUSED, "against f = 0", "demands one against 1", "least_colluders")
    await consortium.trained(["h2"])
    (row,) = read_ledger(consortium.nodes["h2"].config.data_dir)
    assert (row.colluders, row.private) == (0, True)


async def test_budget_of_the_population_is_not_spent_twice(consortium: Consortium) -> None:
    await consortium.start(["h1"])
    consortium.create_job()
    first = consortium.job_id
    await consortium.trained(["h1"])
    consortium.create_job()
    second = consortium.job_id
    await declined(consortium, Code.BUDGET_EXHAUSTED, second, "h1", "0.5")
    consortium.job_id = first
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_JOB_ENDED, reason="cancelled"))
    await _released(consortium)
    consortium.job_id = second
    await consortium.trained(["h1"])


async def test_the_end_of_a_job_that_was_lost_gives_back_what_was_never_spent(consortium: Consortium) -> None:
    """The end is a task in Redis, which may lose it; the registry knows that the job is over."""
    await consortium.start(["h1"])
    consortium.create_job()
    first = consortium.job_id
    await consortium.trained(["h1"])
    consortium.centre.jobs[first].status = registry_pb2.JOB_STATUS_FAILED
    consortium.create_job()
    await consortium.trained(["h1"])
    await consortium.uploaded(["h1"])
    ledger = {row.job_id: (row.charged, row.released) for row in read_ledger(consortium.nodes["h1"].config.data_dir)}
    assert ledger == {first: (0, True), consortium.job_id: (1, False)}
    # What was charged stays spent, over or not.
    consortium.centre.jobs[consortium.job_id].status = registry_pb2.JOB_STATUS_COMPLETED
    consortium.create_job()
    await declined(consortium, Code.BUDGET_EXHAUSTED, "0.5")


async def test_a_node_that_starts_gives_back_what_jobs_that_are_over_never_used(consortium: Consortium) -> None:
    await consortium.start(["h1"])
    consortium.create_job()
    await consortium.trained(["h1"])
    await consortium.nodes["h1"].stop()
    consortium.centre.jobs[consortium.job_id].status = registry_pb2.JOB_STATUS_CANCELLED
    await consortium.start(["h1"])
    await _released(consortium)


async def test_attempts_beyond_the_calibrated_ones(consortium: Consortium) -> None:
    plan = changed_plan(rounds={"count": 1}, privacy={"extra_attempts": 1}, metrics=None)
    consortium.create_job(plan)
    await consortium.start(["h1"])
    for attempt in (1, 2):
        consortium.centre.reports.clear()
        await consortium.trained(["h1"], attempt=attempt)
        await consortium.uploaded(["h1"], attempt=attempt)
    consortium.centre.reports.clear()
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=3))
    request = (await consortium.centre.reported("decline", ["h1"]))["h1"]
    assert request.code == Code.BUDGET_EXHAUSTED.value
    consortium.sealed(attempt=3)
    consortium.papers[consortium.job_id, 1, 3]["sharers"] = HOSPITALS
    consortium.ask_upload(["h1"], attempt=3)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=4))
    await consortium.centre.reported("decline", ["h1"], times=2)
    assert consortium.centre.count("bytes") == 0


async def test_nothing_is_spent_while_the_clock_here_is_far_ahead(consortium: Consortium) -> None:
    """By it the task is of the day before yesterday. By a clock like that, what was spent a year ago counts no more."""
    consortium.create_job()
    await consortium.start(["h1"])
    folder = consortium.nodes["h1"].config.data_dir
    late = deadline(-2 * 86_400)

    async def dropped(task: pb.Task) -> None:
        labels = {"kind": pb.TaskKind.Name(task.kind).removeprefix("TASK_KIND_"), "outcome": "dropped"}

        def count() -> float:
            return REGISTRY.get_sample_value("fedmesh_hospital_tasks_total", labels) or 0.0

        before = count()
        consortium.tell(["h1"], task)
        async with asyncio.timeout(20):
            while True:
                if count() > before:
                    return
                await asyncio.sleep(0.02)

    await dropped(consortium.task(pb.TASK_KIND_TRAIN, deadline=late))
    assert read_ledger(folder) == []
    await consortium.trained(["h1"])
    await consortium.shared(["h1"])
    await dropped(consortium.upload_task("h1", deadline=late))
    assert [row.charged for row in read_ledger(folder)] == [0]
    await consortium.uploaded(["h1"])
    assert [row.charged for row in read_ledger(folder)] == [1]
    assert consortium.centre.count("decline") == 0


async def test_data_that_is_wrong_or_changes_in_mid_job(consortium: Consortium) -> None:
    node = consortium.nodes["h1"]
    node.trainers.error = FedmeshError(Code.DATA_INVALID, "column 'age' is missing")
    await consortium.start(["h1"])
    consortium.create_job()
    # What is wrong with the data is told to nobody else.
    reason = await declined(consortium, Code.DATA_INVALID, "does not fit the plan")
    assert "age" not in reason
    node.trainers.error = None
    consortium.centre.reports.clear()
    await consortium.trained(["h1"])
    await node.kill()
    (path,) = node.config.data.tables
    path.write_text("refreshed extract")
    await consortium.restart("h1")
    await declined(consortium, Code.DATA_INVALID, "changed", consortium.job_id)


async def test_a_bug_in_training_tells_nothing_and_the_node_lives_on(consortium: Consortium) -> None:
    node = consortium.nodes["h1"]
    node.trainers.error = ValueError("patient 4711")
    await consortium.start(["h1"])
    consortium.create_job()
    reason = await declined(consortium, Code.INTERNAL)
    assert "4711" not in reason
    node.trainers.error = None
    consortium.centre.reports.clear()
    await consortium.trained(["h1"])


@pytest.mark.parametrize(
    "group", [("h2", "h3", "h4"), ("h1", "h2"), ("h1", "h1", "h2")], ids=lambda group: "".join(group)
)
async def test_groups_that_get_no_shares(consortium: Consortium, group: tuple[str, ...]) -> None:
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    consortium.sealed(group)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_SHARE))
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    await consortium.centre.reported("ready", ["h1"], times=2)
    assert (consortium.centre.count("shares"), consortium.centre.count("decline")) == (0, 0)


async def test_an_attempt_has_one_group(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    await consortium.shared(["h1"])
    consortium.sealed(HOSPITALS[:3])
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_SHARE))
    await asyncio.sleep(0.3)
    assert consortium.centre.count("shares") == 1


@pytest.mark.parametrize("sharers", [("h1", "h2"), ("h2", "h3", "h4")], ids=lambda sharers: "".join(sharers))
async def test_sharers_that_get_no_ciphertext(consortium: Consortium, sharers: tuple[str, ...]) -> None:
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    await consortium.shared(["h1"])
    consortium.papers[consortium.job_id, 1, 1]["sharers"] = sharers
    consortium.ask_upload(["h1"])
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    await consortium.centre.reported("ready", ["h1"], times=2)
    assert consortium.centre.count("bytes") == 0
    assert read_ledger(consortium.nodes["h1"].config.data_dir)[0].charged == 0


async def test_a_list_without_its_upload_or_a_second_list_is_not_signed(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    consortium.listed(HOSPITALS[1:])
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_CONFIRM))
    await asyncio.sleep(0.3)
    assert consortium.centre.count("confirm") == 0
    consortium.listed()
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_CONFIRM))
    await consortium.centre.reported("confirm", ["h1"])
    consortium.listed(HOSPITALS[:3])
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_CONFIRM))
    await asyncio.sleep(0.3)
    assert consortium.centre.count("confirm") == 1


async def test_too_few_confirmations_open_nothing(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    await consortium.confirmed()
    papers = consortium.papers[consortium.job_id, 1, 1]
    enough = papers["confirmations"]
    papers["confirmations"] = enough[:2]
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UNMASK))
    await asyncio.sleep(0.3)
    assert consortium.centre.count("reveal") == 0
    papers["confirmations"] = enough[:3]
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UNMASK))
    await consortium.centre.reported("reveal", ["h1"])


async def test_a_second_attempt_of_a_round_is_never_revealed(consortium: Consortium) -> None:
    """Not even when the hospital was told that the first one was given up, and has forgotten its secrets."""
    consortium.create_job(changed_plan(privacy={"extra_attempts": 4}))
    await consortium.start()
    await consortium.opened()
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_ABORTED, reason="so says the centre"))
    await consortium.restart("h1")
    await consortium.trained(attempt=2)
    await consortium.uploaded(attempt=2)
    await consortium.confirmed(attempt=2)
    revealed = consortium.centre.count("reveal")
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_UNMASK, attempt=2))
    await asyncio.sleep(0.5)
    assert consortium.centre.count("reveal") == revealed


async def test_sums_that_are_not_opened(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.opened()
    good = consortium.papers[consortium.job_id, 1, 1]
    seeds = good["opening"].self_seeds
    wrong: list[dict[str, Any]] = [
        {"sum_sha256": "0" * 64},
        {"uploads": good["uploads"][:3]},
        {"opening": round_pb2.Opening(self_seeds=seeds[:3])},
        {"opening": round_pb2.Opening(self_seeds=[*seeds[:3], round_pb2.OpenedSeed(hospital_id="h4", seed=bytes(16))])},
        {"survivors": good["survivors"].replace(b'"round":1', b'"round":2')},
    ]
    for changes in wrong:
        task = consortium.task(pb.TASK_KIND_DECRYPT, finalizer="h1", **{**good, **changes})
        consortium.tell(["h2"], task)
        await asyncio.sleep(0.2)
    assert consortium.centre.count("digest") == 0
    consortium.tell(["h2"], consortium.task(pb.TASK_KIND_DECRYPT, finalizer="h1"))
    await consortium.centre.reported("digest", ["h2"])


async def test_a_sum_that_is_not_the_sum_of_the_uploads_blames_the_aggregator(
    consortium: Consortium, capsys: pytest.CaptureFixture[str]
) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.opened()
    key = (consortium.job_id, 1, 1)
    honest = consortium.centre.sums[key]
    consortium.centre.sums[key] = [bytes([segment[0] ^ 1]) + segment[1:] for segment in honest]
    sha256 = hashlib.sha256(b"".join(consortium.centre.sums[key])).hexdigest()
    consortium.tell(
        HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT, **{**consortium.papers[key], "sum_sha256": sha256})
    )
    await asyncio.sleep(0.5)
    assert consortium.centre.count("digest") == 0
    consortium.centre.sums[key] = honest
    consortium.centre.spoil_segment = lambda segment: bytes([segment[0] ^ 1]) + segment[1:]
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT))
    await asyncio.sleep(0.5)
    assert consortium.centre.count("digest") == 0
    said = "".join(capsys.readouterr())
    assert "the aggregator is to blame: segment 0 of the sum is not the sum" in said
    assert "is not the one that h" in said
    consortium.centre.spoil_segment = bytes
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT))
    await consortium.centre.reported("digest", HOSPITALS)


async def test_an_attempt_has_one_digest(consortium: Consortium) -> None:
    """After it has agreed on one sum, a hospital says nothing about another one."""
    consortium.create_job()
    await consortium.start()
    await consortium.opened()
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_DECRYPT))
    await consortium.centre.reported("digest", ["h1"])
    key = (consortium.job_id, 1, 1)
    one_more = {**consortium.papers[key], "base_state_sha256": "", "sum_sha256": "1" * 64}
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_DECRYPT, **one_more))
    await asyncio.sleep(0.3)
    assert consortium.centre.count("digest") == 1


async def test_stale_tasks_are_dropped(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start(["h1"])
    consortium.centre.refuse["ready"] = FedmeshError(Code.WRONG_STATE, "this attempt is over")
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN))
    await consortium.centre.reported("ready", ["h1"])
    consortium.centre.refuse.clear()
    await consortium.trained(["h1"], attempt=3)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, attempt=1))
    await consortium.trained(["h1"], attempt=4)
    attempts = [request.attempt.attempt for _, kind, request in consortium.centre.reports if kind == "ready"]
    assert attempts == [1, 3, 4]
    assert consortium.centre.count("bytes") == 0


async def test_repeated_tasks_repeat_the_same_reports(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    await consortium.trained(["h1"])
    ids = {request.request_id for _, kind, request in consortium.centre.reports if kind == "ready"}
    assert (consortium.centre.count("ready"), len(ids)) == (2, 1)
    for _ in range(2):
        await consortium.uploaded(["h1"])
    contents = {content for _, kind, content in consortium.centre.reports if kind == "bytes"}
    assert len(contents) == 1
    assert read_ledger(consortium.nodes["h1"].config.data_dir)[0].charged == 1


async def test_disk_full_while_keeping_a_ciphertext(consortium: Consortium) -> None:
    """Nothing leaves before it is kept; when there is room again the same task goes on."""
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    await consortium.shared(["h1"])
    home = consortium.nodes["h1"].config.data_dir
    folder = home / "ciphertexts"
    partial = folder / f".{consortium.job_id}.1.1.masked.partial"
    os.symlink("/dev/full", partial)
    consortium.ask_upload(["h1"])
    await asyncio.sleep(0.3)
    assert consortium.centre.count("bytes") == 0
    assert read_ledger(home)[0].charged == 0
    # The node removes what it could not write, and tries again by itself.
    await consortium.centre.reported("uploaded", ["h1"])
    assert read_ledger(home)[0].charged == 1


async def _released(consortium: Consortium) -> None:
    home = consortium.nodes["h1"].config.data_dir
    async with asyncio.timeout(20):
        while not any(row.released for row in read_ledger(home)):  # noqa: ASYNC110 - what is awaited is a file
            await asyncio.sleep(0.02)
