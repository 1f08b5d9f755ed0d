"""A hospital that lost its privacy ledger together with its member keys, beside the real registry and audit log."""

import asyncio
import contextlib
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb

from services.cli.reconciliation import reported_ledgers
from services.cli.witnesses import look_at
from services.common.clock import SystemClock
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.ids import new_id
from services.hospital_node.config import HospitalConfig, PrivacyConfig, read_membership
from services.hospital_node.domain.ports import Reservation
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.mesh import GrpcMesh
from services.hospital_node.recovery import Evidence, recover_ledger
from services.hospital_node.store.ledger import SqliteLedger, read_entries, read_ledger
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.usecases.rosters import Rosters
from services.hospital_node.usecases.spending import Spending
from services.privacy.approval import ApproverKey, add_signature
from services.privacy.budget import Limit
from services.privacy.chain import Head
from services.privacy.recovery import RecoveryApproval, read_recovery_approval
from services.secure_sum.roster import MemberKeys, Roster, sign_roster, succeed, verify_successor
from services.transparency.checkpoint import open_checkpoint
from services.transparency.export import ExportWriter

from .consortium import Consortium
from .harness import HOSPITALS, keys
from .test_ledgers import told

ME, OTHERS = HOSPITALS[0], HOSPITALS[1:]
PATIENCE_S = 10.0
PEOPLE = [ApproverKey(name, Ed25519PrivateKey.generate()) for name in ("admin", "second")]


@dataclass
class Node:
    """What of a hospital's node spends and reports."""

    ledger: SqliteLedger
    spending: Spending

    def reserve(self, job: str, epsilon: float) -> None:
        self.ledger.reserve(Reservation(job, "a" * 64, ME, True, epsilon, 1e-6, 1, 3, 2, HOSPITALS, "d" * 64))


@contextlib.asynccontextmanager
async def running(config: HospitalConfig) -> AsyncIterator[Node]:
    config.data_dir.mkdir(exist_ok=True)
    own, founding = read_membership(config)
    async with MeshChannel(config.registry.target, config.tls) as channel:
        mesh = GrpcMesh(ME, lambda: "", channel, channel, channel, config.limits)
        ledger = SqliteLedger(config.data_dir, SystemClock(), Limit())
        rosters = Rosters(founding, SqliteNodeState(config.data_dir), mesh)
        yield Node(ledger, Spending(own, rosters, ledger, mesh))


def configured(consortium: Consortium, own: MemberKeys, name: str) -> HospitalConfig:
    """The hospital's configuration with member keys of its own, two approvers, and the log's public key."""
    asker = consortium.asker(ME)
    own.save(consortium.folder / name)
    (consortium.folder / "log.vkey").write_text(str(asker.verifier))
    changes = {
        "member_keys": consortium.folder / name,
        "privacy": PrivacyConfig(approvers={key.name: key.public for key in PEOPLE}),
        "witness": asker.witness.model_copy(update={"log_key": consortium.folder / "log.vkey"}),
    }
    return asker.config.model_copy(update=changes)


async def replaced(consortium: Consortium, before: Roster, own: MemberKeys) -> Roster:
    """The roster that lists the hospital's new keys, signed by all others and published."""
    statement = succeed(before, [own.public(), *(keys(name).public() for name in OTHERS)])
    signatures = {name: sign_roster(statement, keys(name)) for name in OTHERS}
    listed = [round_pb2.Signature(hospital_id=name, signature=item) for name, item in signatures.items()]
    request = pb.PublishRosterRequest(request_id=new_id(), statement=statement, signatures=listed)
    await call(consortium.registry.operator().PublishRoster, request)
    return verify_successor(before, statement, signatures)


async def exported(consortium: Consortium, config: HospitalConfig, rosters: list[Roster]) -> Path:
    """The audit log, witnessed by the others, as the consortium's auditor exports it."""
    await consortium.witness(*OTHERS)
    verifier, out = consortium.asker(ME).verifier, consortium.folder / "log"
    assert config.witness is not None
    auditor = consortium.registry._tls("operator", "alice")
    async with MeshChannel(config.witness.audit.target, auditor) as channel:
        audit = channel.stub(audit_pb2_grpc.AuditServiceStub)
        best = (await look_at(audit, verifier, rosters)).best
        assert best is not None
        request = audit_pb2.ListEntriesRequest(start_index=0, limit=open_checkpoint(best[0], verifier).size)
        with ExportWriter(out) as writer:
            async for entry in stream(audit.ListEntries, request):
                writer.add(entry.index, entry.leaf)
            writer.finish(best[0], verifier)
    return out


