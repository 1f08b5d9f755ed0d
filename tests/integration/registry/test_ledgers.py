"""The registry's copy of hospitals' privacy ledgers: it only grows, and a difference is told to the audit log."""

import json
from collections.abc import Sequence
from typing import Any

from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from services.privacy.chain import CHARGED, RECOVERED, RELEASED, RESERVED, Entry, Head, next_entry
from tests.integration.registry.harness import HOSPITALS, Registry, code, keys

AT = "2026-06-01T00:00:00+00:00"
NORTH, SOUTH = HOSPITALS[:2]


def reserved(before: Head, job: str, **changes: Any) -> Entry:
    terms = {"plan_id": "a" * 64, "population": "north", "private": 1, "epsilon": 0.5, "delta": 1e-6, "colluders": 4}
    counts = {"compositions": 14, "metrics_compositions": 4}
    return next_entry(before, RESERVED, AT, job_id=job, **{**terms, **counts, **changes})


def charged(before: Head, job: str, round_number: int = 1, attempt: int = 1) -> Entry:
    return next_entry(before, CHARGED, AT, job_id=job, round=round_number, attempt=attempt, measured=0)


def chain(job: str, charges: int = 2) -> list[Entry]:
    entries = [reserved(Head(), job)]
    for number in range(1, charges + 1):
        entries.append(charged(entries[-1].head, job, number))
    return entries


def reporting(
    entries: Sequence[Entry], head: Head | None = None, *, by: str = NORTH, signed: pb.LedgerHead | None = None
) -> pb.ReportLedgerRequest:
    head = head or entries[-1].head
    signature = keys(by).signing.sign(head.to_sign(by))
    return pb.ReportLedgerRequest(
        request_id=new_id(),
        head=signed or pb.LedgerHead(seq=head.seq, sha256=head.sha256, signature=signature),
        entries=[pb.LedgerEntry(seq=entry.seq, body=entry.body, sha256=entry.sha256) for entry in entries],
    )


async def report(registry: Registry, *args: Any, by: str = NORTH) -> pb.ReportLedgerResponse:
    response: pb.ReportLedgerResponse = await call(registry.hospital(by).ReportLedger, reporting(*args, by=by))
    return response


async def listed(registry: Registry, hospital: str = "", **fields: Any) -> pb.ListLedgersResponse:
    request = pb.ListLedgersRequest(hospital_id=hospital, **fields)
    response: pb.ListLedgersResponse = await call(registry.operator().ListLedgers, request)
    return response


async def told(registry: Registry, kind: str) -> list[dict[str, Any]]:
    await registry.drained()
    rows = registry.sql("select body_json from registry.outbox where type = %s order by seq", kind)
    return [json.loads(row[0]) for row in rows]


async def test_a_ledger_grows_and_the_same_again_is_harmless(registry: Registry) -> None:
    await registry.found(*HOSPITALS)
    entries = chain("job")
    first = await report(registry, entries[:2])
    assert (first.head.seq, first.head.sha256, first.differs) == (2, entries[1].sha256, False)
    again = await report(registry, entries)
    assert (again.head.seq, again.differs) == (3, False)
    assert (await report(registry, [], entries[-1].head)).head.seq == 3
    found = await listed(registry, NORTH)
    assert [entry.body for entry in found.entries] == [entry.body for entry in entries]
    assert [entry.seq for entry in (await listed(registry, NORTH, after_seq=1, page_size=1)).entries] == [2]
    heads = {ledger.hospital_id: ledger for ledger in (await listed(registry)).ledgers}
    assert set(heads) == set(HOSPITALS)
    assert (heads[NORTH].head.seq, heads[SOUTH].head.seq) == (3, 0)
    assert heads[SOUTH].head.sha256 == ""
    # Whoever has the roster can check that the hospital said so.
    assert Head(3, heads[NORTH].head.sha256).signed_by(
        NORTH, keys(NORTH).public().signing_key, heads[NORTH].head.signature
    )
    # A hospital sees its own.
    await report(registry, chain("job", 1), by=SOUTH)
    mine = await call(registry.hospital(SOUTH).ListLedgers, pb.ListLedgersRequest())
    assert [ledger.hospital_id for ledger in mine.ledgers] == [SOUTH]
    asked = call(registry.hospital(SOUTH).ListLedgers, pb.ListLedgersRequest(hospital_id=NORTH))
    assert await code(asked) is Code.PERMISSION_DENIED
    assert await code(listed(registry, NORTH, page_size=201)) is Code.INVALID_ARGUMENT
    bodies = await told(registry, "ledger.reported")
    assert [(body["seq"], body["entries"], body["charges"]) for body in bodies] == [(2, 2, 1), (3, 1, 1), (2, 2, 1)]
    assert await told(registry, "ledger.differs") == []


