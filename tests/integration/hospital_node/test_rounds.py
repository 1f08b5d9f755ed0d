"""Whole rounds with real nodes, real mutual TLS and real BFV."""

import asyncio
import hashlib
import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedmesh.coordinator.v1 import coordinator_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.hospital_node.secret_sum import MaskedSums
from services.hospital_node.store.attacks import ATTACKS_FOLDER, load_reports
from services.hospital_node.store.epochs import EpochFiles
from services.hospital_node.store.ledger import SqliteLedger, read_ledger
from services.hospital_node.store.personal import PERSONAL_FOLDER, load_personal
from services.hospital_node.usecases.states import seal
from services.secure_sum.parameters import BFV_N4096_Q60_T44_PK_V1
from services.secure_sum.wire import Layout
from tests.integration.hospital_node.conftest import HOSPITALS, Consortium
from tests.support.hospital import NumpyTrainer, changed_plan


def spent(consortium: Consortium, hospital: str) -> int:
    return read_ledger(consortium.nodes[hospital].config.data_dir)[0].charged


async def test_rounds_of_a_private_plan(consortium: Consortium) -> None:
    plan = changed_plan(rounds={"count": 2}, metrics={"every_rounds": 2})
    consortium.create_job(plan)
    await consortium.start()
    first = await consortium.round()
    assert consortium.centre.of_kind("digest")["h1"].metrics_json == ""
    second = await consortium.round(round_number=2, base=first)
    metrics = json.loads(consortium.centre.of_kind("digest")["h1"].metrics_json)
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


async def test_personal_models_are_made_after_the_last_round_and_stay(consortium: Consortium) -> None:
    plan = changed_plan(rounds={"count": 1}, metrics=None, personalisation={"proximal_weights": [1.0]})
    consortium.create_job(plan)
    await consortium.start()
    shared = await consortium.round()
    ended = consortium.task(pb.TASK_KIND_JOB_ENDED, base_version=1, base_state_sha256=shared)
    # This hospital was away when the job ended, and has forgotten everything that is not on its disk.
    await consortium.nodes["h4"].kill()
    consortium.tell(HOSPITALS, ended)
    await consortium.restart("h4")
    consortium.tell(["h4"], ended)
    spent_before = {name: spent(consortium, name) for name in HOSPITALS}
    models, sealed = set[bytes](), list[bytes]()
    for name, node in consortium.nodes.items():
        home = node.config.data_dir / PERSONAL_FOLDER

        def model(home: Path = home, name: str = name) -> bytes | None:
            return load_personal(home, consortium.keys[name], consortium.job_id, 1)

        await _eventually(lambda model=model: model() is not None)
        kept = model()
        assert kept is not None
        assert kept == NumpyTrainer(plan, node.config.data.tables[0].read_bytes()).personalise(
            consortium.open_state(shared, 1)
        )
        models.add(kept)
        sealed.append(next(home.iterdir()).read_bytes())
    assert len(models) == len(HOSPITALS)
    reports = [content for _hospital, _kind, content in consortium.centre.reports]
    sent = [*consortium.centre.blobs.values()]
    sent += [content if isinstance(content, bytes) else content.SerializeToString() for content in reports]
    assert not any(model in content for model in (*models, *sealed) for content in sent)
    assert {name: spent(consortium, name) for name in HOSPITALS} == spent_before, "it is no release"


@pytest.mark.parametrize(
    ("declared", "version"), [(None, 2), ({"proximal_weights": [1.0]}, 1)], ids=["not declared", "job cut short"]
)
async def test_no_personal_model_unless_the_plan_says_so_and_was_carried_out(
    consortium: Consortium, declared: dict[str, Any] | None, version: int
) -> None:
    consortium.create_job(changed_plan(rounds={"count": 2}, metrics=None, personalisation=declared))
    await consortium.start()
    state = await consortium.round()
    if version == 2:
        state = await consortium.round(round_number=2, base=state)
    ended = consortium.task(pb.TASK_KIND_JOB_ENDED, round_number=version, base_version=version, base_state_sha256=state)
    for name, node in consortium.nodes.items():
        consortium.tell([name], ended)
        told = f"{consortium.centre._sent}-0"
        # A cursor is saved once everything up to it is done.
        await _eventually(lambda node=node, told=told: _saved_cursor(node.config.data_dir) == told)
        assert list((node.config.data_dir / PERSONAL_FOLDER).iterdir()) == []


