"""Aliases, tags, checks and promotion over real PostgreSQL, as operators and hospitals see them."""

import io
import json
from collections import Counter
from functools import partial
from itertools import accumulate
from typing import Any

import psycopg
import pytest
from fedmesh.registry.v1 import promotion_pb2 as pm
from fedmesh.registry.v1 import registry_pb2 as pb
from rich.console import Console

from services.cli.card import card
from services.cli.lineage import as_dot, as_json, as_tree, build
from services.cli.versions import Registry as Asked
from services.cli.versions import find_version, read_recorded
from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from services.plans.checks import Checks
from services.plans.manifest import canonical_bytes
from services.privacy.chain import Entry, Head
from services.transparency.attestation import (
    VERDICT_PREDICATE,
    VERSION_PREDICATE,
    claimed_predicate,
    open_statement,
)
from services.transparency.checkpoint import load_signing_key
from services.transparency.findings import HOSPITAL_CHECKS, Finding, Findings
from tests.integration.registry.harness import HOSPITALS, Registry, code, digest, keys, manifest, refused
from tests.integration.registry.test_isolation import context, rows
from tests.integration.registry.test_ledgers import chain, charged, reporting, reserved

ROUNDS = 3
MODEL = "readmission-logistic-private"
BOUNDS = Checks(least_auroc=0.6, largest_auroc_drop=0.05)


async def a_job(registry: Registry, *hospitals: str, checks: Checks | None = BOUNDS, private: bool = True) -> pb.Job:
    """A running job of three rounds, the last of which measures."""
    await registry.found(*HOSPITALS)
    content = canonical_bytes(manifest(private, ROUNDS).model_copy(update={"checks": checks}))
    plan = await call(registry.operator().CreatePlan, pb.CreatePlanRequest(request_id=new_id(), manifest=content))
    approving = pb.ApprovePlanRequest(request_id=new_id(), plan_id=plan.plan.plan_id)
    await call(registry.operator("bob").ApprovePlan, approving)
    request = pb.CreateJobRequest(request_id=new_id(), plan_id=plan.plan.plan_id, hospital_ids=hospitals or HOSPITALS)
    created: pb.CreateJobResponse = await call(registry.operator().CreateJob, request)
    return created.job


async def run(registry: Registry, job: pb.Job, *aurocs: float) -> pb.Job:
    """Commit the rounds with these measurements; the job as it is then."""
    for version, auroc in enumerate(aurocs, 1):
        metrics = json.dumps({"auroc": auroc, "loss": 0.3})
        job = await registry.commit(job, version, metrics_json=metrics)
    return job


async def charge(registry: Registry, *jobs: pb.Job) -> None:
    """Every hospital reports a charge for each round of these jobs."""
    entries: list[Entry] = []
    for job in jobs:
        entries.append(reserved(entries[-1].head if entries else Head(), job.job_id))
        entries.extend(accumulate(range(1, ROUNDS + 1), partial(_charged, job.job_id), initial=entries.pop()))
    for name in HOSPITALS:
        await call(registry.hospital(name).ReportLedger, reporting(entries, by=name))


def _charged(job_id: str, before: Entry, number: int) -> Entry:
    return charged(before.head, job_id, number)


def findings(job: pb.Job, name: str, state: str = "", **failed: str) -> Findings:
    """What a hospital found: everything passed, besides `failed` (underscores for dashes) with its reason."""
    found = []
    for check in HOSPITAL_CHECKS:
        reason = failed.get(check.replace("-", "_"), "")
        found.append(Finding(check, not reason, reason or "as it should be", {"auc": 0.51}))
    return Findings(name, job.job_id, ROUNDS, state or digest(f"state {ROUNDS}".encode()), tuple(found))


def checking(said: Findings, by: str = "") -> pm.ReportChecksRequest:
    by = by or said.hospital_id
    report = pm.CheckReport(hospital_id=by, statement=said.to_bytes(), signature=said.sign(keys(by).signing))
    return pm.ReportChecksRequest(request_id=new_id(), report=report)


async def report(registry: Registry, job: pb.Job, *hospitals: str, **failed: str) -> None:
    for name in hospitals or job.hospital_ids:
        await call(registry.promotion(name, "hospital").ReportChecks, checking(findings(job, name, "", **failed)))


def proposing(
    job: pb.Job, version: int = ROUNDS, alias: str = "production", reason: str = ""
) -> pm.ProposePromotionRequest:
    return pm.ProposePromotionRequest(
        request_id=new_id(), job_id=job.job_id, version=version, alias=alias, reason=reason
    )


