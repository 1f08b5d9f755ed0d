"""Whole rounds with real nodes, real mutual TLS and real BFV."""

import asyncio
import hashlib
import json
import threading
from typing import Any

import numpy as np
import pytest
from fedmesh.coordinator.v1 import coordinator_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger import SqliteLedger, read_ledger
from services.hospital_node.store.state import SqliteNodeState
from services.secure_sum.secret import generate_group_key
from tests.integration.hospital_node.conftest import HOSPITALS, Consortium
from tests.support.hospital import NumpyTrainer, changed_plan


def spent(consortium: Consortium, hospital: str) -> int:
    return read_ledger(consortium.nodes[hospital].config.data_dir)[0].charged


async def test_rounds_of_a_private_plan(consortium: Consortium) -> None:
    plan = changed_plan(rounds={"count": 2}, metrics={"every_rounds": 2})
    consortium.create_job(plan)
    await consortium.start()
    first = await consortium.round()
    assert consortium.centre.of_kind("state")["h1"].metrics_json == ""
    second = await consortium.round(round_number=2, base=first)
    metrics = json.loads(consortium.centre.of_kind("state")["h1"].metrics_json)
    assert set(metrics) == {"counted"}
    last: dict[str, Any] = {"base_version": 2, "base_state_sha256": second}
    ended = consortium.task(pb.TASK_KIND_JOB_ENDED, round_number=2, reason="completed", **last)
    consortium.tell(HOSPITALS, ended)
    for name in HOSPITALS:
        home = consortium.nodes[name].config.data_dir
        await _eventually(lambda home=home: not list((home / "ciphertexts").iterdir()))
        await _eventually(lambda home=home: (home / "states" / second).is_file())
        (row,) = read_ledger(home)
        assert (row.charged, row.epsilon, row.released, row.colluders) == (2, 0.5, False, 1)
        assert row.compositions == 2 + plan.privacy.extra_attempts  # type: ignore[union-attr]
    assert len(set(consortium.centre.fingerprints.values())) == 1


async def test_sum_is_exact_without_privacy_and_noised_with_it(consortium: Consortium) -> None:
    for name in HOSPITALS:
        consortium.reconfigure(name, privacy={"allow_without_privacy": True})
    await consortium.start()
    plain = changed_plan("readmission-logistic", rounds={"count": 1})
    private = changed_plan(rounds={"count": 1}, metrics=None)
    for plan, exact in ((plain, True), (private, False)):
        consortium.create_job(plan)
        state = await consortium.round()
        trainers = [NumpyTrainer(plan, node.config.data.file.read_bytes()) for node in consortium.nodes.values()]
        start = trainers[0].initial_state()
        total = sum(trainer.contribution(start, 1) for trainer in trainers)
        expected = trainers[0].update(start, np.asarray(total), 4)
        assert (hashlib.sha256(expected).hexdigest() == state) is exact
        difference = np.frombuffer(consortium.centre.blobs[state]) - np.frombuffer(expected)
        assert exact or np.abs(difference).max() > 1