async def test_attacks_on_a_hospitals_own_rows_stay_in_the_hospital(consortium: Consortium) -> None:
    plan = changed_plan(rounds={"count": 2}, checks={"least_subgroup_count": 1, "subgroups": [{"column": "race"}]})
    consortium.create_job(plan)
    # What one of them cannot do does not show.
    consortium.nodes["h2"].trainers.attack_error = RuntimeError("no memory")
    await consortium.start()
    first = await consortium.round()
    state = await consortium.round(round_number=2, base=first)
    ended = consortium.task(pb.TASK_KIND_JOB_ENDED, round_number=2, base_version=2, base_state_sha256=state)
    for name, node in consortium.nodes.items():
        consortium.tell([name], ended)
        told = f"{consortium.centre._sent}-0"
        await _eventually(lambda node=node, told=told: _saved_cursor(node.config.data_dir) == told)
        home = node.config.data_dir / ATTACKS_FOLDER
        reports = load_reports(home)
        if name == "h2":
            assert reports == []
            continue
        trainer = NumpyTrainer(plan, node.config.data.tables[0].read_bytes())
        (report,) = reports
        assert report.attacks == trainer.attack(consortium.open_state(state, 2))
        assert (report.job_id, report.version) == (consortium.job_id, 2)
    said = {name: json.loads(statement) for name, statement in consortium.centre.checked.items()}
    assert {name: facts.pop("hospital_id") for name, facts in said.items()} == {name: name for name in HOSPITALS}
    assert all(facts == said["h1"] for facts in said.values())
    assert set(said["h1"]["results"]) == {"saturation", "membership-inference", "subgroups"}


