"""The coordinator's Redis: one Lua script for each atomic transition, one builder and one rule of life for each key."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis

from services.common.ids import new_id
from services.common.redis import Scripts, redis_errors
from services.coordinator.domain.attempt import Attempt
from services.coordinator.domain.stored import parse_attempt, parse_statement
from services.coordinator.ports import Observation, Report, WakeUp
from services.coordinator.store.codec import parse_declined, parse_reports, record_fields
from services.secure_sum.statements import Signed

CHANNEL: Final = "coordinator:wake"
"""Pub/sub: `job <id>` wakes the driver of a job, `tasks <hospital> ...` the task streams of these hospitals."""
PRESENCE: Final = "coordinator:presence"
"""Sorted set: connected hospitals by the end of their presence. Lives a day after the last heartbeat."""
PRESENCE_DETAILS: Final = "coordinator:presence:details"
"""Hash: what is known of connected hospitals. Lives as long as `PRESENCE`."""
JOBS: Final = "coordinator:jobs"
"""Set of jobs whose end the hospitals have not been told. Lives as long as the newest record."""

_LUA: Final = Path(__file__).parent / "lua"
_DAY_MS: Final = 86_400_000
# Calls in flight at once, below the connection pool's limit.
_CONCURRENCY: Final = 48
# Tasks carry statements: some 60 KB a round and hospital at 15 hospitals.
_STREAM_LENGTH: Final = 200
_NOTE_MS: Final = 30_000
_LISTEN_S: Final = 1.0


def record_key(job_id: str) -> str:
    """Hash: a job's present attempt and the reports in it. Lives a day beyond the phase's deadline."""
    return f"coordinator:attempt:{job_id}"


def statements_key(job_id: str) -> str:
    """Hash: the signed statements of the present attempt, which are big. Lives as long as the record."""
    return f"coordinator:statements:{job_id}"


def lease_key(job_id: str) -> str:
    """String: who drives a job. Lives for the lease's time."""
    return f"coordinator:lease:{job_id}"


def fence_key(job_id: str) -> str:
    """Counter of a job's leases. Lives a week after the last one."""
    return f"coordinator:fence:{job_id}"


def declined_key(job_id: str) -> str:
    """Hash: who declined a job and why. Lives a week."""
    return f"coordinator:declined:{job_id}"


def bucket_key(hospital_id: str) -> str:
    """Hash: a hospital's tokens for reports. Lives until it would be full."""
    return f"coordinator:rate:{hospital_id}"


def stream_key(hospital_id: str) -> str:
    """Stream: a hospital's tasks, about the last 200. Lives as long as the record of the newest."""
    return f"coordinator:tasks:{hospital_id}"


def current_key(hospital_id: str) -> str:
    """Hash: a hospital's newest task by job. Lives as long as the record of the newest."""
    return f"coordinator:current:{hospital_id}"