async def test_an_older_copy_and_another_history_are_told(registry: Registry) -> None:
    await registry.found(*HOSPITALS)
    entries = chain("job")
    await report(registry, entries)
    older = await report(registry, [], entries[1].head)
    assert older.differs
    assert (older.head.seq, older.head.sha256) == (3, entries[2].sha256)
    fork = [*entries[:2], next_entry(entries[1].head, CHARGED, AT, job_id="job", round=9, attempt=1, measured=1)]
    longer = [*fork, charged(fork[-1].head, "job", 10)]
    assert (await report(registry, fork)).differs
    assert (await report(registry, longer[2:])).differs
    assert (await report(registry, [], Head())).differs
    # Not in the way of the true one.
    more = charged(entries[-1].head, "job", 3)
    assert not (await report(registry, [more])).differs
    assert [body["seq"] for body in await told(registry, "ledger.differs")] == [2, 3, 4, 0]
    assert [entry.sha256 for entry in (await listed(registry, NORTH)).entries] == [e.sha256 for e in [*entries, more]]


async def test_reports_that_are_not_in_order_are_refused(registry: Registry) -> None:
    await registry.found(*HOSPITALS[:4])
    await registry.register(HOSPITALS[4])
    entries = chain("job")
    other = reserved(Head(), "other").head
    stub = registry.hospital(NORTH)
    south = pb.LedgerHead(seq=1, sha256=other.sha256, signature=keys(SOUTH).signing.sign(other.to_sign(NORTH)))
    odd = next_entry(Head(), RELEASED, AT, job_id="job", extra=1)
    unnumbered = charged(Head(), "job", 2**40)
    for request, expected in (
        (reporting(entries, head=Head(3, "0" * 64)), Code.STATEMENT_INVALID),
        (reporting([entries[0], entries[2]]), Code.STATEMENT_INVALID),
        (reporting(entries[1:]), Code.STATEMENT_INVALID),
        (reporting([odd]), Code.STATEMENT_INVALID),
        (reporting([unnumbered]), Code.STATEMENT_INVALID),
        (reporting([charged(Head(), "x\x00y")]), Code.STATEMENT_INVALID),
        (reporting([], other, signed=south), Code.PERMISSION_DENIED),
        (reporting(entries * 70), Code.TOO_LARGE),
        (reporting([], Head(2**60, "0" * 64)), Code.INVALID_ARGUMENT),
        (reporting([], Head(0, "0" * 64)), Code.INVALID_ARGUMENT),
        (reporting([], other, signed=pb.LedgerHead(seq=1, sha256=other.sha256)), Code.INVALID_ARGUMENT),
        (reporting([Entry(1, b"{}", entries[0].sha256)]), Code.STATEMENT_INVALID),
        (reporting([Entry(1, b"", entries[0].sha256)]), Code.INVALID_ARGUMENT),
    ):
        assert await code(call(stub.ReportLedger, request)) is expected, request
    # Not in the roster.
    assert await code(report(registry, entries, by=HOSPITALS[4])) is Code.PERMISSION_DENIED
    assert await code(call(registry.operator().ReportLedger, reporting(entries))) is Code.PERMISSION_DENIED
    assert registry.sql("select 1 from registry.ledger_entries") == []


async def test_contributions_without_a_charge_are_counted(registry: Registry) -> None:
    for private in (True, False):
        job = await registry.job(*HOSPITALS, private=private)
        await registry.commit(job, 1)
        if private:
            await report(registry, chain(job.job_id, charges=1))
    uncharged = {ledger.hospital_id: ledger.uncharged for ledger in (await listed(registry)).ledgers}
    assert uncharged == {name: int(name != NORTH) for name in HOSPITALS}


async def test_a_ledger_that_was_recovered_goes_on_and_the_audit_log_is_told(registry: Registry) -> None:
    await registry.found(*HOSPITALS)
    entries = chain("job", 1)
    await report(registry, entries)
    recovered = next_entry(entries[-1].head, RECOVERED, AT, basis="all-spent", epsilon=100.0, delta=1.0)
    assert not (await report(registry, [recovered])).differs
    (event,) = await told(registry, "ledger.recovered")
    assert (event["seq"], event["entry"], event["basis"], event["epsilon"]) == (3, 3, "all-spent", 100.0)
    # Whoever reads the log can check that the hospital said so.
    signature = bytes.fromhex(event["signature"])
    assert recovered.head.signed_by(NORTH, keys(NORTH).public().signing_key, signature)
    # What was put back from before is another history now.
    assert (await report(registry, [charged(entries[-1].head, "job", 2)])).differs
    assert not (await report(registry, [reserved(recovered.head, "next")])).differs
    assert [entry.seq for entry in (await listed(registry, NORTH)).entries] == [1, 2, 3, 4]
    assert len(await told(registry, "ledger.recovered")) == 1
    for amount in (-0.1, "inf"):
        wrong = json.dumps({"kind": "recovered", "at": AT, "basis": "x", "epsilon": amount, "delta": 0.0})
        entry = Entry(5, wrong.encode(), "a" * 64)
        assert await code(report(registry, [entry])) is Code.STATEMENT_INVALID
