"""Checks of a whole centre: its processes, and what only the consortium sees: witnesses and ledgers."""

import asyncio
from dataclasses import replace
from pathlib import Path

from fedmesh.audit.v1 import audit_pb2

from services.cli.centre import Centre, RemoteCentre
from services.cli.checkup import check_certificate, check_network, check_settings, read_process
from services.cli.checkup_centre import check_reach
from services.cli.findings import Finding, Level
from services.cli.mesh import stub
from services.cli.reconciliation import check_copies, compare_ledgers, reported_ledgers
from services.cli.witnesses import known_rosters, log_key, look_at
from services.common.errors import FedmeshError
from services.common.grpc.client import call
from services.common.refusal_book import REFUSALS
from services.embedded.stack import COMPILER, SERVICES, Part, Stack
from services.hospital_node.store.ledger import LEDGER_FILE


async def check_stack(stack: Stack) -> list[Finding]:
    """All checks of a stack. A part that is stopped is looked at without the network; nothing is started."""
    parts = {part.name: part for part in stack.status() if part.name != COMPILER}
    found = [_running(stack, part) for part in parts.values()]
    for path in sorted((stack.folder / "config").glob("*.yaml")):
        if path.name != "ports.yaml":
            found += await _process(path, running=path.stem in parts and parts[path.stem].running)
    if all(parts[name].running for name in ("audit", "registry")):
        found += await _witnesses(stack)
        found += await _ledgers(stack)
    return found


async def check_remote(centre: RemoteCentre) -> list[Finding]:
    """All checks of a centre elsewhere that can be made from here: by an operator's certificate, over the network."""
    part, tls = "operator", centre.config.operator
    found = await asyncio.to_thread(check_certificate, part, "operator", tls)
    if any(item.level is Level.FAIL for item in found):
        todo = "first the certificate, above: without one no service can be asked"
        return [*found, Finding(Level.FAIL, part, "reaches services", "not tried", todo)]
    away = set()
    for service in SERVICES:
        for item in await check_reach(part, service, centre.target(service), tls, centre.server_name(service)):
            if item.level is Level.FAIL:
                away.add(service)
                tunnel = "; through a tunnel: is it open, and does `server_name` say what the certificate is for?"
                item = replace(item, todo=item.todo + tunnel)
            found.append(item)
    if not away & {"audit", "registry"}:
        found += [*await _witnesses(centre), *await _ledgers(centre)]
    return found


def _running(stack: Stack, part: Part) -> Finding:
    if part.running:
        return Finding(Level.OK, part.name, "runs", f"pid {part.pid}")
    centre = part.name in (*SERVICES, stack.postgres.name, stack.redis.name)
    todo = f"fedmesh up --dir {stack.folder}; why it ended stands in {part.log}"
    if centre:
        return Finding(Level.FAIL, part.name, "runs", "stopped", todo)
    return Finding(Level.WARN, part.name, "runs", "stopped", f"its log: {part.log}")


async def _process(path: Path, *, running: bool) -> list[Finding]:
    try:
        process = read_process(path)
    except FedmeshError as error:
        return [Finding(Level.FAIL, path.stem, "settings", error.message, "correct the settings: it would not start")]
    found = await asyncio.to_thread(check_settings, process)
    return [*found, *await check_network(process)] if running else found


async def _witnesses(centre: Centre) -> list[Finding]:
    try:
        async with stub(centre, "audit") as audit, stub(centre, "registry") as registry:
            rosters = await known_rosters(centre, registry, None)
            if not rosters:
                return []
            seen = await look_at(audit, log_key(centre), rosters)
            alarms = await call(audit.ListAlarms, audit_pb2.ListAlarmsRequest(limit=1))
    except FedmeshError as error:
        return [_unseen("audit", "witnesses", error, "fedmesh audit status; call the hospitals")]
    if alarms.total:
        text = f"{alarms.total} alarms are on record"
        return [Finding(Level.WARN, "audit", "witnesses", text, "docs/runbooks/FedmeshWitnessAlarm.md")]
    if seen.best is None:
        text = f"nothing is witnessed yet; {rosters[-1].threshold} of {rosters[-1].size} hospitals are needed"
        return [Finding(Level.WARN, "audit", "witnesses", text, "docs/runbooks/FedmeshWitnessStale.md")]
    text = f"{seen.best[1].size} of {seen.newest.size} entries are witnessed by {len(seen.best[2].signers)} hospitals"
    return [Finding(Level.OK, "audit", "witnesses", text)]


def _unseen(part: str, check: str, error: FedmeshError, todo: str) -> Finding:
    """What could not be looked at: a failure, unless this person may not look."""
    if error.code in REFUSALS:
        who = "fedmesh login as somebody who may, or ask one to run this"
        return Finding(Level.WARN, part, check, f"not looked at: {error.message}", who)
    return Finding(Level.FAIL, part, check, error.message, todo)


async def _ledgers(centre: Centre) -> list[Finding]:
    try:
        async with stub(centre, "registry") as registry:
            reported = await reported_ledgers(registry)
    except FedmeshError as error:
        return [_unseen("registry", "ledgers", error, "fedmesh privacy reconcile says more")]
    if isinstance(centre, RemoteCentre):
        verdicts = check_copies(reported)
    else:
        folders = (centre.folder / "hospitals").glob("*")
        homes = {path.name: path for path in folders if (path / LEDGER_FILE).is_file()}
        verdicts = compare_ledgers(homes, reported)
    todo = "fedmesh privacy reconcile; docs/runbooks/FedmeshLedgersDiffer.md"
    return [
        Finding(Level.OK, verdict.hospital_id, "ledger", verdict.text)
        if verdict.agrees
        else Finding(Level.FAIL, verdict.hospital_id, "ledger", verdict.text, todo)
        for verdict in verdicts
    ]
