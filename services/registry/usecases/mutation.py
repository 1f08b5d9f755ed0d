"""The frame of every mutation: exactly once by request id, together with its events."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.common.clock import Clock
from services.common.errors import FedmeshError
from services.registry.domain.events import event
from services.registry.usecases.ports import Command, Store, Transaction

T = TypeVar("T")


class Mutations:
    """Runs commands. `changed` is called after each commit, to wake the relay of the outbox."""

    def __init__(self, store: Store, clock: Clock, changed: Callable[[], None]) -> None:
        self._store = store
        self._clock = clock
        self.changed = changed

    async def run(
        self, command: Command[T], body: Callable[[Transaction], Awaitable[T]], *, whole: bool = False
    ) -> bytes:
        """The encoded answer: kept from before when the request is a repetition, else made by `body`.

        whole: as in `Store.run`.

        Raises: FedmeshError(REQUEST_ID_REUSED); whatever the store or `body` raises, and then nothing has changed.
        """

        async def once(tx: Transaction) -> bytes:
            kept = await tx.requests.answer(command)
            if kept is not None:
                return kept
            answer = command.encode(await body(tx))
            await tx.requests.keep(command, answer, self._clock.now())
            return answer

        result = await self._store.run(command.method, command.caller, once, whole=whole)
        self.changed()
        return result

    async def note_refusal(self, command: Command[T], subject: str, error: FedmeshError) -> None:
        """Tell the audit log of a refused command that somebody should look at."""
        facts = {"method": command.method, "code": error.code.value, "reason": error.message}
        told = event("call.refused", self._clock.now(), command.caller, subject, **facts)
        await self._store.run(f"{command.method}.refused", command.caller, lambda tx: tx.outbox.add([told]))
        self.changed()
