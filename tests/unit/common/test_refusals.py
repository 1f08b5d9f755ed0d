"""What becomes of refused calls on their way to the audit log: gathered, bounded, kept while the log is away."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import REGISTRY

from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.refusal_book import ENTRIES_OF_ONE, KINDS, KINDS_OF_ONE, WINDOW_S, Refusal
from services.common.refusal_spool import RefusalSpool
from services.common.refusals import WAITING, RefusalEvent, RefusalLog

REGISTRY_SERVICE = Identity("test.local", Kind.SERVICE, "registry")


class Told:
    """A refusal log, what it sent, and the time that it sees. errors: what sending raises next, oldest first."""

    def __init__(self, spool: RefusalSpool | None = None) -> None:
        self.events: list[RefusalEvent] = []
        self.errors: list[FedmeshError] = []
        self.poison = ""
        self.seconds = 0.0
        self.log = RefusalLog(REGISTRY_SERVICE, self.send, FakeClock(), now=lambda: self.seconds, spool=spool)
        self.changed = asyncio.Event()

    async def send(self, events: Sequence[RefusalEvent]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        if self.poison and any(self.poison in event.body_json for event in events):
            raise FedmeshError(Code.INVALID_ARGUMENT, "no such event")
        self.events.extend(events)
        self.changed.set()

    async def note(self, caller: str = "north", method: str = "S/M", reason: str = "why", times: int = 1) -> None:
        who = Identity("test.local", Kind.HOSPITAL, caller) if caller else None
        for _ in range(times):
            await self.log.note(Refusal(who, method, Code.PERMISSION_DENIED, reason))

    async def holds(self, number: int) -> list[dict[str, Any]]:
        """The bodies, once there are so many."""
        async with asyncio.timeout(30):
            while len(self.events) < number:
                self.changed.clear()
                await self.changed.wait()
        return [json.loads(event.body_json) for event in self.events]


@asynccontextmanager
async def running(told: Told) -> AsyncIterator[Told]:
    task = asyncio.create_task(told.log.run())
    try:
        yield told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def dropped(bound: str) -> float:
    return REGISTRY.get_sample_value("fedmesh_access_refusals_dropped_total", {"bound": bound}) or 0.0


async def test_the_first_refusal_is_told_at_once_and_repetitions_as_one_entry_with_their_number() -> None:
    async with running(Told()) as told:
        await told.note(times=5)
        (first,) = await told.holds(1)
        assert first["count"] == 1
        event = told.events[0]
        assert (event.type, event.actor, event.subject) == ("access.refused", str(REGISTRY_SERVICE), "hospital/north")
        assert first["caller"] == "spiffe://test.local/hospital/north"
        assert (first["method"], first["code"], first["reason"]) == ("S/M", "permission-denied", "why")
        told.seconds = WINDOW_S
        await told.note(caller="")
        bodies = await told.holds(3)
        assert [(body["caller"], body["count"]) for body in bodies[1:]] == [
            ("spiffe://test.local/hospital/north", 4),
            ("unknown", 1),
        ]
        await told.note()
        assert (await told.holds(4))[-1]["count"] == 1
        assert len({event.event_id for event in told.events}) == 4


async def test_what_is_known_at_the_end_is_told_before_the_process_ends() -> None:
    async with running(Told()) as told:
        await told.note(times=3)
        await told.holds(1)
    assert [json.loads(event.body_json)["count"] for event in told.events] == [1, 2]


async def test_no_caller_makes_more_than_a_few_entries_whatever_it_varies() -> None:
    async with running(Told()) as told:
        for number in range(1000):
            await told.note(reason=f"made up {number}")
        await told.note(caller="south")
        told.seconds = WINDOW_S
        await told.note(caller="east")
        bodies = await told.holds(KINDS_OF_ONE + 4)
        north = [body for body in bodies if body["caller"].endswith("north")]
        assert len(north) == KINDS_OF_ONE + 2
        assert sum(body["count"] for body in north) == 1000
        assert {body["reason"] for body in north[KINDS_OF_ONE:]} == {"various"}


async def test_what_is_beyond_the_bounds_is_told_by_its_number() -> None:
    told = Told()
    before = {bound: dropped(bound) for bound in ("kinds", "queue", "caller")}
    for number in range(KINDS + 7):
        await told.note(caller=f"h{number}")
    assert dropped("kinds") == before["kinds"] + 7
    for window in range(1, 4):
        told.seconds = window * WINDOW_S
        for number in range(KINDS):
            await told.note(caller=f"h{number}")
    assert dropped("queue") == before["queue"] + 4 * KINDS - WAITING
    assert dropped("caller") == before["caller"]
    # As many callers as there is room for are named, and all others are one.
    beyond = WAITING // 8
    async with running(told):
        bodies = await told.holds(WAITING + beyond)
    gathered = {body["caller"]: body["count"] for body in bodies if body["code"] == "various"}
    assert len(bodies) - len(gathered) == WAITING
    assert sorted(gathered.values())[:-1] == [2] * (beyond - 1)
    assert gathered["various"] == 4 * KINDS - WAITING - 2 * (beyond - 1) + 7


async def test_a_caller_who_goes_on_while_the_log_is_away_pushes_nobody_out() -> None:
    told, before = Told(), dropped("caller")
    for window in range(ENTRIES_OF_ONE):
        told.seconds = window * WINDOW_S
        await told.note(times=3)
    await told.note(caller="south")
    async with running(told):
        bodies = await told.holds(ENTRIES_OF_ONE + 2)
    north = [body for body in bodies if body["caller"].endswith("north")]
    assert [body["caller"][-5:] for body in bodies if body not in north] == ["south"]
    assert len(north) == ENTRIES_OF_ONE + 1
    assert sum(body["count"] for body in north) == 3 * ENTRIES_OF_ONE
    # In the end, so that it is whole; it tells from when to when.
    assert (bodies[-1]["method"], bodies[-1]["reason"]) == ("various", "further refusals, not told one by one")
    assert dropped("caller") == before + bodies[-1]["count"]


async def test_refusals_wait_while_the_log_is_away_and_one_that_it_never_takes_holds_up_no_other() -> None:
    told, lost = Told(), dropped("audit")
    told.errors = [FedmeshError(Code.SERVICE_UNAVAILABLE, "away")]
    told.poison = "poison"
    for reason in ("before", "poison", "after"):
        await told.note(reason=reason)
    async with running(told):
        assert [body["reason"] for body in await told.holds(2)] == ["before", "after"]
    assert dropped("audit") == lost + 1
