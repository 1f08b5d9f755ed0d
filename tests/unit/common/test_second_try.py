"""Second tries of calls: who wins, what is cancelled, and what the budget allows."""

import asyncio
from typing import Any

import pytest

from services.common.errors import Code, FedmeshError
from services.common.grpc import second_try as module
from services.common.grpc.second_try import MOST, Budget, first_answer

QUICK = 0.01
AWAY = FedmeshError(Code.SERVICE_UNAVAILABLE, "away")
REFUSED = FedmeshError(Code.NOT_FOUND, "none")


class Replicas:
    """Answers of tries in the order in which they are begun: a result, an error, or None for silence."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.begun = self.cancelled = 0
        self.second = asyncio.Event()

    async def begin(self, _timeout_s: float) -> Any:
        answer = self.answers[self.begun]
        self.begun += 1
        if self.begun == 2:
            self.second.set()
        try:
            if answer is None:
                await asyncio.Event().wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def answer(self, budget: Budget) -> Any:
        return await first_answer(self.begin, 60.0, budget, QUICK)


async def test_a_quick_answer_needs_no_second_try() -> None:
    replicas = Replicas("a", "b")
    assert await replicas.answer(Budget()) == "a"
    assert replicas.begun == 1


@pytest.mark.parametrize("silent", [1, 2, MOST - 1])
async def test_silent_replicas_are_gone_around_one_after_the_other(silent: int) -> None:
    replicas = Replicas(*[None] * silent, "b")
    assert await replicas.answer(Budget()) == "b"
    assert replicas.begun == silent + 1
    assert replicas.cancelled == silent


async def test_an_answer_that_a_repetition_may_mend_is_final_only_when_it_is_the_last() -> None:
    with pytest.raises(FedmeshError, match="away"):
        await Replicas(AWAY).answer(Budget())
    assert await Replicas(None, AWAY, "c").answer(Budget()) == "c"
    with pytest.raises(FedmeshError, match="none"):
        await Replicas(None, REFUSED).answer(Budget())


async def test_a_channel_with_few_calls_earns_by_time() -> None:
    moment = 0.0
    budget = Budget(now=lambda: moment)
    while budget.spend():
        pass
    budget.earn()
    assert not budget.spend()
    moment = 30.0
    budget.earn()
    assert budget.spend()
    assert not budget.spend()
    moment = 3600.0
    budget.earn()
    assert sum(iter(budget.spend, False)) == 4


async def test_an_empty_budget_leaves_the_one_try() -> None:
    budget = Budget()
    while budget.spend():
        pass
    replicas = Replicas(None, "b")
    asked = asyncio.ensure_future(replicas.answer(budget))
    await asyncio.sleep(20 * QUICK)
    assert (replicas.begun, asked.done()) == (1, False)
    while not budget.spend():
        budget.earn()
    for _ in range(10):
        budget.earn()
    # Waiting calls see that there is a token again.
    assert await asked == "b"


async def test_when_all_replicas_are_slow_one_call_in_ten_is_made_twice() -> None:
    begun = 0

    async def slow(_timeout_s: float) -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(5 * QUICK)

    budget = Budget()
    for _ in range(10):
        await asyncio.gather(*(first_answer(slow, 60.0, budget, QUICK) for _ in range(10)))
    assert 100 < begun <= 100 + 10 + 4


async def test_going_around_a_silent_replica_costs_nothing() -> None:
    budget = Budget()
    for _ in range(30):
        assert await Replicas(None, "b").answer(budget) == "b"


async def test_two_silences_are_told_once() -> None:
    told: list[str] = []
    budget = Budget(lambda: told.append("silent"))
    await Replicas("a").answer(budget)
    await Replicas(None, "b").answer(budget)
    assert told == []
    for _ in range(5):
        await Replicas(None, "b").answer(budget)
    assert told == ["silent"]


async def test_a_call_that_others_overtake_tells_without_a_budget_and_then_has_one() -> None:
    told: list[str] = []
    budget = Budget(lambda: told.append("silent"))
    while budget.spend():
        pass
    replicas = Replicas(None, "b")
    asked = asyncio.ensure_future(replicas.answer(budget))
    await asyncio.sleep(20 * QUICK)
    # However long it waits: where all are slow, new connections help nobody.
    assert (told, replicas.begun) == ([], 1)
    for _ in range(4):
        await first_answer(Replicas("a").begin, 60.0, budget)
    assert await asked == "b"
    assert told == ["silent"]


async def test_a_service_has_time_to_say_that_its_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SURE_WAITS", 1e6)
    told: list[str] = []
    said = asyncio.Event()
    begun = 0

    async def wait_for_the_store(_timeout_s: float) -> None:
        nonlocal begun
        begun += 1
        await said.wait()
        raise AWAY

    asked = asyncio.ensure_future(first_answer(wait_for_the_store, 60.0, Budget(lambda: told.append("silent")), QUICK))
    while begun < MOST:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(QUICK)
    await asyncio.sleep(20 * QUICK)
    # Neither new connections nor the try that would go over them.
    assert (told, begun) == ([], MOST)
    said.set()
    with pytest.raises(FedmeshError, match="away"):
        await asked


async def test_a_call_that_met_its_deadline_tells() -> None:
    told: list[str] = []
    with pytest.raises(FedmeshError):
        await Replicas(FedmeshError(Code.DEADLINE_EXCEEDED, "late")).answer(Budget(lambda: told.append("silent")))
    assert told == ["silent"]


async def test_without_a_connection_there_is_nothing_to_go_around() -> None:
    told: list[str] = []
    budget = Budget(lambda: told.append("silent"), connected=lambda: False)
    replicas = Replicas(None, "b")
    asked = asyncio.ensure_future(replicas.answer(budget))
    await asyncio.sleep(20 * QUICK)
    assert replicas.begun == 1
    budget.met_silence()
    assert told == []
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked


async def test_a_call_that_meets_only_silence_tells_before_its_last_try() -> None:
    told: list[str] = []
    budget = Budget(lambda: told.append("silent"))
    assert await Replicas(*[None] * MOST, "b").answer(budget) == "b"
    assert told == ["silent"]


async def test_a_call_that_is_given_up_ends_all_its_tries() -> None:
    replicas = Replicas(*[None] * (MOST + 1))
    asked = asyncio.ensure_future(replicas.answer(Budget()))
    await replicas.second.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert replicas.cancelled == replicas.begun