def approving(promotion_id: str) -> pm.ApprovePromotionRequest:
    return pm.ApprovePromotionRequest(request_id=new_id(), promotion_id=promotion_id)


async def provenance(registry: Registry, job: pb.Job, version: int = ROUNDS, **caller: str) -> Any:
    asked = pm.GetProvenanceRequest(job_id=job.job_id, version=version)
    return await call(registry.promotion(**caller).GetProvenance, asked)


async def promotable(registry: Registry, *hospitals: str) -> pb.Job:
    job = await a_job(registry, *hospitals)
    done = await run(registry, job, 0.60, 0.63, 0.64)
    await charge(registry, job)
    await report(registry, job)
    return done


async def test_two_people_promote_a_version_whose_checks_passed(registry: Registry) -> None:
    job = await promotable(registry)
    proposed = (await call(registry.promotion().ProposePromotion, proposing(job))).promotion
    assert (proposed.model, proposed.version, proposed.approved_by) == (MODEL, ROUNDS, "")
    assert list((await call(registry.promotion().ListAliases, pm.ListAliasesRequest())).aliases) == []

    own = await refused(call(registry.promotion().ApprovePromotion, approving(proposed.promotion_id)))
    assert own.code is Code.PERMISSION_DENIED
    approved = (await call(registry.promotion("bob").ApprovePromotion, approving(proposed.promotion_id))).promotion
    assert approved.approved_by.endswith("/operator/bob")
    again = await code(call(registry.promotion("carol").ApprovePromotion, approving(proposed.promotion_id)))
    assert again is Code.WRONG_STATE

    [alias] = (await call(registry.promotion().ListAliases, pm.ListAliasesRequest(model=MODEL))).aliases
    assert (alias.alias, alias.job_id, alias.version) == ("production", job.job_id, ROUNDS)
    assert alias.promotion_id == proposed.promotion_id
    seen = await provenance(registry, job)
    assert {item.check: item.outcome for item in seen.checks} == dict.fromkeys(
        ("privacy", "attestation", "quorum", "budget", "convergence", "divergence", *HOSPITAL_CHECKS),
        pm.CHECK_OUTCOME_PASSED,
    )
    await registry.drained()
    assert registry.audit.types()[-5:] == [
        "promotion.proposed",
        "call.refused",
        "promotion.approved",
        "alias.moved",
        "call.refused",
    ]
    by_type = {event.type: event for event in registry.audit.events}
    assert by_type["promotion.proposed"].actor.endswith("/operator/alice")
    assert by_type["promotion.approved"].actor.endswith("/operator/bob")
    verifier = load_signing_key(registry.ca.folder / "statements.key").verifier
    verdicts = [open_statement(item, verifier, VERDICT_PREDICATE) for item in approved.verdicts]
    assert [item.sha256 for item in verdicts] == [digest(b"state 3")] * 2
    assert json.loads(by_type["promotion.approved"].body_json)["verdict_sha256"] == digest(approved.verdicts[1])

    await look(registry, job)

    # Every version has a statement whose digest is in the log.
    seen = await provenance(registry, job, 2)
    said = open_statement(seen.attestation.envelope, verifier, VERSION_PREDICATE)
    assert (said.subject, said.sha256) == (f"{MODEL}/{job.job_id}/2", digest(b"state 2"))
    assert said.predicate["parent"] == {"state_sha256": digest(b"state 1"), "version": 1}
    assert said.predicate["privacy"]["epsilon"] == 0.5
    assert said.predicate["contributions"].keys() == set(HOSPITALS)
    told = registry.audit.events[seen.attestation.index]
    assert (told.type, told.event_id) == ("model.attested", seen.attestation.event_id)
    assert json.loads(told.body_json)["statement_sha256"] == digest(seen.attestation.envelope)


