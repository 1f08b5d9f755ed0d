"""Events reach the audit log once each, whatever fails on the way."""

import asyncio
from pathlib import Path
from uuid import UUID

from fedmesh.registry.v1 import enrolment_pb2
from fedmesh.registry.v1 import registry_pb2 as pb
from prometheus_client import REGISTRY

from services.audit.main import endpoint
from services.audit.sequencer import Sequencer
from services.audit.store import MIGRATIONS as AUDIT_MIGRATIONS
from services.audit.store.postgres import PostgresStore as AuditStore
from services.audit.usecases import LogUseCases
from services.audit.witnessing import WitnessUseCases
from services.cli.tokens import Token
from services.common.clock import SystemClock
from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from services.common.migrations import migrate
from services.common.postgres import Database
from services.privacy.chain import RECOVERED, next_entry
from services.registry.domain.events import OWN_TYPES, PROMOTION_TYPES
from services.registry.relay import Relay
from services.transparency.checkpoint import generate_key, load_signing_key
from services.transparency.provenance import ATTESTED
from tests.integration.registry.enrolling import Enrolling
from tests.integration.registry.harness import (
    CONSORTIUM,
    Registry,
    an_event,
    burning,
    code,
    parts,
    refused,
    running_registry,
    striking,
)
from tests.integration.registry.test_ledgers import AT, chain, reporting
from tests.support.requests import csr
from tests.support.stores import PostgresDatabase


async def record(registry: Registry, count: int, **changes: str) -> list[str]:
    events = [an_event(**changes) for _ in range(count)]
    await call(registry.service().RecordEvents, pb.RecordEventsRequest(request_id=new_id(), events=events))
    return [event.event_id for event in events]


async def test_events_arrive_in_order_with_their_place_kept(registry: Registry) -> None:
    sent = [*await record(registry, 300), *await record(registry, 300)]
    await registry.drained()
    assert [event.event_id for event in registry.audit.events] == sent
    places = registry.sql("select event_id, log_index from registry.outbox order by seq")
    assert places == [(UUID(event_id), index) for index, event_id in enumerate(sent)]


async def test_an_event_says_which_service_reported_it(registry: Registry) -> None:
    hospital = f"spiffe://{CONSORTIUM}/hospital/north"
    await record(registry, 1, event_type="hospital.declined", actor=hospital, body_json='{"b":1, "a":"ü"}')
    await registry.drained()
    assert registry.audit.events[0].actor == hospital
    assert registry.audit.events[0].body_json == (
        f'{{"a":"\\u00fc","b":1,"recorded_for":"spiffe://{CONSORTIUM}/service/coordinator"}}'
    )


async def test_nothing_is_lost_while_the_audit_log_is_away(registry: Registry) -> None:
    registry.audit.away = True
    first = await record(registry, 5)

    async def tried() -> bool:
        return registry.audit.calls >= 3

    async def measured() -> bool:
        return REGISTRY.get_sample_value("fedmesh_registry_outbox_failures_total", {"code": "store-unavailable"}) != 0

    async def lagging() -> bool:
        waiting = REGISTRY.get_sample_value("fedmesh_registry_outbox_waiting")
        return waiting == 5 and (REGISTRY.get_sample_value("fedmesh_registry_outbox_lag_seconds") or 0.0) > 0

    await registry.settled(tried)
    await registry.settled(measured)
    await registry.settled(lagging)
    assert registry.audit.events == []
    second = await record(registry, 5)
    registry.audit.away = False
    await registry.drained()
    assert [event.event_id for event in registry.audit.events] == [*first, *second]

    async def level() -> bool:
        return REGISTRY.get_sample_value("fedmesh_registry_outbox_waiting") == 0

    await registry.settled(level)


async def test_a_lost_answer_does_not_double_an_event(registry: Registry) -> None:
    registry.audit.lose_answers = 3
    sent = await record(registry, 20)
    await registry.drained()
    assert [event.event_id for event in registry.audit.events] == sent
    assert registry.sql("select array_agg(log_index order by seq) from registry.outbox") == [(list(range(20)),)]


async def test_a_refused_event_is_set_aside_and_the_others_go_on(registry: Registry) -> None:
    registry.audit.poison = "hospital.declined"
    before = await record(registry, 3)
    bad = await record(registry, 1, event_type="hospital.declined")
    after = await record(registry, 3)
    await registry.drained()
    assert [event.event_id for event in registry.audit.events] == [*before, *after]
    aside = registry.sql("select event_id, refusal from registry.outbox where refusal is not null")
    assert aside == [(UUID(bad[0]), "an event of this type is not for this log")]


async def test_large_events_travel_in_several_calls(registry: Registry) -> None:
    body = '{"a":"' + "x" * 60_000 + '"}'
    sent: list[str] = []
    for _ in range(3):
        sent += await record(registry, 15, body_json=body)
    await registry.drained()
    assert [event.event_id for event in registry.audit.events] == sent


