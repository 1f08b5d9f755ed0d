"""Witnesses against a real audit service and a real PostgreSQL: cosigning, quorum, rollbacks, forks, evidence."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import psycopg
import pytest
from fedmesh.audit.v1 import audit_pb2 as pb
from fedmesh.audit.v1 import audit_pb2_grpc
from prometheus_client import REGISTRY
from psycopg import sql

from services.common.config import ClientConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.embedded.processes import free_port
from services.hospital_node.audit_log import GrpcAuditLog
from services.hospital_node.config import HospitalConfig, WitnessConfig, read_log_key
from services.hospital_node.domain.witness_ports import RefusalKind
from services.hospital_node.store.witness import read_witness
from services.secure_sum.roster import MemberKeys
from services.transparency.checkpoint import generate_key, load_signing_key, open_checkpoint
from services.transparency.cosignature import cosign
from services.transparency.witness import witnessed
from tests.support.hospital import Node, found_roster, hospital_config

from .conftest import CONSORTIUM, Replica, World, event
from .hospitals import NAMES, Hospitals


@pytest.fixture
def hospitals(world: World, tmp_path: Path) -> Hospitals:
    return Hospitals(world, tmp_path)


async def append(world: World, replica: Replica, count: int) -> None:
    async with world.client(replica) as coordinator:
        await coordinator.append(*(event(number=number) for number in range(count)))


async def cosigned(world: World, replica: Replica) -> list[pb.CosignedCheckpoint]:
    async with world.client(replica, "operator") as operator:
        answer = await call(operator.stub.ListCosignedCheckpoints, pb.ListCosignedCheckpointsRequest())
        return list(answer.checkpoints)


def copy_database(world: World, name: str, template: str) -> None:
    """What a restore of a whole backup amounts to. Whoever is still connected to either is sent away."""
    leaving = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s"
    with psycopg.connect(world.postgres.server.dsn(database="postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
        connection.execute(leaving, (template,))
        connection.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
        )


async def test_a_checkpoint_is_witnessed_by_a_quorum(world: World, hospitals: Hospitals) -> None:
    async with world.replica() as replica:
        assert await hospitals.look(replica) == ["current"] * 4, "an empty log has nothing to cosign"
        await append(world, replica, 5)
        for number, name in enumerate(NAMES, start=1):
            assert await hospitals.look(replica, name) == ["cosigned"]
            (served,) = await cosigned(world, replica)
            counted = witnessed(served.checkpoint, hospitals.roster)
            assert open_checkpoint(served.checkpoint, replica.verifier).size == served.size == 5
            assert (len(counted.signers), counted.complete) == (number, number >= 3)
        assert await hospitals.look(replica) == ["current"] * 4, "once is enough"
    async with world.replica() as replica:
        await append(world, replica, 20)
        assert await hospitals.look(replica, spot_checks=100) == ["cosigned"] * 4
        newest, before = await cosigned(world, replica)
        assert (newest.size, before.size) == (25, 5)
        assert witnessed(newest.checkpoint, hospitals.roster).complete
    assert {name: read_witness(hospitals.folder / name)[1] for name in NAMES} == {name: [] for name in NAMES}


async def test_an_older_offer_is_no_alarm(world: World, hospitals: Hospitals) -> None:
    """Replicas disagree for a moment about what is on offer; nothing is lost."""
    async with world.replica() as newest, world.replica(period_s=86_400) as daily:
        await append(world, newest, 3)
        await append(world, newest, 4)
        assert await hospitals.look(newest, "north") == ["cosigned"]
        # The day's offer is the log's first checkpoint, unless the test runs at midnight.
        if await daily_offer(world, daily) == 3:
            assert await hospitals.look(daily, "north", "east") == ["stale", "cosigned"]
        held, refusals = read_witness(hospitals.folder / "north")
        assert ([item.size for item in held.values()], refusals) == ([7], [])


async def daily_offer(world: World, replica: Replica) -> int:
    async with world.client(replica, "operator") as operator:
        answer = await call(operator.stub.GetOfferedCheckpoint, pb.GetOfferedCheckpointRequest())
        return open_checkpoint(answer.checkpoint, replica.verifier).size


def alarm_gauge() -> float | None:
    return REGISTRY.get_sample_value("fedmesh_hospital_witness_alarm")


@pytest.mark.parametrize("grown", [0, 3, 9], ids=["shorter", "as long", "longer"])
async def test_a_restored_backup_is_caught(world: World, hospitals: Hospitals, grown: int) -> None:
    """The database is copied, the log goes on and is witnessed, the copy is put back, and the log goes on again."""
    database, backup, truth = world.postgres.name, f"{world.postgres.name}_backup", f"{world.postgres.name}_truth"
    try:
        async with world.replica() as replica:
            await append(world, replica, 4)
            await hospitals.look(replica)
        copy_database(world, backup, database)
        async with world.replica() as replica:
            await append(world, replica, 3)
            assert await hospitals.look(replica, spot_checks=0) == ["cosigned"] * 4
        copy_database(world, truth, database)
        copy_database(world, database, backup)
        async with world.replica() as replica:
            if grown:
                await append(world, replica, grown)
            assert await hospitals.look(replica, spot_checks=0) == ["refused"] * 4
            assert alarm_gauge() == 1
            assert [item.size for item in await cosigned(world, replica)] == [4], "nothing new is cosigned"
            await require_alarms(world, replica, RefusalKind.FORK if grown else RefusalKind.ROLLBACK)
        evidence = read_witness(hospitals.folder / "west")[1]
        assert len(evidence) == 1
        sizes = [open_checkpoint(note, replica.verifier).size for note in (evidence[0].held, evidence[0].seen)]
        assert sizes == [7, 4 + grown], "both checkpoints are signed by the log: no word of the hospital is needed"
        copy_database(world, database, truth)
        async with world.replica() as replica:
            await append(world, replica, 1)
            assert await hospitals.look(replica) == ["cosigned"] * 4, "the true history is accepted again"
            assert alarm_gauge() == 0
        assert read_witness(hospitals.folder / "west")[1] == evidence, "and what was seen stays on record"
    finally:
        for name in (backup, truth):
            world.postgres.server.drop_database(name)


async def require_alarms(world: World, replica: Replica, kind: RefusalKind) -> None:
    async with world.client(replica, "operator") as operator:
        answer = await call(operator.stub.ListAlarms, pb.ListAlarmsRequest())
    assert {alarm.hospital_id for alarm in answer.alarms} == set(NAMES)
    assert {pb.AlarmKind.Name(alarm.kind) for alarm in answer.alarms} == {f"ALARM_KIND_{kind.name}"}
    assert answer.total == 4
    assert all(open_checkpoint(alarm.held_checkpoint, replica.verifier).size == 7 for alarm in answer.alarms)


async def test_an_alarm_is_raised_for_as_long_as_it_lasts_and_stored_once(world: World, hospitals: Hospitals) -> None:
    foreign = hospitals.folder / "foreign.key"
    generate_key(foreign, f"{CONSORTIUM}/audit")
    async with world.replica() as replica:
        await append(world, replica, 2)
        confused = Replica(replica.target, replica.log, load_signing_key(foreign).verifier)
        for count in (1, 6):
            await append(world, replica, count)
            assert await hospitals.look(confused, "north") == ["refused"]
        async with world.client(replica, "operator") as operator:
            answer = await call(operator.stub.ListAlarms, pb.ListAlarmsRequest())
        assert (answer.total, answer.alarms[0].held_checkpoint) == (1, "")
        assert answer.alarms[0].kind == pb.ALARM_KIND_BAD_CHECKPOINT
    _, (refusal,) = read_witness(hospitals.folder / "north")
    assert open_checkpoint(refusal.seen, replica.verifier).size == 3, "the first wrong one is kept"


def changed(request: pb.AddCosignatureRequest, **fields: object) -> pb.AddCosignatureRequest:
    copy = pb.AddCosignatureRequest()
    copy.CopyFrom(request)
    copy.MergeFrom(pb.AddCosignatureRequest(**fields))  # type: ignore[arg-type]
    return copy


async def test_what_nobody_could_use_is_not_stored(world: World, replica: Replica, hospitals: Hospitals) -> None:
    await append(world, replica, 3)
    await append(world, replica, 2)
    keys = hospitals.keys["north"]

    def request(name: str = "north", at: float = 0.0, size: int = 5) -> pb.AddCosignatureRequest:
        line = cosign(note, f"{CONSORTIUM}/hospital/{name}", keys.signing, int(at or time.time()))
        public = keys.signing.public_key().public_bytes_raw()
        return pb.AddCosignatureRequest(request_id=new_id(), size=size, public_key=public, cosignature=line)

    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(MeshChannel(replica.target, hospitals.tls["north"]))
        note = await GrpcAuditLog(channel, 10.0).offered()
        operator = await stack.enter_async_context(world.client(replica, "operator"))
        north = channel.stub(audit_pb2_grpc.AuditServiceStub)
        wrong: list[tuple[Code, Callable[[], pb.AddCosignatureRequest]]] = [
            (Code.PROOF_INVALID, lambda: request("south")),
            (Code.PROOF_INVALID, lambda: request(size=3)),
            (Code.NOT_FOUND, lambda: request(size=4)),
            (Code.NOT_FOUND, lambda: request(size=2**64 - 1)),
            (Code.INVALID_ARGUMENT, lambda: request(at=time.time() + 3600)),
            (Code.INVALID_ARGUMENT, lambda: changed(request(), public_key=bytes(31))),
            (Code.INVALID_ARGUMENT, lambda: changed(request(), request_id="17")),
            (Code.PROOF_INVALID, lambda: changed(request(), public_key=bytes(32))),
            (Code.PROOF_INVALID, lambda: changed(request(), cosignature=request().cosignature * 2)),
            (Code.PROOF_INVALID, lambda: changed(request(), cosignature="\u2014 x\n")),
        ]
        for code, make in wrong:
            with pytest.raises(FedmeshError) as caught:
                await call(north.AddCosignature, make())
            assert caught.value.code is code
        with pytest.raises(FedmeshError) as caught:
            await call(operator.stub.AddCosignature, request())
        assert caught.value.code is Code.PERMISSION_DENIED
        assert await cosigned(world, replica) == []
        answers = [call(north.AddCosignature, request(at=time.time() - number)) for number in range(5)]
        await asyncio.gather(*answers)
        (served,) = await cosigned(world, replica)
        assert served.checkpoint.count("/hospital/north") == 1, "one for each hospital and size"


async def test_a_node_witnesses_by_itself(world: World, replica: Replica, tmp_path: Path) -> None:
    """A whole hospital node, whose other services are away, looks again and again."""
    keys = {name: MemberKeys.generate(name) for name in NAMES}
    found_roster(tmp_path / "roster.json", CONSORTIUM, list(keys.values()))
    (tmp_path / "log.vkey").write_text(f"{replica.verifier}\n")
    away = f"127.0.0.1:{free_port()}"
    tls = world.ca.issue_hospital("north")
    settings = hospital_config(tmp_path, keys["north"], away, tls, tmp_path / "roster.json", tmp_path).model_dump()
    settings["witness"] = {
        "audit": {"target": replica.target},
        "log_key": tmp_path / "log.vkey",
        "interval_s": 0.05,
    }
    node = Node(HospitalConfig.model_validate(settings))
    try:
        await node.start()
        for count in (2, 3):
            await append(world, replica, count)
            size = open_checkpoint(await replica.log.checkpoint(), replica.verifier).size
            async with asyncio.timeout(60):
                while size not in [item.size for item in await cosigned(world, replica)]:  # noqa: ASYNC110 - a service
                    await asyncio.sleep(0.05)
    finally:
        await node.stop()


def test_the_key_of_another_log_is_refused(world: World, replica: Replica, tmp_path: Path) -> None:
    key = tmp_path / "log.vkey"
    witness = WitnessConfig(audit=ClientConfig(target="127.0.0.1:1"), log_key=key)
    for text, problem in (("nonsense", "name.hash.base64"), (str(replica.verifier), "not of elsewhere.test/audit")):
        key.write_text(text)
        with pytest.raises(FedmeshError, match=problem) as caught:
            read_log_key(witness, "elsewhere.test")
        assert caught.value.code is Code.CONFIG_INVALID
    key.unlink()
    with pytest.raises(FedmeshError, match="cannot read"):
        read_log_key(witness, CONSORTIUM)
