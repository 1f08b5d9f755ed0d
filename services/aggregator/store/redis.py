"""Sums in Redis: one small record a sum, switched by Lua; accumulators as immutable blobs in chunks."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import redis.asyncio as aioredis

from services.aggregator.domain.sums import AttemptId, Blob, Form, State, Sum
from services.common.grpc.client import CHUNK_BYTES
from services.common.redis import Scripts, redis_errors

CountResult = Literal["ok", "gone", "closed", "conflict"]

_LUA: Final = Path(__file__).parent / "lua"
# How long chunks stay after their accumulator was replaced or its sum discarded, for readers in the middle of them.
_RETIRED_S: Final = 60


def record_key(attempt: AttemptId) -> str:
    """Hash with the record. Lives until the sum's `expires_at`."""
    return f"aggregator:sum:{attempt.job_id}:{attempt.round}:{attempt.attempt}"


def chunk_key(blob_id: str, index: int) -> str:
    """At most 1 MiB of an accumulator. Lives until the sum's `expires_at`, or a minute after it was replaced."""
    return f"aggregator:blob:{blob_id}:{index}"


def chunk_count(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def _chunk_keys(blob: Blob | None) -> list[str]:
    return [] if blob is None else [chunk_key(blob.blob_id, index) for index in range(chunk_count(blob.size_bytes))]


class RedisSums:
    """All methods raise FedmeshError(STORE_UNAVAILABLE | STORE_FULL) while Redis is away or full."""

    def __init__(self, client: aioredis.Redis) -> None:
        self._client = client
        self._scripts = Scripts(client, _LUA)

    async def open(self, attempt: AttemptId, form: Form, group: Sequence[str], expires_at: datetime) -> bool:
        """Open a sum; False when one with another form or group is there."""
        content = json.dumps({"form": list(form), "group": list(group)}, separators=(",", ":"))
        return bool(await self._scripts.run("open", [record_key(attempt)], [content, _milliseconds(expires_at)]))

    async def get(self, attempt: AttemptId) -> Sum | None:
        """The sum's record, or None when it was not opened or is over."""
        async with redis_errors():
            fields: Any = await self._client.hgetall(record_key(attempt))
        return _parse(attempt, fields) if fields else None

    async def write_blob(self, blob: Blob, content: bytes, expires_at: datetime) -> None:
        """Store an accumulator's chunks. Nothing refers to them until `count`."""
        view = memoryview(content)
        async with redis_errors(), self._client.pipeline(transaction=False) as pipe:
            for index, key in enumerate(_chunk_keys(blob)):
                part = bytes(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
                pipe.set(key, part, pxat=_milliseconds(expires_at))
            await pipe.execute()

    async def read_blob(self, blob: Blob) -> bytes | None:
        """All bytes of an accumulator, or None when it is gone."""
        async with redis_errors():
            parts: Any = await self._client.mget(_chunk_keys(blob))
        return None if None in parts else b"".join(parts)

    async def read_chunk(self, blob: Blob, index: int) -> bytes | None:
        async with redis_errors():
            part: Any = await self._client.get(chunk_key(blob.blob_id, index))
        return None if part is None else bytes(part)

    async def count(self, before: Sum, blob: Blob, contributions: Mapping[str, str]) -> CountResult:
        """Switch from the record `before` to the accumulator `blob`, which holds `contributions` in addition."""
        pairs = [item for pair in contributions.items() for item in pair]
        answer: bytes = await self._scripts.run(
            "count",
            [record_key(before.attempt), *_chunk_keys(before.blob)],
            [before.version, blob.blob_id, blob.size_bytes, blob.sha256, _RETIRED_S, *pairs],
        )
        return answer.decode()  # type: ignore[return-value]  # the script returns nothing else

    async def mark_recorded(self, attempt: AttemptId, hospital_ids: Sequence[str]) -> None:
        """Note that the events of these contributors are durable."""
        async with redis_errors():
            await self._client.hdel(record_key(attempt), *(f"u:{name}" for name in hospital_ids))

    async def close(self, attempt: AttemptId, minimum: int) -> Sum | int | None:
        """Fix the sum and return it; the number of contributors when that is below `minimum`; None without a sum."""
        answer = await self._scripts.run("close", [record_key(attempt)], [minimum])
        if answer is None or isinstance(answer, int):
            return answer
        return _parse(attempt, dict(zip(answer[0::2], answer[1::2], strict=True)))

    async def drop_blob(self, blob: Blob) -> None:
        """Forget an accumulator that was never switched to."""
        async with redis_errors():
            await self._client.unlink(*_chunk_keys(blob))

    async def discard(self, held: Sum) -> None:
        """Forget a sum at once; its accumulator goes a little later, for readers in the middle of it."""
        async with redis_errors(), self._client.pipeline(transaction=True) as pipe:
            pipe.unlink(record_key(held.attempt))
            for key in _chunk_keys(held.blob):
                pipe.expire(key, _RETIRED_S)
            await pipe.execute()


def _parse(attempt: AttemptId, fields: Mapping[bytes, bytes]) -> Sum:
    text = {key.decode(): value.decode() for key, value in fields.items()}
    content: dict[str, Any] = json.loads(text["content"])
    blob = Blob(text["blob"], int(text["size"]), text["sha256"]) if "blob" in text else None
    return Sum(
        attempt=attempt,
        form=Form(*content["form"]),
        group=tuple(content["group"]),
        state=State(text["state"]),
        expires_at=datetime.fromtimestamp(int(text["expires_ms"]) / 1000, UTC),
        version=int(text["version"]),
        blob=blob,
        contributions={key[2:]: value for key, value in sorted(text.items()) if key.startswith("c:")},
        unrecorded=frozenset(key[2:] for key in text if key.startswith("u:")),
    )


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)
