"""Checks of the stores, as the service that uses them: there, of the right version, and of the same time."""

import time
from pathlib import Path
from typing import Any, Final

from redis import exceptions

from services.cli.findings import Finding, Level
from services.common.config import PostgresConfig, RedisConfig
from services.common.errors import Code, FedmeshError
from services.common.migrations import require_migrated
from services.common.postgres import Connection, Database
from services.common.redis import connect_redis, redis_errors

# Deadlines and certificates bear a second; what is further apart is no network delay.
_WARN_SKEW_S: Final = 1.0
_FAIL_SKEW_S: Final = 30.0
# An event reaches the audit log within a second or two; the alert FedmeshAuditLag waits longer than a person need.
_WARN_LAG_S: Final = 30.0


def clock_finding(part: str, there_s: float, before_s: float, after_s: float) -> Finding:
    """How a clock differs that was read between two readings of ours; all in Unix seconds."""
    skew = max(before_s - there_s, there_s - after_s, 0.0)
    seen = f"{skew:.1f} s from this machine's" if skew else "agrees with this machine's"
    if skew <= _WARN_SKEW_S:
        return Finding(Level.OK, part, "clock", seen)
    level = Level.FAIL if skew > _FAIL_SKEW_S else Level.WARN
    return Finding(level, part, "clock", seen, "set both clocks by NTP: deadlines and certificates go by them")


async def check_postgres(service: str, config: PostgresConfig) -> list[Finding]:
    """PostgreSQL as one service sees it: reachable, schema version, clock; for the registry the outbox too."""
    part = f"postgres ({service})"
    database = Database(config)
    try:
        await database.open()
        before = time.time()
        there = await database.run_tx("doctor", _now)
        found = [
            Finding(Level.OK, part, "reachable", f"answers in {1000 * (time.time() - before):.0f} ms"),
            clock_finding(part, there, before, time.time()),
            await _schema(part, service, database),
        ]
        if service == "registry" and found[-1].level is Level.OK:
            found.append(await _outbox(database))
    except FedmeshError as error:
        todo = "is PostgreSQL up, are `postgres.dsn` and the password right? docs/runbooks/FedmeshPostgresDown.md"
        return [Finding(Level.FAIL, part, "reachable", error.message, todo)]
    finally:
        await database.close()
    return found


async def _now(connection: Connection) -> float:
    row = await (await connection.execute("select extract(epoch from clock_timestamp())::float8 as now")).fetchone()
    assert row is not None, "a select without a table has one row"
    return float(row["now"])


def _migrations(service: str) -> Path:
    if service == "registry":
        from services.registry.store import MIGRATIONS as REGISTRY

        return REGISTRY
    from services.audit.store import MIGRATIONS as AUDIT

    return AUDIT


async def _schema(part: str, service: str, database: Database) -> Finding:
    try:
        newer = await require_migrated(database, service, _migrations(service))
    except FedmeshError as error:
        if error.code is not Code.WRONG_STATE:
            raise
        return Finding(Level.FAIL, part, "schema", error.message, "bring schema and programs to the same release")
    more = f", and has {', '.join(newer)} of a newer release" if newer else ""
    return Finding(Level.OK, part, "schema", f"schema {service} is what this release needs{more}")


async def _outbox(database: Database) -> Finding:
    from services.registry.store.postgres import PostgresStore

    store = PostgresStore(database)
    waiting, lag_s, refused = await store.run("outbox.backlog", None, lambda tx: tx.outbox.backlog())
    seen = f"{waiting} events wait for the audit log, the oldest for {lag_s:.0f} s; {refused} were refused"
    if refused:
        return Finding(Level.FAIL, "registry", "outbox", seen, "see docs/runbooks/FedmeshAuditEventRefused.md")
    if lag_s > _WARN_LAG_S:
        return Finding(Level.WARN, "registry", "outbox", seen, "see docs/runbooks/FedmeshAuditLag.md")
    return Finding(Level.OK, "registry", "outbox", seen)


async def check_redis(service: str, config: RedisConfig) -> list[Finding]:
    """Redis as one service sees it: reachable with its account, and the clock."""
    part = f"redis ({service})"
    try:
        client = connect_redis(config)
    except FedmeshError as error:
        return [Finding(Level.FAIL, part, "reachable", error.message, "correct `redis` in the settings")]
    try:
        before = time.time()
        async with redis_errors():
            await client.ping()
        found = [Finding(Level.OK, part, "reachable", f"answers in {1000 * (time.time() - before):.0f} ms")]
        return [*found, await _redis_clock(part, client)]
    except (FedmeshError, exceptions.RedisError) as error:
        todo = "is Redis up, are `redis.url` and the password right? docs/runbooks/FedmeshRedisDown.md"
        return [Finding(Level.FAIL, part, "reachable", str(error), todo)]
    finally:
        await client.aclose()


async def _redis_clock(part: str, client: Any) -> Finding:
    before = time.time()
    try:
        seconds, microseconds = await client.time()
    except exceptions.NoPermissionError:
        todo = "allow this account +time, or look at the server's clock there"
        return Finding(Level.WARN, part, "clock", "the account may not ask for the time", todo)
    return clock_finding(part, int(seconds) + int(microseconds) / 1e6, before, time.time())
