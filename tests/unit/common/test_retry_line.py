"""The line of calls that were turned away: who tries when, and that nobody holds up the others."""

import asyncio

import pytest

from services.common.errors import Code, FedmeshError
from services.common.grpc import retry_line
from services.common.grpc.retry_line import RetryLine

AWAY = FedmeshError(Code.STORE_UNAVAILABLE, "away")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_line, "_PAUSE_S", 0.001)
    monkeypatch.setattr(retry_line, "_LONGEST_PAUSE_S", 0.004)


class Service:
    """Turns tries away until `away` of them were; then it serves them, each when `serve` says so."""

    def __init__(self, away: int) -> None:
        self.away = away
        self.tries = self.now = self.most = 0
        self.back = asyncio.Event()
        self.serve = asyncio.Event()

    async def take(self) -> None:
        self.tries += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            if self.tries <= self.away:
                raise AWAY
            self.back.set()
            await self.serve.wait()
        finally:
            self.now -= 1


async def until_served(line: RetryLine, service: Service, patience_s: float = 60.0) -> None:
    while True:
        try:
            async with line.turn(patience_s):
                return await service.take()
        except FedmeshError:
            continue


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


async def test_one_call_finds_out_and_the_others_follow_as_they_are_served() -> None:
    line, service = RetryLine(), Service(away=7)
    calls = [asyncio.ensure_future(until_served(line, service)) for _ in range(50)]
    await service.back.wait()
    await settle()
    # Fifty wait; eight tries were made, one at a time.
    assert (service.tries, service.most) == (8, 1)
    seen = []
    while not all(call.done() for call in calls):
        seen.append(service.now)
        service.serve.set()
        await asyncio.sleep(0)
        service.serve.clear()
        await settle()
    assert seen[:4] == [1, 2, 4, 8]
    assert service.tries == 7 + 50


async def test_a_refusal_is_an_answer() -> None:
    line = RetryLine()
    with pytest.raises(FedmeshError, match="none"):
        async with line.turn(60.0):
            raise FedmeshError(Code.NOT_FOUND, "none")
    async with line.turn(60.0), line.turn(60.0):
        pass


async def test_who_has_no_patience_left_goes_out_of_turn() -> None:
    line, service = RetryLine(), Service(away=0)
    first = asyncio.ensure_future(until_served(line, service))
    await settle()
    late = asyncio.ensure_future(until_served(line, service, patience_s=0.0))
    waiting = asyncio.ensure_future(until_served(line, service))
    await settle()
    assert (service.now, waiting.done()) == (2, False)
    service.serve.set()
    await asyncio.gather(first, late, waiting)


async def test_a_try_without_an_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_line, "_HELD_S", 0.01)
    line, silent, service = RetryLine(), Service(away=0), Service(away=0)
    stuck = asyncio.ensure_future(until_served(line, silent))
    await settle()
    service.serve.set()
    await until_served(line, service)
    assert not stuck.done()
    stuck.cancel()
    await asyncio.gather(stuck, return_exceptions=True)
    monkeypatch.setattr(retry_line, "_HELD_S", 60.0)
    # It left once: still one at a time and one more for the one that was served.
    calls = [asyncio.ensure_future(until_served(line, silent)) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert silent.now == 2
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_who_is_cancelled_in_the_line_or_at_its_turn_leaves_no_gap() -> None:
    line, service = RetryLine(), Service(away=0)
    calls = [asyncio.ensure_future(until_served(line, service)) for _ in range(4)]
    await settle()
    assert service.now == 1
    calls[0].cancel()
    calls[1].cancel()
    service.serve.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert [call.cancelled() for call in calls] == [True, True, False, False]
    await until_served(line, service)