def approved(folder: Path, head: Head, epsilon: float) -> Path:
    path = folder / "recovery.json"
    for person in PEOPLE:
        approval = RecoveryApproval(ME, head.seq, head.sha256, epsilon, 0.0)
        add_signature(path, approval, person, read_recovery_approval)
    return path


async def test_a_hospital_that_lost_ledger_and_keys_spends_nothing_twice(consortium: Consortium) -> None:
    registry = consortium.registry
    founding = await registry.found(*HOSPITALS)
    config = configured(consortium, keys(ME), "member.keys")
    async with running(config) as node:
        node.reserve("before", 0.3)
        node.ledger.charge(AttemptId("before", 1, 1), measured=False)
        await node.spending.report(PATIENCE_S)
    shutil.rmtree(config.data_dir)

    own = MemberKeys.generate(ME)
    config = configured(consortium, own, "new.keys")
    with pytest.raises(FedmeshError, match="does not list") as caught:
        await recover_ledger(config, Evidence(), SystemClock(), write=False)
    assert caught.value.code is Code.CONFIG_INVALID
    present = await replaced(consortium, founding, own)
    async with running(config) as node:
        with pytest.raises(FedmeshError, match="it was a member before") as caught:
            await node.spending.require_same(PATIENCE_S)
        assert (caught.value.code, node.ledger.head()) == (Code.CONFIG_INVALID, Head())
    (event,) = await told(registry, "ledger.differs")
    assert (event["seq"], event["kept_seq"]) == (0, 2)
    mine = next(item for item in (await reported_ledgers(registry.operator())).ledgers if item.hospital_id == ME)
    assert mine.signed, "by the key of before"

    log = await exported(consortium, config, [founding, present])
    head = mine.entries[-1].head
    evidence = Evidence(log, approved(consortium.folder, head, 0.1))
    done = (await recover_ledger(config, evidence, SystemClock(), write=True)).done
    assert done is not None
    assert done.seq == 3
    async with running(config) as node:
        await node.spending.require_same(PATIENCE_S)
        assert node.ledger.left(ME) == pytest.approx(0.1)
        with pytest.raises(FedmeshError, match="too much") as caught:
            node.reserve("too much", 0.2)
        assert caught.value.code is Code.BUDGET_EXHAUSTED
        node.reserve("what is left", 0.1)
        assert node.ledger.left(ME) == pytest.approx(0.0)
        await node.spending.report(PATIENCE_S)
    assert [row.job_id for row in read_ledger(config.data_dir)] == ["before", "what is left"]
    found = next(item for item in (await reported_ledgers(registry.operator())).ledgers if item.hospital_id == ME)
    assert found.entries == tuple(read_entries(config.data_dir))


async def test_a_hospital_compares_its_ledger_with_what_it_reported(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    await consortium.registry.found(*HOSPITALS)
    config = configured(consortium, keys(ME), "member.keys")
    file = consortium.folder / "node.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")

    async def reconcile() -> tuple[int, str]:
        """As in the image of a hospital's node, which has no packages of a stack on one machine."""
        missing = "import runpy, sys; sys.modules.update(redis=None, psutil=None, yoyo=None); sys.argv[0] = 'fedmesh'; "
        run = f"{missing}runpy.run_module('services.cli.at_hospital', run_name='__main__', alter_sys=False)"
        command = [sys.executable, "-c", run, "reconcile", "--config", str(file)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    async with running(config) as node:
        node.reserve("job", 0.3)
        await node.spending.report(PATIENCE_S)
        copy = shutil.copytree(config.data_dir, consortium.folder / "copy")
        code, said = await reconcile()
        assert (code, "equal" in said) == (0, True)
        assert not any(name in said for name in OTHERS)
        node.ledger.charge(AttemptId("job", 1, 1), measured=False)
        assert "1 not reported yet" in (await reconcile())[1]
        await node.spending.report(PATIENCE_S)
    shutil.rmtree(config.data_dir)
    shutil.move(copy, config.data_dir)
    code, said = await reconcile()
    assert (code, "older than the registry's copy" in said) == (1, True)