async def look(registry: Registry, job: pb.Job) -> None:
    """What a person sees of a promoted version."""
    asked = Asked(registry.operator(), registry.promotion())
    seen = await read_recorded(asked, f"{MODEL}@production")
    assert seen.reference == f"{job.job_id}/{ROUNDS}"
    assert seen == await read_recorded(asked, f"{job.job_id[:8]}/{ROUNDS}")
    graph = build(seen)
    kinds = Counter(node.kind for node in graph.nodes)
    assert (kinds["ciphertext"], kinds["round"], kinds["check"], kinds["version"]) == (15, 3, 9, 2)
    assert {edge.target for edge in graph.edges} == {node.id for node in graph.nodes[1:]}
    assert len(json.loads(as_json(graph))["edges"]) == len(graph.edges)
    assert as_dot(graph).count(" -> ") == len(graph.edges)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_tree(graph))
    tree = console.export_text()
    for part in ("promised epsilon 0.5", "to production, proposed by alice, approved by bob", "known as", HOSPITALS[4]):
        assert part in tree
    written = card(seen)
    for part in ("Known as `production`", "| membership-inference | passed | 5 hospitals |", digest(b"state 3")):
        assert part in written
    for wrong, expected in (("x/1", Code.INVALID_ARGUMENT), ("staging", Code.NOT_FOUND), ("abcdef/1", Code.NOT_FOUND)):
        assert await code(find_version(asked, wrong)) is expected


async def test_a_check_that_failed_or_is_missing_blocks_and_says_why(registry: Registry) -> None:
    weak, unpaid, leaking, unchecked = [await a_job(registry) for _ in range(4)]
    await run(registry, weak, 0.55, 0.56, 0.57)
    for job in (unpaid, leaking, unchecked):
        await run(registry, job, 0.60, 0.63, 0.64)
    await charge(registry, weak, leaking, unchecked)
    await report(registry, weak)
    await report(registry, unpaid)
    await report(registry, leaking, membership_inference="attack AUC 0.71 is above 0.6")
    await report(registry, unchecked, *HOSPITALS[:3])
    for job, version, reason in (
        (weak, ROUNDS, "convergence failed: validation AUROC 0.5700 is below 0.6"),
        (unpaid, ROUNDS, "budget failed: 15 contributions whose charge no hospital reported"),
        (leaking, ROUNDS, "membership-inference failed: attack AUC 0.71 is above 0.6"),
        (unchecked, ROUNDS, "subgroups missing: 3 hospitals signed that it passed, 0 that it failed; 4 are needed"),
        # What is measured is of the last version.
        (weak, 2, "convergence missing"),
        (weak, 2, "membership-inference missing"),
    ):
        error = await refused(call(registry.promotion().ProposePromotion, proposing(job, version)))
        assert (error.code, reason in error.message) == (Code.WRONG_STATE, True), error.message
    await registry.drained()
    told = json.loads(registry.audit.events[-1].body_json)
    assert (told["method"], told["code"]) == ("ProposePromotion", "wrong-state")
    assert await code(call(registry.promotion().ProposePromotion, proposing(weak, 9))) is Code.NOT_FOUND

    exposed = await a_job(registry, private=False)
    await run(registry, exposed, 0.60, 0.63, 0.64)
    error = await refused(call(registry.promotion().ProposePromotion, proposing(exposed)))
    assert (error.code, "no differential privacy" in error.message) == (Code.PRIVACY_REFUSED, True)


async def test_candidate_moves_freely_and_what_became_true_since_blocks_an_approval(registry: Registry) -> None:
    job = await promotable(registry)
    stub = registry.promotion()
    for version in (1, 2):
        moving = pm.SetAliasRequest(request_id=new_id(), alias="candidate", job_id=job.job_id, version=version)
        assert (await call(stub.SetAlias, moving)).alias.version == version
    [alias] = (await call(stub.ListAliases, pm.ListAliasesRequest())).aliases
    assert (alias.alias, alias.version, alias.promotion_id) == ("candidate", 2, "")
    by_hand = pm.SetAliasRequest(request_id=new_id(), alias="production", job_id=job.job_id, version=1)
    assert await code(call(stub.SetAlias, by_hand)) is Code.PERMISSION_DENIED
    wrong = pm.SetAliasRequest(request_id=new_id(), alias="Not'; drop", job_id=job.job_id, version=1)
    assert await code(call(stub.SetAlias, wrong)) is Code.INVALID_ARGUMENT

    def tag(value: str) -> pm.SetTagRequest:
        return pm.SetTagRequest(request_id=new_id(), job_id=job.job_id, version=1, key="reviewed", value=value)

    assert [(item.key, item.value) for item in (await call(stub.SetTag, tag("yes"))).tags] == [("reviewed", "yes")]
    assert list((await call(stub.SetTag, tag(""))).tags) == []
    await registry.drained()
    moves = [json.loads(item.body_json) for item in registry.audit.events if item.type == "alias.moved"]
    assert [(item["version"], item["previous"]) for item in moves] == [(1, ""), (2, f"{job.job_id}/1")]

    proposed = (await call(stub.ProposePromotion, proposing(job))).promotion
    await call(registry.hospital().ReportLedger, reporting(chain("another job", 5), by=HOSPITALS[0]))
    error = await refused(call(registry.promotion("bob").ApprovePromotion, approving(proposed.promotion_id)))
    assert f"another ledger than the one reported before: {HOSPITALS[0]}" in error.message
    assert [item.alias for item in (await call(stub.ListAliases, pm.ListAliasesRequest())).aliases] == ["candidate"]