async def test_several_relays_share_the_work(registry: Registry) -> None:
    registry.audit.away = True
    sent = await record(registry, 400)
    others = [
        Relay(registry.store, registry.relay._append, interval_s=0.05, batch=20, claim_s=30, max_backoff_s=0.1)
        for _ in range(4)
    ]
    tasks = [asyncio.create_task(relay.run()) for relay in others]
    registry.audit.away = False
    await registry.drained()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(event.event_id for event in registry.audit.events) == sorted(sent)


async def test_events_of_a_relay_that_died_are_sent_by_another(registry: Registry) -> None:
    registry.audit.away = True
    sent = await record(registry, 3)
    registry.sql("update registry.outbox set claimed_until = clock_timestamp() + interval '1 second'")
    registry.audit.away = False
    await registry.drained()
    assert [event.event_id for event in registry.audit.events] == sent


async def test_the_real_audit_log_takes_every_kind_of_event(postgres: PostgresDatabase, tmp_path: Path) -> None:
    await asyncio.to_thread(migrate, postgres.config("audit_migrator"), "audit", AUDIT_MIGRATIONS)
    generate_key(tmp_path / "log.key", f"{CONSORTIUM}/audit")
    key = load_signing_key(tmp_path / "log.key")
    database = Database(postgres.config("audit_service"))
    await database.open()
    store = AuditStore(database)
    sequencer = Sequencer(store, key, SystemClock())
    sequencing = asyncio.create_task(sequencer.run())
    served = endpoint(LogUseCases(store, sequencer, key), WitnessUseCases(store, key, SystemClock(), 60.0))
    try:
        async with running_registry(postgres, tmp_path, served) as registry:
            # Names that the log would not take as keys.
            job = await registry.job("name", "phone", "patient", "email", rounds=2)
            await registry.commit(job, 1)
            attempt = await registry.open_attempt(job.job_id, 2)
            await registry.survive(job, 2, attempt)
            await call(registry.service().CommitRound, burning(job, 2, attempt))
            ledger = chain(job.job_id)
            ledger.append(next_entry(ledger[-1].head, RECOVERED, AT, basis="all-spent", epsilon=100.0, delta=1.0))
            for entries, head in ((ledger, None), ([], ledger[0].head)):
                await call(registry.hospital("email").ReportLedger, reporting(entries, head, by="email"))
            request = pb.SetHospitalStatusRequest(
                request_id=new_id(), hospital_id="name", status=pb.HOSPITAL_STATUS_SUSPENDED, reason="why"
            )
            await call(registry.operator().SetHospitalStatus, request)
            other = await registry.job("phone", "patient", "email", rounds=1)
            broken = call(registry.hospital("phone").UploadBlob, lambda: parts(other.job_id, b"x", sha256="a" * 64))
            assert (await refused(broken)).code is Code.CHUNK_STREAM_INVALID
            ending = pb.EndJobRequest(request_id=new_id(), job_id=other.job_id, status=pb.JOB_STATUS_FAILED)
            await call(registry.service().EndJob, ending)
            for _ in range(3):
                await call(registry.service().RecordStrike, striking("phone"))
            await _credentials(registry, tmp_path, "patient")
            await record(registry, 1, body_json='{"a":' * 29 + "1" + "}" * 29)
            await registry.drained()
            kept = registry.sql("select type, refusal, log_index from registry.outbox order by seq")
    finally:
        sequencing.cancel()
        await asyncio.gather(sequencing, return_exceptions=True)
        await database.close()
    # The others are in test_pull.py.
    assert {kind for kind, _, _ in kept} == OWN_TYPES - PROMOTION_TYPES | {"round.sealed", "call.refused", ATTESTED}
    assert [refusal for _, refusal, _ in kept if refusal] == []
    assert [index for _, _, index in kept] == list(range(len(kept)))


async def _credentials(registry: Registry, folder: Path, hospital: str) -> None:
    """Everything that can happen to a hospital's certificates."""
    enrolling = Enrolling(registry, folder)
    held = await enrolling.enrolled(hospital)
    enrolling.age(hospital)
    await enrolling.renew(held, csr(hospital))
    assert await code(enrolling.enrol(Token.generate(hospital), csr(hospital))) is Code.PERMISSION_DENIED
    request = enrolment_pb2.RevokeCertificatesRequest(request_id=new_id(), hospital_id=hospital, reason="why")
    await call((await enrolling.credentials()).RevokeCertificates, request)
    await enrolling.close()


async def test_a_refused_change_leaves_no_event(registry: Registry) -> None:
    await registry.register("north")
    request = pb.RegisterHospitalRequest(request_id=new_id(), hospital_id="north")
    assert await code(call(registry.operator().RegisterHospital, request)) is Code.ALREADY_EXISTS
    await registry.drained()
    assert registry.audit.types() == ["hospital.registered"]