def _saved_cursor(data_dir: Path) -> str:
    """Read beside the running node, which must not notice."""
    with closing(sqlite3.connect(f"file:{data_dir}/state.sqlite?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT value FROM cursor").fetchone()
    return "" if row is None else str(row[0])


async def test_sum_is_exact_without_privacy_and_noised_with_it(consortium: Consortium) -> None:
    for name in HOSPITALS:
        consortium.reconfigure(name, privacy={"allow_without_privacy": True})
    await consortium.start()
    plain = changed_plan("readmission-logistic", rounds={"count": 1})
    private = changed_plan(rounds={"count": 1}, metrics=None)
    for plan, exact in ((plain, True), (private, False)):
        consortium.create_job(plan)
        state = await consortium.round()
        trainers = [NumpyTrainer(plan, node.config.data.tables[0].read_bytes()) for node in consortium.nodes.values()]
        start = trainers[0].initial_state()
        total = sum(trainer.contribution(start, 1) for trainer in trainers)
        expected = trainers[0].update(start, np.asarray(total), 4)
        reached = consortium.open_state(state, 1)
        assert (expected == reached) is exact
        assert expected not in consortium.centre.blobs[state]
        difference = np.frombuffer(reached) - np.frombuffer(expected)
        assert exact or np.abs(difference).max() > 1


async def test_a_round_under_a_public_key_is_exact(consortium: Consortium) -> None:
    for name in HOSPITALS:
        consortium.reconfigure(name, privacy={"allow_without_privacy": True})
    consortium.centre.public_key = True
    plan = changed_plan(
        "readmission-logistic", rounds={"count": 1}, encoding={"parameter_set": BFV_N4096_Q60_T44_PK_V1.name}
    )
    consortium.create_job(plan)
    await consortium.start()
    state = await consortium.round()
    trainers = [NumpyTrainer(plan, node.config.data.tables[0].read_bytes()) for node in consortium.nodes.values()]
    start = trainers[0].initial_state()
    total = sum(trainer.contribution(start, 1) for trainer in trainers)
    assert consortium.open_state(state, 1) == trainers[0].update(start, np.asarray(total), 4)
    uploads = [content for _hospital, kind, content in consortium.centre.reports if kind == "bytes"]
    layout = Layout(BFV_N4096_Q60_T44_PK_V1, plan.vector_length, plan.encoding.lanes)
    assert {len(upload) for upload in uploads} == {layout.sum_bytes}


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
    await consortium.shared()
    consortium.centre.faults.held["Upload"] = asyncio.Event()
    task = consortium.upload_task("h1")
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


@pytest.mark.parametrize("method", ["keep", "charge"])
async def test_killed_before_one_of_the_two_is_durable(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Nothing is sent until the upload is kept and the attempt charged, in whichever order the disk answers."""
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.shared()
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    stuck = threading.Event()

    def die(*_args: Any, **_options: Any) -> None:
        loop.call_soon_threadsafe(asked.set)
        stuck.wait(20)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedSums if method == "keep" else SqliteLedger, method, die)
        consortium.ask_upload(["h1"])
        await asyncio.wait_for(asked.wait(), 20)
        await asyncio.sleep(0.2)
        await consortium.nodes["h1"].kill()
        stuck.set()
    assert consortium.centre.count("bytes") == 0
    await consortium.restart("h1")
    consortium.ask_upload(["h1"])
    await consortium.centre.reported("uploaded", ["h1"])
    assert spent(consortium, "h1") == 1
    await consortium.uploaded(HOSPITALS[1:])
    await consortium.unmasked()


async def test_a_lost_ciphertext_is_not_replaced(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    home = consortium.nodes["h1"].config.data_dir
    await _eventually(lambda: [path.suffix for path in (home / "ciphertexts").iterdir()] == [".masked"])
    next((home / "ciphertexts").iterdir()).unlink()
    await consortium.restart("h1")
    sent = consortium.centre.count("bytes")
    consortium.ask_upload(["h1"])
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_ABORTED, reason="test"))
    await consortium.trained(["h1"], attempt=2)
    assert consortium.centre.count("bytes") == sent
    await consortium.uploaded(["h1"], attempt=2)
    assert spent(consortium, "h1") == 2


async def test_a_damaged_masked_ciphertext_is_made_again_while_the_unmasked_one_is_there(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine may damage the masked file, which is not waited for before it is sent."""
    consortium.create_job()
    await consortium.start(["h1"])
    await consortium.trained(["h1"])
    monkeypatch.setattr(MaskedSums, "settle", lambda *_: None)
    await consortium.uploaded(["h1"])
    home = consortium.nodes["h1"].config.data_dir
    (masked,) = (home / "ciphertexts").glob("*.masked")
    masked.write_bytes(masked.read_bytes()[:100])
    await consortium.restart("h1")
    consortium.ask_upload(["h1"])
    await consortium.centre.reported("uploaded", ["h1"], times=2)
    assert len({content for _, kind, content in consortium.centre.reports if kind == "bytes"}) == 1
    assert consortium.centre.count("bytes") == 2


PHASES = ("share", "upload", "confirm", "unmask", "decrypt", "finalize", "attest", "committed")


@pytest.mark.parametrize("phase", PHASES)
async def test_killed_between_any_two_steps(consortium: Consortium, phase: str) -> None:
    """A hospital that was killed goes on with the same secrets, the same bytes and one charge."""
    consortium.create_job()
    await consortium.start()

    async def killed_before(step: str) -> None:
        if step == phase:
            await consortium.restart("h1")

    await consortium.trained()
    await killed_before("share")
    await consortium.shared()
    await killed_before("upload")
    await consortium.uploaded()
    await killed_before("confirm")
    await consortium.confirmed()
    await killed_before("unmask")
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_UNMASK))
    await consortium.centre.reported("reveal", HOSPITALS)
    consortium.compute()
    await killed_before("decrypt")
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT, finalizer="h4"))
    digests = await consortium.centre.reported("digest", HOSPITALS)
    assert len({(request.digest, request.next_state_sha256) for request in digests.values()}) == 1
    await killed_before("finalize")
    named = {**consortium.papers[consortium.job_id, 1, 1], "finalizer": "h1"}
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_FINALIZE, **named))
    state = (await consortium.centre.reported("state", ["h1"]))["h1"].state_sha256
    assert state == digests["h1"].next_state_sha256
    await killed_before("attest")
    named.update(finalizer="h2", next_state_sha256=state)
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_ATTEST, **named))
    assert (await consortium.centre.reported("attest", ["h1"]))["h1"].agrees
    await killed_before("committed")
    consortium.tell(["h1"], consortium.task(pb.TASK_KIND_COMMITTED, **{**named, "base_version": 1}))
    home = consortium.nodes["h1"].config.data_dir
    await _eventually(lambda: (home / "states" / state).is_file())
    await _eventually(lambda: not list((home / "ciphertexts").iterdir()))
    assert spent(consortium, "h1") == 1