async def test_a_job_whose_model_gets_worse_stops_with_its_last_good_version(registry: Registry) -> None:
    job = await a_job(registry)
    ended = await run(registry, job, 0.60, 0.64, 0.58)
    assert ended.status == pb.JOB_STATUS_FAILED
    why = "AUROC 0.5800 in round 3, more than 0.05 below the 0.6400 of version 1"
    assert ended.reason == f"diverged, version 1 is the result: {why}"
    seen = await provenance(registry, job)
    assert (seen.rollback.good_version, seen.rollback.diverged_version, seen.rollback.reason) == (1, 3, why)
    outcomes = {item.check: item.reason for item in seen.checks if item.outcome == pm.CHECK_OUTCOME_FAILED}
    assert outcomes["divergence"] == f"rolled back to version 1: {why}"
    await registry.drained()
    assert registry.audit.types()[-4:] == ["round.committed", "model.attested", "model.rolled_back", "job.ended"]
    told = json.loads(registry.audit.events[-2].body_json)
    assert (told["good_version"], told["diverged_version"]) == (1, 3)
    graph = build(await read_recorded(Asked(registry.operator(), registry.promotion()), f"{job.job_id}/1"))
    assert [node.text for node in graph.nodes if node.kind == "rollback"] == [f"version 1 is the job's result: {why}"]


async def test_two_people_promote_what_a_roll_back_took_away_for_a_reason_that_they_state(registry: Registry) -> None:
    job = await a_job(registry)
    await run(registry, job, 0.60, 0.67, 0.61)
    await charge(registry, job)
    await report(registry, job)
    stub = registry.promotion()
    error = await refused(call(stub.ProposePromotion, proposing(job)))
    assert "divergence failed: rolled back to version 1" in error.message
    short = await refused(call(stub.ProposePromotion, proposing(job, reason="x" * 501)))
    assert short.code is Code.INVALID_ARGUMENT

    proposed = (await call(stub.ProposePromotion, proposing(job, reason="noise; [validated] elsewhere"))).promotion
    assert proposed.reason == "noise; [validated] elsewhere"
    assert await code(call(stub.ApprovePromotion, approving(proposed.promotion_id))) is Code.PERMISSION_DENIED
    approved = (await call(registry.promotion("bob").ApprovePromotion, approving(proposed.promotion_id))).promotion
    verdicts = [claimed_predicate(item) for item in approved.verdicts]
    assert [item["waived"] for item in verdicts] == [{"divergence": proposed.reason}] * 2
    assert verdicts[1]["checks"]["divergence"]["outcome"] == "failed", "it is set aside, not made to have passed"
    await registry.drained()
    told = {item.type: json.loads(item.body_json) for item in registry.audit.events if "promotion." in item.type}
    assert {body["reason"] for body in told.values()} == {proposed.reason}
    recorded = await read_recorded(Asked(registry.operator(), registry.promotion()), "production")
    [line] = [node.text for node in build(recorded).nodes if node.kind == "promotion"]
    assert line.endswith("divergence set aside: noise; [validated] elsewhere")


async def test_a_reason_sets_nothing_else_aside(registry: Registry) -> None:
    job = await promotable(registry)
    error = await refused(call(registry.promotion().ProposePromotion, proposing(job, reason="because")))
    assert error.code is Code.INVALID_ARGUMENT
    other = await a_job(registry)
    await run(registry, other, 0.60, 0.67, 0.59)
    await charge(registry, job, other)
    await report(registry, other, subgroups="a group is failed")
    error = await refused(call(registry.promotion().ProposePromotion, proposing(other, reason="because")))
    assert "convergence failed" in error.message
    assert "subgroups failed: a group is failed" in error.message
    assert "divergence" not in error.message