async def test_same_bytes_again_when_an_answer_was_lost(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    consortium.centre.faults.after["Upload"] = [FedmeshError(Code.STORE_UNAVAILABLE, "lost")]
    await consortium.uploaded()
    contents: dict[str, set[bytes]] = {}
    for hospital, kind, content in consortium.centre.reports:
        if kind == "bytes":
            contents.setdefault(hospital, set()).add(content)
    assert consortium.centre.count("bytes") == 5
    assert all(len(versions) == 1 for versions in contents.values())
    assert len(set.union(*contents.values())) == 4


async def test_killed_in_mid_upload_sends_the_same_bytes_after_restart(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    consortium.centre.faults.held["Upload"] = asyncio.Event()
    task = consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS)
    consortium.tell(["h1"], task)
    await consortium.centre.reported("bytes", ["h1"])
    assert spent(consortium, "h1") == 1
    await consortium.nodes["h1"].kill()
    consortium.centre.faults.held.clear()
    await consortium.restart("h1")
    consortium.tell(["h1"], task)
    await consortium.centre.reported("uploaded", ["h1"])
    sent = [content for hospital, kind, content in consortium.centre.reports if (hospital, kind) == ("h1", "bytes")]
    assert len(sent) == 2
    assert sent[0] == sent[1]
    assert spent(consortium, "h1") == 1
    assert consortium.nodes["h1"].trainers.opened == 1, "the data is not needed to send kept bytes again"


async def test_killed_between_keeping_and_charging(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    state = SqliteNodeState(consortium.nodes["h1"].config.data_dir)
    attempt = AttemptId(consortium.job_id, 1, 1)
    kept = asyncio.Event()
    loop = asyncio.get_running_loop()
    stuck = threading.Event()

    def die_before_charging(_self: SqliteLedger, *_args: Any, **_options: Any) -> None:
        loop.call_soon_threadsafe(kept.set)
        stuck.wait(20)

    with monkeypatch.context() as patch:
        patch.setattr(SqliteLedger, "charge", die_before_charging)
        consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS))
        await asyncio.wait_for(kept.wait(), 20)
        await consortium.nodes["h1"].kill()
        stuck.set()
    assert spent(consortium, "h1") == 0
    content = state.ciphertext(attempt)
    await consortium.restart("h1")
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS))
    await consortium.centre.reported("uploaded", ["h1"])
    assert consortium.centre.reports[-2] == ("h1", "bytes", content)
    assert spent(consortium, "h1") == 1


async def test_a_lost_ciphertext_is_not_replaced(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    home = consortium.nodes["h1"].config.data_dir
    next((home / "ciphertexts").iterdir()).unlink()
    await consortium.restart("h1")
    consortium.centre.reports.clear()
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS))
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_ABORTED, reason="test"))
    await consortium.trained(["h1"], attempt=2)
    assert consortium.centre.count("bytes") == 0
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS, attempt=2))
    await consortium.centre.reported("uploaded", ["h1"])
    assert spent(consortium, "h1") == 2


@pytest.mark.parametrize("phase", ["decrypt", "finalize", "attest", "committed"])
async def test_restart_in_a_later_phase(consortium: Consortium, phase: str) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    fields = consortium.summed()
    if phase == "decrypt":
        await consortium.restart("h1")
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT, **fields))
    digests = await consortium.centre.reported("digest", HOSPITALS)
    assert len({request.digest for request in digests.values()}) == 1
    if phase == "finalize":
        await consortium.restart("h1")
    fields["finalizer"] = "h1"
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_FINALIZE, **fields))
    state = (await consortium.centre.reported("state", ["h1"]))["h1"].state_sha256
    if phase == "attest":
        await consortium.restart("h2")
    fields["next_state_sha256"] = state
    consortium.tell(["h2"], consortium.task(pb.TASK_KIND_ATTEST, **fields))
    assert (await consortium.centre.reported("attest", ["h2"]))["h2"].agrees
    if phase == "committed":
        await consortium.restart("h3")
    consortium.tell(["h3"], consortium.task(pb.TASK_KIND_COMMITTED, **{**fields, "base_version": 1}))
    home = consortium.nodes["h3"].config.data_dir
    await _eventually(lambda: (home / "states" / state).is_file())
    assert spent(consortium, "h1") == 1


async def test_killed_while_finalizing_computes_the_same_state(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    fields = {**consortium.summed(), "finalizer": "h1"}
    consortium.centre.faults.after["state"] = [FedmeshError(Code.SERVICE_UNAVAILABLE, "lost")] * 1
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_FINALIZE, **fields))
    await consortium.centre.reported("state", ["h1"])
    await consortium.restart("h1")
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_FINALIZE, **fields))
    await consortium.centre.reported("state", ["h1"], times=2)
    requests = [request for _, kind, request in consortium.centre.reports if kind == "state"]
    assert len({(request.request_id, request.state_sha256) for request in requests}) == 1


