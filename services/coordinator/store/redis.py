"""The coordinator's Redis: one Lua script for each atomic transition, one builder and one rule of life for each key."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis

from services.common.ids import new_id
from services.common.redis import Scripts, redis_errors
from services.coordinator.domain.attempt import Attempt, AttemptId, Decline, Reports
from services.coordinator.store.codec import (
    parse_attempt,
    parse_declined,
    parse_reports,
    parse_statement,
    record_fields,
)
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


@dataclass(frozen=True)
class Observation:
    """A job's attempt as of one moment; `version` counts its changes, 0 when there is none. waiting: why none opens."""

    version: int = 0
    attempt: Attempt | None = None
    reports: Reports = field(default_factory=Reports)
    declined: Mapping[str, Decline] = field(default_factory=dict)
    connected: frozenset[str] = frozenset()
    waiting: str = ""


@dataclass(frozen=True)
class Report:
    """A hospital's report; `value` as by `codec.report_value`. `guard` is what it must name, or empty.

    statements: what comes with it, by field. marks: what no other hospital may use in the attempt.
    """

    attempt: AttemptId
    kind: str
    hospital_id: str
    value: str
    guard: str = ""
    urgent: bool = False
    statements: Mapping[str, bytes] = field(default_factory=dict)
    marks: Sequence[str] = ()


class RedisRounds:
    """All methods raise FedmeshError(STORE_UNAVAILABLE | STORE_FULL) while Redis is away or full."""

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
        """Take the lease of a job; the owner's mark, or None while another has it."""
        answer = await self._run(
            "acquire", [lease_key(job_id), fence_key(job_id)], [new_id(), self._lease_ms, 7 * _DAY_MS]
        )
        return None if answer is None else str(answer.decode())

    async def renew(self, job_id: str, owner: str) -> bool:
        """Prolong a lease; False when it was lost."""
        return bool(await self._run("renew", [lease_key(job_id)], [owner, self._lease_ms]))

    async def release(self, job_id: str, owner: str) -> None:
        await self._run("release", [lease_key(job_id)], [owner])

    async def observe(self, job_id: str, owner: str = "") -> Observation | None:
        """Look at a job; with an owner also prolong its lease, and None when that was lost."""
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
        """Store an attempt and hand out tasks (hospital, task); False when the lease or the version is not as given.

        fresh: this is another attempt than the one before, whose reports and statements are dropped. statements: to be
        kept with it, by field.
        """
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
        """Note why the job does not go on; shown until the next attempt opens."""
        await self._run("note", [record_key(job_id), lease_key(job_id)], [owner, reason, _NOTE_MS])

    async def attempt(self, job_id: str) -> Attempt | None:
        """The attempt alone, without what was reported in it."""
        async with redis_errors():
            core: Any = await self._client.hget(record_key(job_id), "core")
        return None if core is None else parse_attempt(core)

    async def statements(self, job_id: str, fields: Sequence[tuple[str, str]]) -> list[Signed | None]:
        """Statements by field and signer; None for what is not there."""
        async with redis_errors():
            names = [name for name, _ in fields]
            found: Any = await self._client.hmget(statements_key(job_id), names) if names else []
        return [
            None if value is None else parse_statement(signer, value)
            for (_, signer), value in zip(fields, found, strict=True)
        ]

    async def unfinished_jobs(self) -> set[str]:
        """Jobs whose end the hospitals have not been told."""
        async with redis_errors():
            members: Any = await self._client.smembers(JOBS)
        return {member.decode() for member in members}

    async def forget_job(self, job_id: str) -> None:
        async with redis_errors():
            await self._client.srem(JOBS, job_id)

    # ---- hospitals

    async def report(self, report: Report, now_ms: int, per_second: float, burst: int) -> list[str]:
        """Take a report; the script's answer as text: see report.lua."""
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
        """Where a stream begins: the cursor to read on from, and tasks to send first."""
        answer = await self._run("watch", [stream_key(hospital_id), current_key(hospital_id)], [cursor])
        return answer[0].decode(), list(answer[1])

    async def read_tasks(self, cursors: Mapping[str, str]) -> dict[str, list[tuple[str, bytes]]]:
        """New tasks of some hospitals after their cursors: (cursor, task), oldest first."""
        async with redis_errors():
            answer: Any = await self._client.xread(
                {stream_key(name): cursor for name, cursor in cursors.items()}, count=100
            )
        names = {stream_key(name).encode(): name for name in cursors}
        return {
            names[key]: [(entry.decode(), values[b"t"]) for entry, values in entries] for key, entries in answer or ()
        }

    async def beat(self, ttl_ms: int, details: Mapping[str, str]) -> None:
        """Note that hospitals are connected."""
        pairs = [item for pair in details.items() for item in pair]
        await self._run("beat", [PRESENCE, PRESENCE_DETAILS], [ttl_ms, *pairs])

    async def leave(self, hospital_id: str, details: str) -> None:
        """Note that a hospital's stream has ended, unless a newer one stands in its place."""
        await self._run("leave", [PRESENCE, PRESENCE_DETAILS], [hospital_id, details])

    async def participants(self) -> dict[str, dict[str, Any]]:
        """Details of the connected hospitals, by hospital."""
        answer = await self._run("participants", [PRESENCE, PRESENCE_DETAILS], [])
        return {name.decode(): json.loads(details) for name, details in _pairs(answer).items()}


def _pairs(answer: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(answer[0::2], answer[1::2], strict=True))
