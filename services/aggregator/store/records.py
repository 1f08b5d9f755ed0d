"""The records of sums in Redis: one small hash a sum, switched by Lua. They alone say who is counted."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis

from services.aggregator.domain.sums import AttemptId, Blob, Contribution, Form, Opened, State, Sum
from services.aggregator.ports import FinishResult, FixResult
from services.common.redis import Scripts, redis_errors

_LUA: Final = Path(__file__).parent / "lua"


def record_key(attempt: AttemptId) -> str:
    """Hash with the record. Lives until the sum's `expires_at`."""
    return f"aggregator:sum:{attempt.job_id}:{attempt.round}:{attempt.attempt}"


class RedisSums:
    """See `ports.Sums` for the contract."""

    def __init__(self, client: aioredis.Redis) -> None:
        self._client = client
        self._scripts = Scripts(client, _LUA)

    async def open(self, attempt: AttemptId, opened: Opened, expires_at: datetime) -> bool:
        signers = {name: opened.signers[name].hex() for name in opened.group}
        content = json.dumps([list(opened.form), signers, opened.adverts_sha256], separators=(",", ":"))
        return bool(await self._scripts.run("open", [record_key(attempt)], [content, milliseconds(expires_at)]))

    async def get(self, attempt: AttemptId) -> Sum | None:
        async with redis_errors():
            fields: Any = await self._client.hgetall(record_key(attempt))
        return _parse(attempt, fields) if fields else None

    async def count(self, attempt: AttemptId, hospital_id: str, contribution: Contribution) -> None:
        content = json.dumps(list(contribution), separators=(",", ":"))
        await self._scripts.run("count", [record_key(attempt)], [hospital_id, content])

    async def mark_recorded(self, attempt: AttemptId, hospital_ids: Sequence[str]) -> None:
        async with redis_errors():
            await self._client.hdel(record_key(attempt), *(f"u:{name}" for name in hospital_ids))

    async def close(self, attempt: AttemptId, minimum: int) -> Sum | int | None:
        answer = await self._scripts.run("close", [record_key(attempt)], [minimum])
        if answer is None or isinstance(answer, int):
            return answer
        return _parse(attempt, dict(zip(answer[0::2], answer[1::2], strict=True)))

    async def fix(self, attempt: AttemptId, inputs: str) -> FixResult:
        answer: bytes = await self._scripts.run("fix", [record_key(attempt)], [inputs])
        return answer.decode()  # type: ignore[return-value]  # the script returns nothing else

    async def finish(self, attempt: AttemptId, inputs: str, blob: Blob, sha256: str) -> FinishResult:
        arguments = [inputs, blob.blob_id, sha256]
        answer: bytes = await self._scripts.run("finish", [record_key(attempt)], arguments)
        return answer.decode()  # type: ignore[return-value]  # the script returns nothing else

    async def discard(self, attempt: AttemptId) -> None:
        async with redis_errors():
            await self._client.unlink(record_key(attempt))


def _parse(attempt: AttemptId, fields: Mapping[bytes, bytes]) -> Sum:
    text = {key.decode(): value.decode() for key, value in fields.items()}
    form, signers, adverts_sha256 = json.loads(text["content"])
    expires_at = datetime.fromtimestamp(int(text["expires_ms"]) / 1000, UTC)
    return Sum(
        attempt=attempt,
        opened=Opened(
            Form(*form), tuple(signers), {name: bytes.fromhex(key) for name, key in signers.items()}, adverts_sha256
        ),
        state=State(text["state"]),
        expires_at=expires_at,
        contributions={
            key[2:]: Contribution(*json.loads(value)) for key, value in sorted(text.items()) if key.startswith("c:")
        },
        unrecorded=frozenset(key[2:] for key in text if key.startswith("u:")),
        result=(Blob(text["sum"], expires_at), text["sum_sha256"]) if "sum" in text else None,
    )


def milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)
