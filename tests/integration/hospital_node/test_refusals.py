"""What a hospital does not do, and how it says so."""

import asyncio
import os
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.hospital_node.store.ledger import read_ledger
from services.plans.manifest import canonical_bytes
from tests.integration.hospital_node.conftest import HOSPITALS, Consortium
from tests.support.hospital import changed_plan


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
    consortium.create_job(cohort=HOSPITALS[:3])
    await declined(consortium, Code.PRIVACY_REFUSED, "4")
    consortium.create_job(changed_plan(privacy={"epsilon": 2.0}))
    await declined(consortium, Code.PRIVACY_REFUSED, "2", "0.5")
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


async def test_attempts_beyond_the_calibrated_ones(consortium: Consortium) -> None:
    plan = changed_plan(rounds={"count": 1}, privacy={"extra_attempts": 1}, metrics=None)
    consortium.create_job(plan)
    await consortium.start(["h1"])
    for attempt in (1, 2):
        consortium.centre.reports.clear()
        await consortium.trained(["h1"], attempt=attempt)
        consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, attempt=attempt, group=HOSPITALS))
        await consortium.centre.reported("uploaded", ["h1"])
    consortium.centre.reports.clear()
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=3))
    request = (await consortium.centre.reported("decline", ["h1"]))["h1"]
    assert request.code == Code.BUDGET_EXHAUSTED.value
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, attempt=3, group=HOSPITALS))
    await consortium.centre.reported("decline", ["h1"], times=2)
    assert consortium.centre.count("bytes") == 0


async def test_data_that_is_wrong_or_changes_in_mid_job(consortium: Consortium) -> None:
    node = consortium.nodes["h1"]
    node.trainers.error = FedmeshError(Code.DATA_INVALID, "column 'age' is missing")
    await consortium.start(["h1"])
    consortium.create_job()
    await declined(consortium, Code.DATA_INVALID, "age")
    node.trainers.error = None
    consortium.centre.reports.clear()
    await consortium.trained(["h1"])
    await node.kill()
    node.config.data.file.write_text("refreshed extract")
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
    "group",
    [("h2", "h3", "h4"), ("h1", "h2"), ("h1", "h2", "h9"), ("h1", "h1", "h2")],
    ids=lambda group: "".join(group),
)
async def test_groups_that_get_no_ciphertext(consortium: Consortium, group: tuple[str, ...]) -> None:
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=group))
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    await consortium.centre.reported("ready", ["h1"], times=2)
    assert (consortium.centre.count("bytes"), consortium.centre.count("decline")) == (0, 0)
    assert read_ledger(consortium.nodes["h1"].config.data_dir)[0].charged == 0


async def test_sums_that_are_not_decrypted(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    good = consortium.summed()
    wrong = [
        {"contributions": good["contributions"][:2]},
        {"group": HOSPITALS[1:]},
        {"sum_sha256": "0" * 64},
        {"contributions": [round_pb2.Contribution(hospital_id="h1", ciphertext_sha256="0" * 64)]},
    ]
    forged = [round_pb2.Contribution(hospital_id=name, ciphertext_sha256="0" * 64) for name in HOSPITALS]
    wrong.append({"contributions": forged})
    for changes in wrong:
        consortium.tell(["h2"], consortium.task(pb.TASK_KIND_DECRYPT, **{**good, **changes}))
        await asyncio.sleep(0.2)
    # The announced hash that no sum had is pinned: nothing else is decrypted in this attempt.
    consortium.tell(["h2"], consortium.task(pb.TASK_KIND_DECRYPT, **good))
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_DECRYPT, **good))
    await consortium.centre.reported("digest", ["h1"])
    await asyncio.sleep(0.2)
    assert set(consortium.centre.of_kind("digest")) == {"h1"}


async def test_a_substituted_sum_is_not_decrypted(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    three = consortium.summed(HOSPITALS[:3])
    fields = {**three, "group": HOSPITALS}
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_DECRYPT, **fields))
    await consortium.centre.reported("digest", ["h1"])
    other = consortium.summed(HOSPITALS)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_DECRYPT, **other))
    consortium.tell(["h2"], consortium.task(pb.TASK_KIND_DECRYPT, **other))
    await consortium.centre.reported("digest", ["h2"])
    await asyncio.sleep(0.2)
    assert consortium.centre.count("digest") == 2


async def test_stale_tasks_are_dropped(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start(["h1"])
    consortium.centre.refuse["ready"] = FedmeshError(Code.WRONG_STATE, "this attempt is over")
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN))
    await consortium.centre.reported("ready", ["h1"])
    consortium.centre.refuse.clear()
    await consortium.trained(["h1"], attempt=3)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, attempt=1, group=HOSPITALS))
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
    for times in (1, 2):
        consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS))
        await consortium.centre.reported("uploaded", ["h1"], times)
    contents = {content for _, kind, content in consortium.centre.reports if kind == "bytes"}
    assert len(contents) == 1
    assert read_ledger(consortium.nodes["h1"].config.data_dir)[0].charged == 1


async def test_disk_full_while_keeping_a_ciphertext(consortium: Consortium) -> None:
    """Nothing leaves before it is kept; when there is room again the same task goes on."""
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    folder = consortium.nodes["h1"].config.data_dir / "ciphertexts"
    moved = folder.rename(folder.with_name("elsewhere"))
    os.symlink("/dev/full", folder)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS))
    await asyncio.sleep(0.3)
    assert consortium.centre.count("bytes") == 0
    assert read_ledger(consortium.nodes["h1"].config.data_dir)[0].charged == 0
    folder.unlink()
    moved.rename(folder)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS))
    await consortium.centre.reported("uploaded", ["h1"])


async def _released(consortium: Consortium) -> None:
    home = consortium.nodes["h1"].config.data_dir
    async with asyncio.timeout(20):
        while not any(row.released for row in read_ledger(home)):  # noqa: ASYNC110 - what is awaited is a file
            await asyncio.sleep(0.02)
