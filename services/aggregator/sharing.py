"""Chunks that several calls want at about the same time are read once and held once."""

import asyncio
from dataclasses import dataclass
from weakref import WeakValueDictionary

from services.aggregator.domain.sums import Blob
from services.aggregator.ports import ChunkStore


@dataclass(frozen=True, eq=False)
class Chunk:
    """Immutable bytes; forgotten when nobody holds them any more."""

    content: bytes


class SharedReads:
    """Reads a store's chunks; all hospitals download a sum as soon as it is computed."""

    def __init__(self, chunks: ChunkStore) -> None:
        self._chunks = chunks
        self._held: WeakValueDictionary[tuple[str, int], Chunk] = WeakValueDictionary()
        self._reading: WeakValueDictionary[tuple[str, int], asyncio.Lock] = WeakValueDictionary()

    async def read(self, blob: Blob, index: int) -> Chunk | None:
        """As `ChunkStore.read`, but for a chunk that another caller holds."""
        key = (blob.blob_id, index)
        # One reads, and who wants the same waits for it; when it gives up, the next one reads.
        async with self._reading.setdefault(key, asyncio.Lock()):
            chunk = self._held.get(key)
            if chunk is None:
                content = await self._chunks.read(blob, index)
                if content is None:
                    return None
                chunk = self._held[key] = Chunk(content)
            return chunk