async def test_every_step_repeated_gives_the_same_bytes(consortium: Consortium) -> None:
    """The centre may lose its store and ask again: UPLOAD comes once more after UNMASK, and all answers stay."""
    consortium.create_job()
    await consortium.start()
    await consortium.opened()
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT, finalizer="h1"))
    await consortium.centre.reported("digest", HOSPITALS)
    first = {kind: consortium.centre.of_kind(kind) for kind in ("shares", "uploaded", "confirm", "reveal", "digest")}
    sent = {content for _, kind, content in consortium.centre.reports if kind == "bytes"}
    await consortium.restart("h2")
    consortium.centre.reports.clear()
    again = (
        ("shares", consortium.task(pb.TASK_KIND_SHARE)),
        ("uploaded", None),
        ("confirm", consortium.task(pb.TASK_KIND_CONFIRM)),
        ("reveal", consortium.task(pb.TASK_KIND_UNMASK)),
        ("digest", consortium.task(pb.TASK_KIND_DECRYPT, finalizer="h1")),
    )
    for kind, task in again:
        for name in HOSPITALS:
            consortium.tell([name], task or consortium.upload_task(name))
        assert await consortium.centre.reported(kind, HOSPITALS) == first[kind], kind
    assert {content for _, kind, content in consortium.centre.reports if kind == "bytes"} == sent
    assert [spent(consortium, name) for name in HOSPITALS] == [1, 1, 1, 1]


async def test_a_step_may_be_skipped(consortium: Consortium) -> None:
    """A survivor that did not confirm in time does so when it is asked to reveal, or to agree."""
    consortium.create_job()
    await consortium.start()
    await consortium.trained()
    await consortium.uploaded()
    consortium.listed()
    three = HOSPITALS[:3]
    consortium.tell(three, consortium.task(pb.TASK_KIND_CONFIRM))
    await consortium.centre.reported("confirm", three)
    confirmed = consortium.told("confirm", (consortium.job_id, 1, 1))
    signatures = [{"hospital_id": name, "signature": report.signature} for name, report in confirmed.items()]
    consortium.papers[consortium.job_id, 1, 1]["confirmations"] = signatures
    consortium.tell(["h2", "h3", "h4"], consortium.task(pb.TASK_KIND_UNMASK))
    await consortium.centre.reported("reveal", ["h2", "h3", "h4"])
    consortium.compute()
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_DECRYPT, finalizer="h1"))
    digests = await consortium.centre.reported("digest", HOSPITALS)
    assert len({request.digest for request in digests.values()}) == 1


