"""Reads what `ledger.compare` compares: the run's own files, the hospitals' databases, and PostgreSQL."""

import asyncio
import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from loadtests.chaos.ledger import Committed, Findings, Hospital, Round, Stored, Truth, compare, counted, rounds_of
from loadtests.chaos.mesh import ChaosMesh
from loadtests.chaos.records import rows
from services.audit.fsck import check_log
from services.bench.hospital import noted_sums, sum_digest
from services.bench.secure_sum import PLAN, SEED
from services.bench.vectors import vector
from services.privacy.chain import CHARGED
from services.secure_sum.statements import Survivors, parse
from services.transparency.checkpoint import parse_verifier_key


def judge(mesh: ChaosMesh, params: int, lanes: int) -> Findings:
    """Compare everything. PostgreSQL must run, and nobody may write to it. Raises: psycopg.Error."""
    truth = read_truth(mesh)
    verifier = parse_verifier_key(mesh.audit_verifier.read_text().strip())
    log = asyncio.run(check_log(mesh.postgres.config("audit_service"), verifier))
    with mesh.postgres.connect() as connection:
        stored = read_stored(connection, log.wrong)
    numbers = {name: number for number, name in enumerate(mesh.hospitals)}
    expected = {
        key: _digest(state, stored.survivors[key][1], numbers, params, lanes) for key, state in counted(stored).items()
    }
    findings = compare(truth, stored, expected)
    findings.notes += [f"audit fsck: {problem}" for problem in log.problems]
    return findings


def _digest(key: Round, names: frozenset[str], numbers: dict[str, int], params: int, lanes: int) -> str:
    """Of the exact sum of the survivors' integers."""
    total = np.zeros(params, dtype=np.int64)
    for name in names:
        total += vector(SEED, numbers[name], key[1], params, lanes)
    return sum_digest(total)


# ---- what was acknowledged


def read_truth(mesh: ChaosMesh) -> Truth:
    truth = mesh.folder / "truth"
    appended, recorded, plans = {}, set(), set()
    for _, kind, key, fact in rows(truth / "acknowledged.jsonl"):
        if kind == "appended":
            appended[key] = int(fact)
        elif kind == "recorded":
            recorded.add(key)
        else:
            plans.add(key)
    return Truth(
        appended=appended,
        recorded=frozenset(recorded),
        plans=frozenset(plans),
        rounds=rounds_of(rows(truth / "rounds.jsonl")),
        rows=frozenset(number for _, number in rows(truth / "postgres.jsonl")),
        hospitals={name: _read_hospital(mesh, name) for name in mesh.hospitals},
    )


def _read_hospital(mesh: ChaosMesh, name: str) -> Hospital:
    folder = mesh.hospital_folder(name)
    attempts = _select(
        folder / "state.sqlite", "SELECT job_id, round, attempt, ciphertext_sha256, revealed FROM attempts"
    )
    ledger = _select(folder / "ledger.sqlite", "SELECT sha256 FROM entries ORDER BY seq")
    return Hospital(
        ciphertexts={(job, number, attempt): sha256 for job, number, attempt, sha256, _ in attempts if sha256},
        revealed=frozenset((job, number, attempt) for job, number, attempt, _, revealed in attempts if revealed),
        sums=noted_sums(mesh.vector_file(name), PLAN),
        ledger=tuple(row[0] for row in ledger),
    )


def _select(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return list(connection.execute(query))


# ---- what is stored


def read_stored(connection: "psycopg.Connection[tuple[Any, ...]]", log_wrong: int) -> Stored:
    """As the superuser, who sees all rows."""
    fetch = connection.execute
    ledgers: dict[str, list[str]] = {}
    charges: Counter[tuple[str, str, int, int]] = Counter()
    query = "select hospital_id, sha256, kind, job_id, round, attempt from registry.ledger_entries order by seq"
    for hospital, sha256, kind, job, number, attempt in fetch(query):
        ledgers.setdefault(hospital, []).append(sha256)
        if kind == CHARGED:
            charges[(hospital, job, number, attempt)] += 1
    waiting = fetch("select count(*) from registry.outbox where log_index is null").fetchone()
    return Stored(
        entries=tuple(
            _entry(*row)
            for row in fetch(
                "select index, event_id, leaf from audit.entries join audit.events using (index) order by 1"
            )
        ),
        plans=tuple(row[0] for row in fetch("select plan_id from registry.plans")),
        rounds=_rounds(connection),
        survivors={
            (str(job), number): (attempt, frozenset(parse(Survivors, bytes(statement)).ids))
            for job, number, attempt, statement in fetch(
                "select job_id, round, attempt, statement from registry.survivors"
            )
        },
        ledgers={name: tuple(found) for name, found in ledgers.items()},
        charges=charges,
        rows=frozenset(row[0] for row in fetch("select number from chaos.probe")),
        outbox_waiting=0 if waiting is None else waiting[0],
        log_wrong=log_wrong,
    )


def _rounds(connection: "psycopg.Connection[tuple[Any, ...]]") -> dict[Round, Committed]:
    contributions: dict[Round, dict[str, str]] = {}
    query = "select job_id, version, hospital_id, ciphertext_sha256 from registry.contributions"
    for job, version, hospital, sha256 in connection.execute(query):
        contributions.setdefault((str(job), version), {})[hospital] = sha256
    query = "select job_id, version, attempt, sum_sha256, burnt from registry.rounds"
    return {
        (str(job), version): Committed(attempt, sum_sha256 or "", burnt, contributions.get((str(job), version), {}))
        for job, version, attempt, sum_sha256, burnt in connection.execute(query)
    }


def _entry(index: int, event_id: object, leaf: bytes) -> tuple[int, str, str, Round | None]:
    said = json.loads(leaf)
    body, subject = said["body"], str(said["subject"])
    version = body.get("version") if isinstance(body, dict) else None
    named = (subject.removeprefix("job/"), version) if subject.startswith("job/") and isinstance(version, int) else None
    return index, str(event_id), str(said["type"]), named
