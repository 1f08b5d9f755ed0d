"""The log's operations, one method for each call."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from services.audit.domain.event import MAX_EVENTS, Event, concerns, make_leaf
from services.audit.ports import Head, Store, Transaction, require_online
from services.audit.sequencer import Appended, Sequencer, empty_head, require_root
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.ids import require_uuid
from services.transparency.checkpoint import SigningKey, open_checkpoint
from services.transparency.merkle import (
    Coordinate,
    consistency_nodes,
    consistency_proof,
    frontier_nodes,
    inclusion_nodes,
    inclusion_proof,
    stored_root,
)

PAGE: Final = 500


class LogUseCases:
    def __init__(self, store: Store, sequencer: Sequencer, key: SigningKey) -> None:
        self._store = store
        self._sequencer = sequencer
        self._key = key

    async def append(self, source: Identity, request_id: str, events: Sequence[Event]) -> Appended:
        """Append events for a service. Everything wrong with them is found here, before they meet those of others.

        Raises: FedmeshError(INVALID_ARGUMENT) naming the event; as `Sequencer.append`.
        """
        require_uuid(request_id, "request_id")
        if not 1 <= len(events) <= MAX_EVENTS:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"a request has 1 to {MAX_EVENTS} events, not {len(events)}")
        return await self._sequencer.append([make_leaf(event, source) for event in events])

    async def checkpoint(self) -> str:
        """The newest signed checkpoint."""
        return (await self._store.run("checkpoint", self._head)).note

    async def inclusion(self, index: int, tree_size: int) -> tuple[int, bytes, list[bytes]]:
        """Size of the tree, leaf hash and proof, leaf to root. `tree_size` 0 means the newest checkpoint's.

        Raises: FedmeshError(NOT_FOUND) when the tree has no such entry, (INVALID_ARGUMENT) for a tree that is not yet.
        """

        async def read(tx: Transaction) -> tuple[int, bytes, list[bytes]]:
            size = _size(tree_size, await self._head(tx))
            if index >= size:
                raise FedmeshError(Code.NOT_FOUND, f"there is no entry {index} in the tree of {size} entries")
            hashes = await tx.hashes(inclusion_nodes(index, size))
            # Of the body as it is now, not as it was when it came: a changed body does not prove. Of an archived entry
            # the database has the hash alone.
            return size, await tx.leaf_hash(index), inclusion_proof(index, size, _reader(hashes))

        return await self._store.run("inclusion_proof", read)

    async def entry(self, caller: Identity, index: int, tree_size: int) -> tuple[bytes, int, list[bytes]]:
        """Leaf of an entry, size of the tree and proof, leaf to root; for a hospital, if it concerns it.

        Raises: FedmeshError(NOT_FOUND) when the tree has no such entry, or it is in an archive, (INVALID_ARGUMENT) for
            a tree that is not yet, (PERMISSION_DENIED) for a hospital that the entry does not concern.
        """

        async def read(tx: Transaction) -> tuple[bytes, int, list[bytes]]:
            size = _size(tree_size, await self._head(tx))
            if index >= size:
                raise FedmeshError(Code.NOT_FOUND, f"there is no entry {index} in the tree of {size} entries")
            leaf = await tx.leaf(index)
            if caller.kind is Kind.HOSPITAL and not concerns(leaf, caller.name):
                raise FedmeshError(Code.PERMISSION_DENIED, f"entry {index} does not concern {caller.name}")
            hashes = await tx.hashes(inclusion_nodes(index, size))
            return leaf, size, inclusion_proof(index, size, _reader(hashes))

        return await self._store.run("entry", read)

    async def consistency(self, first_size: int, second_size: int) -> tuple[int, list[bytes]]:
        """Size of the newer tree and the proof. `second_size` 0 means the newest checkpoint's.

        Raises: FedmeshError(INVALID_ARGUMENT) for sizes out of order, 0, or of a tree that is not yet.
        """

        async def read(tx: Transaction) -> tuple[int, list[bytes]]:
            size = _size(second_size, await self._head(tx))
            if not 1 <= first_size <= size:
                raise FedmeshError(Code.INVALID_ARGUMENT, f"first_size must be in 1..{size}, not {first_size}")
            hashes = await tx.hashes(consistency_nodes(first_size, size))
            return size, consistency_proof(first_size, size, _reader(hashes))

        return await self._store.run("consistency_proof", read)

    async def entries(self, start: int, limit: int) -> AsyncIterator[tuple[int, bytes]]:
        """Index and leaf of the entries from `start`, at most `limit` (0: up to the newest checkpoint), in order."""
        head = await self._store.run("checkpoint", self._head)
        stop = min(head.size, start + limit) if limit else head.size
        async for entry in read_entries(self._store, start, stop):
            yield entry

    async def require_own_log(self) -> None:
        """Refuse to extend a log that another key signed, or that was changed behind its back.

        Raises: FedmeshError(CONFIG_INVALID) or (WRONG_STATE); (STORE_UNAVAILABLE) when the database is away.
        """

        async def read(tx: Transaction) -> tuple[Head, bytes]:
            head = await self._head(tx)
            hashes = await tx.hashes(frontier_nodes(head.size))
            return head, stored_root(head.size, _reader(hashes))

        head, root = await self._store.run("own_log", read)
        try:
            checkpoint = open_checkpoint(head.note, self._key.verifier)
        except FedmeshError as error:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"the newest checkpoint in the database is not signed by {self._key.verifier}: {error.message}; "
                "give the service the key that the log began with",
            ) from error
        require_root(checkpoint.root, head)
        require_root(root, head)

    async def _head(self, tx: Transaction) -> Head:
        return await tx.head() or empty_head(self._key)


async def read_entries(store: Store, start: int, stop: int) -> AsyncIterator[tuple[int, bytes]]:
    """Index and leaf of the entries from `start` up to, and without, `stop`: page by page, no transaction held open.

    Raises: FedmeshError(STORE_UNAVAILABLE) when the database goes away, (NOT_FOUND) when the first of them is in an
        archive, (WRONG_STATE) when an entry is missing.
    """
    while start < stop:
        first, last = start, min(start + PAGE, stop)
        page = await store.run("page", lambda tx, first=first, last=last: tx.page(first, last))  # type: ignore[misc]
        for index, leaf in page:
            if index != start:
                break
            yield index, leaf
            start += 1
        if start == first or (page and page[-1][0] != start - 1):
            require_online(start, await store.run("archived", lambda tx: tx.archived()))
            raise FedmeshError(Code.WRONG_STATE, f"entry {start} is missing: the database was changed by hand")


def _size(wanted: int, head: Head) -> int:
    if wanted > head.size:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the log has {head.size} entries, not {wanted} yet")
    return wanted or head.size


def _reader(hashes: dict[Coordinate, bytes]) -> Callable[[int, int], bytes]:
    return lambda level, position: hashes[Coordinate(level, position)]