class RedisRounds:
    """See `ports.Rounds` for the contract."""

    def __init__(self, client: aioredis.Redis, *, lease_ms: int) -> None:
        self._client = client
        self._scripts = Scripts(client, _LUA)
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._lease_ms = lease_ms

    async def _run(self, name: str, keys: list[str], arguments: list[Any]) -> Any:
        async with self._slots:
            return await self._scripts.run(name, keys, arguments)

    # ---- driving

    async def acquire(self, job_id: str) -> str | None:
        answer = await self._run(
            "acquire", [lease_key(job_id), fence_key(job_id)], [new_id(), self._lease_ms, 7 * _DAY_MS]
        )
        return None if answer is None else str(answer.decode())

    async def renew(self, job_id: str, owner: str) -> bool:
        return bool(await self._run("renew", [lease_key(job_id)], [owner, self._lease_ms]))

    async def release(self, job_id: str, owner: str) -> None:
        await self._run("release", [lease_key(job_id)], [owner, CHANNEL, job_id])

    async def observe(self, job_id: str, owner: str = "") -> Observation | None:
        keys = [record_key(job_id), lease_key(job_id), declined_key(job_id), PRESENCE]
        answer = await self._run("observe", keys, [owner, self._lease_ms])
        if answer is None:
            return None
        record, declined, connected = _pairs(answer[0]), _pairs(answer[1]), answer[2]
        common: dict[str, Any] = {
            "declined": parse_declined(declined),
            "connected": frozenset(name.decode() for name in connected),
            "waiting": record.get(b"waiting", b"").decode(),
        }
        if b"core" not in record:
            return Observation(**common)
        return Observation(int(record[b"version"]), parse_attempt(record[b"core"]), parse_reports(record), **common)

    async def advance(
        self,
        owner: str,
        version: int,
        attempt: Attempt,
        tasks: Sequence[tuple[str, bytes]],
        *,
        fresh: bool = False,
        statements: Mapping[str, bytes] | None = None,
    ) -> bool:
        keys = [record_key(attempt.job_id), lease_key(attempt.job_id), JOBS, statements_key(attempt.job_id)]
        for hospital_id, _ in tasks:
            keys += [stream_key(hospital_id), current_key(hospital_id)]
        expires_ms = attempt.deadline_ms + _DAY_MS
        arguments: list[Any] = [owner, version, expires_ms, int(fresh), attempt.job_id, int(attempt.ended)]
        arguments += [CHANNEL, _STREAM_LENGTH]
        for table in (record_fields(attempt), statements or {}):
            arguments += [len(table), *(item for pair in table.items() for item in pair)]
        arguments += [item for task in tasks for item in task]
        return bool(await self._run("advance", keys, arguments) == b"ok")

    async def note(self, job_id: str, owner: str, reason: str) -> None:
        await self._run("note", [record_key(job_id), lease_key(job_id)], [owner, reason, _NOTE_MS])

    async def attempt(self, job_id: str) -> Attempt | None:
        async with redis_errors():
            core: Any = await self._client.hget(record_key(job_id), "core")
        return None if core is None else parse_attempt(core)

    async def statements(self, job_id: str, fields: Sequence[tuple[str, str]]) -> list[Signed | None]:
        async with redis_errors():
            names = [name for name, _ in fields]
            found: Any = await self._client.hmget(statements_key(job_id), names) if names else []
        return [
            None if value is None else parse_statement(signer, value)
            for (_, signer), value in zip(fields, found, strict=True)
        ]

    async def unfinished_jobs(self) -> set[str]:
        async with redis_errors():
            members: Any = await self._client.smembers(JOBS)
        return {member.decode() for member in members}

    async def forget_job(self, job_id: str) -> None:
        async with redis_errors():
            await self._client.srem(JOBS, job_id)

    # ---- hospitals

    async def report(self, report: Report, now_ms: int, per_second: float, burst: int) -> list[str]:
        job_id = report.attempt.job_id
        keys = [record_key(job_id), bucket_key(report.hospital_id), declined_key(job_id), statements_key(job_id)]
        named = [report.kind, report.attempt.round, report.attempt.attempt, report.hospital_id]
        what = [report.value, report.guard, int(report.urgent)]
        arguments: list[Any] = [now_ms, per_second, burst, *named, *what, CHANNEL, job_id, 7 * _DAY_MS // 1000]
        arguments += [len(report.marks), *report.marks]
        arguments += [item for pair in report.statements.items() for item in pair]
        answer = await self._run("report", keys, arguments)
        return [part.decode() for part in answer]

    async def watch(self, hospital_id: str, cursor: str) -> tuple[str, list[bytes]]:
        answer = await self._run("watch", [stream_key(hospital_id), current_key(hospital_id)], [cursor])
        return answer[0].decode(), list(answer[1])

    async def read_tasks(self, cursors: Mapping[str, str]) -> dict[str, list[tuple[str, bytes]]]:
        async with redis_errors():
            answer: Any = await self._client.xread(
                {stream_key(name): cursor for name, cursor in cursors.items()}, count=100
            )
        names = {stream_key(name).encode(): name for name in cursors}
        return {
            names[key]: [(entry.decode(), values[b"t"]) for entry, values in entries] for key, entries in answer or ()
        }

    async def wake_ups(self) -> AsyncGenerator[WakeUp, None]:
        async with redis_errors(), self._client.pubsub(ignore_subscribe_messages=True) as subscription:
            await subscription.subscribe(CHANNEL)
            while True:
                message: Any = await subscription.get_message(timeout=_LISTEN_S)
                if message is not None:
                    kind, *names = message["data"].decode().split(" ")
                    yield WakeUp("tasks" if kind == "tasks" else "job", names)

    async def beat(self, ttl_ms: int, details: Mapping[str, str]) -> None:
        pairs = [item for pair in details.items() for item in pair]
        await self._run("beat", [PRESENCE, PRESENCE_DETAILS], [ttl_ms, *pairs])

    async def leave(self, hospital_id: str, details: str) -> None:
        await self._run("leave", [PRESENCE, PRESENCE_DETAILS], [hospital_id, details])

    async def participants(self) -> dict[str, dict[str, Any]]:
        answer = await self._run("participants", [PRESENCE, PRESENCE_DETAILS], [])
        return {name.decode(): json.loads(details) for name, details in _pairs(answer).items()}


def _pairs(answer: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(answer[0::2], answer[1::2], strict=True))