async def test_absent_hospital_catches_up(consortium: Consortium) -> None:
    consortium.create_job()
    present = HOSPITALS[:3]
    await consortium.start(present)
    first = await consortium.round(present)
    await consortium.start(["h4"])
    second = await consortium.round(HOSPITALS, round_number=2, base=first)
    home = consortium.nodes["h4"].config.data_dir
    await _eventually(lambda: {path.name for path in (home / "states").iterdir()} == {first, second})
    await _eventually(lambda: not list((home / "ciphertexts").iterdir()))
    assert spent(consortium, "h4") == 1


async def test_wrong_group_key_shows_as_another_digest(consortium: Consortium) -> None:
    consortium.create_job()
    consortium.nodes["h4"].config.group_key_file.write_bytes(generate_group_key())
    await consortium.start()
    fingerprints = consortium.centre.fingerprints
    assert fingerprints["h4"] != fingerprints["h1"] == fingerprints["h2"]
    await consortium.trained()
    three = HOSPITALS[:3]
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_UPLOAD, group=HOSPITALS))
    await consortium.centre.reported("uploaded", HOSPITALS)
    fields = {**consortium.summed(three), "group": HOSPITALS}
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT, **fields))
    digests = await consortium.centre.reported("digest", HOSPITALS)
    assert len({digests[name].digest for name in three}) == 1
    assert digests["h4"].digest != digests["h1"].digest


async def test_attesting_hospital_disputes_a_wrong_state(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    fields = {**consortium.summed(), "finalizer": "h1"}
    for content, word in ((np.ones(3).tobytes(), "differs"), (b"odd", "not a state")):
        sha256 = hashlib.sha256(content).hexdigest()
        consortium.centre.blobs[sha256] = content
        consortium.centre.reports.clear()
        consortium.tell(["h2"], consortium.task(pb.TASK_KIND_ATTEST, **fields, next_state_sha256=sha256))
        verdict = (await consortium.centre.reported("attest", ["h2"]))["h2"]
        assert not verdict.agrees
        assert word in verdict.reason


async def test_patience_with_services_that_come_back(consortium: Consortium) -> None:
    consortium.create_job()
    away = [FedmeshError(Code.STORE_UNAVAILABLE, "away")] * 2
    faults = consortium.centre.faults
    for method in ("GetPlan", "Upload", "ready", "uploaded", "digest", "DownloadSum", "UploadBlob", "state"):
        faults.before[method] = list(away)
    await consortium.start()
    await consortium.round()


async def test_centre_restarts_and_the_cursor_goes_on(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    cursor = consortium.centre._sent
    await consortium.centre.stop()
    consortium.centre.watching.clear()
    await consortium.centre.start()
    await consortium.centre.connected(HOSPITALS)
    assert ("h4", f"{cursor}-0") in consortium.centre.cursors
    await consortium.uploaded()


async def test_task_stream_falls_silent(consortium: Consortium) -> None:
    """A stream that the coordinator ends is opened anew."""
    consortium.create_job()
    await consortium.start(["h1"])
    queue = consortium.centre.watching.pop("h1")
    queue.put_nowait(None)
    await consortium.centre.connected(["h1"])
    await consortium.trained(["h1"])


async def test_slow_training_neither_holds_up_shutdown_nor_newer_tasks(consortium: Consortium) -> None:
    consortium.create_job()
    gate = threading.Event()
    consortium.nodes["h1"].trainers.gate = gate
    await consortium.start(["h1"])
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN))
    await asyncio.sleep(0.1)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_ABORTED, reason="late"))
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    gate.set()
    ready = await consortium.centre.reported("ready", ["h1"])
    assert ready["h1"].attempt.attempt == 2
    assert (consortium.nodes["h1"].trainers.opened, consortium.centre.count("ready")) == (1, 1)
    gate.clear()
    consortium.create_job()
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN))
    await asyncio.sleep(0.1)
    await consortium.nodes["h1"].stop()
    gate.set()


async def _eventually(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is awaited is a file
            await asyncio.sleep(0.02)