async def test_a_hospital_that_drops_out_after_sharing_is_not_in_the_sum(consortium: Consortium) -> None:
    for name in HOSPITALS:
        consortium.reconfigure(name, privacy={"allow_without_privacy": True})
    plan = changed_plan("readmission-logistic", rounds={"count": 1})
    consortium.create_job(plan)
    await consortium.start()
    await consortium.trained()
    await consortium.shared()
    three = HOSPITALS[:3]
    await consortium.nodes["h4"].kill()
    await consortium.uploaded(three)
    await consortium.unmasked(three)
    consortium.tell(three, consortium.task(pb.TASK_KIND_DECRYPT, finalizer="h1"))
    digests = await consortium.centre.reported("digest", three)
    trainers = [NumpyTrainer(plan, consortium.nodes[name].config.data.tables[0].read_bytes()) for name in three]
    start = trainers[0].initial_state()
    total = np.asarray(sum(trainer.contribution(start, 1) for trainer in trainers))
    reached = consortium.open_state(digests["h1"].next_state_sha256, 1)
    assert reached == trainers[0].update(start, total, 3)


async def test_a_burnt_version_keeps_the_state_before_it(consortium: Consortium) -> None:
    consortium.create_job(changed_plan(rounds={"count": 3}, metrics=None))
    await consortium.start()
    first = await consortium.round()
    await consortium.trained(round_number=2, base_state_sha256=first)
    await consortium.uploaded(round_number=2, base_state_sha256=first)
    await consortium.confirmed(round_number=2, base_state_sha256=first)
    burnt = consortium.task(pb.TASK_KIND_BURNT, round_number=2, base_state_sha256=first, reason="too few came back")
    consortium.tell(HOSPITALS, burnt)
    third = await consortium.round(round_number=3, base=first)
    assert consortium.open_state(third, 3) != consortium.open_state(first, 1)
    for name in HOSPITALS:
        assert spent(consortium, name) == 3
        home = consortium.nodes[name].config.data_dir
        await _eventually(lambda home=home: (home / "states" / third).is_file())


async def test_nothing_that_is_kept_or_sent_is_a_plain_state(consortium: Consortium) -> None:
    for name in HOSPITALS:
        consortium.reconfigure(name, privacy={"allow_without_privacy": True})
    consortium.create_job(changed_plan("readmission-logistic", rounds={"count": 2}))
    await consortium.start()
    first = await consortium.round()
    await consortium.round(round_number=2, base=first)
    plain = consortium.open_state(first, 1)
    needles = [plain[start : start + 24] for start in range(0, len(plain) - 24, 240) if any(plain[start : start + 24])]
    assert needles
    for name in HOSPITALS:
        for path in consortium.nodes[name].config.data_dir.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert not any(needle in content for needle in needles), path
    assert not any(needle in blob for needle in needles for blob in consortium.centre.blobs.values())


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


async def test_attesting_hospital_disputes_a_wrong_state(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start()
    await consortium.opened()
    keys = EpochFiles(consortium.nodes["h1"].config.data_dir).load(consortium.roster.sha256, 1)
    assert keys is not None
    wrong = seal(keys, consortium.job_id, 1, np.ones(3).tobytes()).sealed
    another_version = seal(keys, consortium.job_id, 2, np.ones(3).tobytes()).sealed
    for content, word in ((wrong, "differs"), (another_version, "not a state"), (b"odd", "not a state")):
        sha256 = hashlib.sha256(content).hexdigest()
        consortium.centre.blobs[sha256] = content
        consortium.centre.reports.clear()
        named = {**consortium.papers[consortium.job_id, 1, 1], "finalizer": "h1", "next_state_sha256": sha256}
        consortium.tell(["h2"], consortium.task(pb.TASK_KIND_ATTEST, **named))
        verdict = (await consortium.centre.reported("attest", ["h2"]))["h2"]
        assert not verdict.agrees
        assert word in verdict.reason


async def test_patience_with_services_that_come_back(consortium: Consortium) -> None:
    consortium.create_job()
    away = [FedmeshError(Code.STORE_UNAVAILABLE, "away")] * 2
    faults = consortium.centre.faults
    methods = ("GetPlan", "GetEpoch", "ListRosters", "ready", "shares", "Upload", "uploaded", "confirm", "reveal")
    for method in (*methods, "DownloadSum", "GetSegments", "UploadBlob", "digest"):
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