async def test_hospitals_report_for_themselves_once_and_in_order(registry: Registry) -> None:
    job = await a_job(registry)
    await run(registry, job, 0.60, 0.63, 0.64)
    north, south = HOSPITALS[:2]
    stub = registry.promotion(north, "hospital")
    said = findings(job, north)
    await call(stub.ReportChecks, checking(said))
    await call(stub.ReportChecks, checking(said))
    assert len((await provenance(registry, job)).reports) == 1
    other = findings(job, north, subgroups="worse for some")
    assert await code(call(stub.ReportChecks, checking(other))) is Code.WRONG_STATE
    assert await code(call(stub.ReportChecks, checking(findings(job, south)))) is Code.PERMISSION_DENIED
    foreign = registry.promotion(south, "hospital")
    forged = checking(findings(job, south))
    forged.report.signature = findings(job, south).sign(keys(north).signing)
    assert await code(call(foreign.ReportChecks, forged)) is Code.STATEMENT_INVALID
    elsewhere = checking(findings(job, south, state="a" * 64))
    assert await code(call(foreign.ReportChecks, elsewhere)) is Code.STATEMENT_INVALID
    for statement in (b"", b"{}", b"\xff", b'{"job_id":1,"version":1}', b"[" * 9000):
        bad = checking(findings(job, south))
        bad.report.statement = statement
        assert await code(call(foreign.ReportChecks, bad)) is Code.STATEMENT_INVALID


async def test_a_hospital_moves_nothing_and_sees_its_own_jobs_only(registry: Registry) -> None:
    job = await promotable(registry, *HOSPITALS[:4])
    proposed = (await call(registry.promotion().ProposePromotion, proposing(job))).promotion
    await call(registry.promotion("bob").ApprovePromotion, approving(proposed.promotion_id))
    tagging = pm.SetTagRequest(request_id=new_id(), job_id=job.job_id, version=3, key="reviewed", value="yes")
    await call(registry.promotion().SetTag, tagging)
    member, stranger = HOSPITALS[0], HOSPITALS[4]
    stub = registry.promotion(member, "hospital")
    moving = pm.SetAliasRequest(request_id=new_id(), alias="candidate", job_id=job.job_id, version=1)
    for forbidden in (
        call(stub.SetAlias, moving),
        call(stub.SetTag, tagging),
        call(stub.ProposePromotion, proposing(job)),
        call(stub.ApprovePromotion, approving(proposed.promotion_id)),
    ):
        assert await code(forbidden) is Code.PERMISSION_DENIED
    assert len((await call(stub.ListAliases, pm.ListAliasesRequest())).aliases) == 1
    seen = await provenance(registry, job, name=member, kind="hospital")
    assert (len(seen.promotions), len(seen.reports), len(seen.charges)) == (1, 4, 0)
    outside = registry.promotion(stranger, "hospital")
    assert list((await call(outside.ListAliases, pm.ListAliasesRequest())).aliases) == []
    asked = pm.GetProvenanceRequest(job_id=job.job_id, version=3)
    assert await code(call(outside.GetProvenance, asked)) is Code.NOT_FOUND

    tables = ("attestations", "check_reports", "promotions", "alias_moves", "tag_changes")
    for settings, visible in (
        ({"scope": "consortium"}, True),
        ({"hospital_id": member}, True),
        ({"hospital_id": stranger}, False),
        ({}, False),
    ):
        with context(registry, **settings) as connection:
            assert [table for table in tables if bool(rows(connection, table)) is not visible] == []
    for statement in (
        "insert into registry.alias_moves (model, alias, job_id, version, moved_by, moved_at)"
        " select model, 'candidate', job_id, 1, '', now() from registry.promotions",
        "insert into registry.tag_changes (job_id, version, key, value, set_by, set_at)"
        " select job_id, 1, 'k', 'v', '', now() from registry.promotions",
        f"insert into registry.check_reports select '{HOSPITALS[1]}', job_id, 1, statement, signature, now()"
        " from registry.check_reports limit 1",
        "insert into registry.rollbacks select job_id, 3, 1, '', now() from registry.promotions",
        "delete from registry.alias_moves",
        "update registry.alias_moves set version = 1",
        "update registry.attestations set envelope = 'xx'",
    ):
        with context(registry, hospital_id=member) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())
    with context(registry, scope="consortium") as connection:
        # Approved once: nobody approves, or unapproves, it again.
        assert connection.execute("update registry.promotions set approved_by = 'x'").rowcount == 0
    with context(registry, scope="consortium") as connection, pytest.raises(psycopg.errors.CheckViolation):
        connection.execute(
            "insert into registry.alias_moves (model, alias, job_id, version, moved_by, moved_at)"
            " select model, 'production', job_id, 1, '', now() from registry.promotions"
        )
