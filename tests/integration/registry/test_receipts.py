"""A hospital's receipt, from the real registry and the real log, witnessed by the roster; and who gets none."""

from pathlib import Path

import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import registry_pb2 as pb

from services.cli.receipts import take, verify_file
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call

from .consortium import Consortium
from .harness import HOSPITALS, Registry, burning, digest

ME = HOSPITALS[1]


async def test_a_hospital_proves_that_it_was_counted_once(consortium: Consortium, tmp_path: Path) -> None:
    registry = consortium.registry
    job = await registry.job(rounds=3)
    await registry.commit(job, 1)
    await registry.commit(job, 2)
    consortium.sent(ME, job.job_id, 2, f"{ME} 2".encode())
    me, out = consortium.asker(ME), tmp_path / "receipt.json"
    await consortium.witness(*HOSPITALS[:3])
    with pytest.raises(FedmeshError, match="0 entries are witnessed: come again"):
        await take(me, job.job_id, 2, out)
    await consortium.witness(HOSPITALS[3])
    taken = await take(me, job.job_id, 2, out)
    assert verify_file(out, me.verifier, me.config.roster) == taken
    assert (taken.counted.hospital_id, taken.counted.ciphertext_sha256) == (ME, digest(f"{ME} 2".encode()))
    with pytest.raises(FedmeshError, match="cannot write"):
        await take(me, job.job_id, 2, out)
    with pytest.raises(FedmeshError, match="no version 3 yet"):
        await take(me, job.job_id, 3, out)
    attempt = await registry.open_attempt(job.job_id, 3)
    await registry.survive(job, 3, attempt)
    await call(registry.service().CommitRound, burning(job, 3, attempt))
    with pytest.raises(FedmeshError, match="burnt"):
        await take(me, job.job_id, 3, tmp_path / "burnt.json")


async def test_a_round_that_the_log_does_not_hold_yet_is_waited_for(registry: Registry) -> None:
    job = await registry.job(rounds=2)
    await registry.drained()
    registry.audit.away = True
    await registry.commit(job, 1)
    request = pb.GetRoundEntryRequest(job_id=job.job_id, version=1)
    with pytest.raises(FedmeshError, match="does not hold round 1 yet") as caught:
        await call(registry.hospital(ME).GetRoundEntry, request)
    assert caught.value.code is Code.WRONG_STATE
    registry.audit.away = False
    await registry.drained()
    found = await call(registry.hospital(ME).GetRoundEntry, request)
    assert registry.audit.events[found.index].event_id == found.event_id
    assert registry.audit.events[found.index].type == "round.committed"


async def test_who_gets_no_receipt(consortium: Consortium, tmp_path: Path) -> None:
    registry, out = consortium.registry, tmp_path / "receipt.json"
    await registry.found(*HOSPITALS)
    job = await registry.job(*HOSPITALS[:4], rounds=2)
    await registry.commit(job, 1)
    await consortium.witness(*HOSPITALS[:4])
    outsider = consortium.asker(HOSPITALS[4])
    with pytest.raises(FedmeshError) as caught:
        await take(outsider, job.job_id, 1, out)
    assert caught.value.code is Code.NOT_FOUND, "a job that it is not in does not exist for it"
    request = pb.GetRoundEntryRequest(job_id=job.job_id, version=1)
    with pytest.raises(FedmeshError) as caught:
        await call(registry.hospital(HOSPITALS[4]).GetRoundEntry, request)
    assert caught.value.code is Code.NOT_FOUND
    index = (await call(registry.hospital(ME).GetRoundEntry, request)).index
    async with MeshChannel(outsider.witness.audit.target, outsider.config.tls) as channel:
        audit = channel.stub(audit_pb2_grpc.AuditServiceStub)
        for place, code in ((index, Code.PERMISSION_DENIED), (0, Code.PERMISSION_DENIED), (10**6, Code.NOT_FOUND)):
            with pytest.raises(FedmeshError) as caught:
                await call(audit.GetEntry, audit_pb2.GetEntryRequest(index=place))
            assert caught.value.code is code
    consortium.sent(ME, job.job_id, 1, b"something else")
    with pytest.raises(FedmeshError, match="this hospital sent") as caught:
        await take(consortium.asker(ME), job.job_id, 1, out)
    assert caught.value.code is Code.PROOF_INVALID
    registry.sql("update registry.rounds set event_id = null")
    consortium.sent(ME, job.job_id, 1, f"{ME} 1".encode())
    with pytest.raises(FedmeshError, match="made no receipts"):
        await take(consortium.asker(ME), job.job_id, 1, out)
    assert not out.exists()
