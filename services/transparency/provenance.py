"""What a hospital checks of a promoted version before it uses it, with no trust in the centre.

It chains: the registry signed a statement that names the state's digest, the plan and the roster; the statement's
digest is in the log, and so is the move of the alias to this version by the one who approved; the log's checkpoint is
cosigned by a quorum of the roster; the registry signed that every check had passed when a second person approved, or
which one the two set aside and why; and at least t hospitals signed, with the keys of the roster that the job was
bound to, that the checks which only hospitals can make had passed for this very state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NoReturn

from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import Roster
from services.transparency.attestation import (
    VERDICT_PREDICATE,
    VERSION_PREDICATE,
    WAIVABLE,
    Statement,
    open_statement,
)
from services.transparency.canonical import parse_canonical
from services.transparency.checkpoint import VerifierKey, open_checkpoint
from services.transparency.findings import HOSPITAL_CHECKS, open_findings
from services.transparency.merkle import leaf_hash, verify_inclusion
from services.transparency.receipt import Place
from services.transparency.witness import best_witnessed

ATTESTED: Final = "model.attested"
MOVED: Final = "alias.moved"
# Fields of an entry that its body, which other services may have had a say in, must not be asked for.
_HEADER: Final = frozenset({"actor", "source", "subject", "type"})


@dataclass(frozen=True)
class Report:
    """A hospital's signed word, as the registry hands it out."""

    hospital_id: str
    statement: bytes
    signature: bytes


@dataclass(frozen=True)
class Logged:
    """An entry of the log, and its place in the tree of the checkpoint."""

    leaf: bytes
    place: Place


@dataclass(frozen=True)
class Claim:
    """What the centre says of a version; nothing of it is believed.

    envelope: the version's statement; attested: the entry that tells of it. alias: what the version is said to be known
    as; moved: the entry that tells of it. checkpoint: the cosigned note over the tree of both. proposed_by,
    approved_by, verdict: of the promotion. reports: what hospitals signed. rosters: the whole chain, from the founding
    one, each verified under the one before.
    """

    job_id: str
    version: int
    state_sha256: str
    plan: bytes
    envelope: bytes
    attested: Logged
    alias: str
    moved: Logged
    checkpoint: str
    proposed_by: str
    approved_by: str
    verdict: bytes
    reports: tuple[Report, ...]
    rosters: tuple[Roster, ...]


def verify_claim(claim: Claim, registry: VerifierKey, log: VerifierKey) -> Statement:
    """The version's statement, once everything that is claimed was found to hold.

    registry, log: their public keys, from a source other than the centre.

    Raises: FedmeshError(PROOF_INVALID | STATEMENT_INVALID) saying which link does not hold.
    """
    statement = open_statement(claim.envelope, registry, VERSION_PREDICATE)
    _require_about(statement, claim)
    roster = next((one for one in claim.rosters if one.sha256 == statement.predicate.get("roster_sha256")), None)
    if roster is None:
        _refuse("the version's roster is none that hospitals signed")
    _require_promoted(claim, registry)
    _require_logged(claim, statement.predicate["plan"]["plan_name"], registry.name.removesuffix("/registry"), log)
    _require_findings(claim, roster)
    return statement


def require_state(blob: bytes, statement: Statement) -> None:
    """Raises: FedmeshError(PROOF_INVALID) when the bytes are not the state that the statement is about."""
    if sha256(blob).hexdigest() != statement.sha256:
        _refuse("the sealed state was tampered with: it does not have the SHA-256 that the version's statement names")


def _require_about(statement: Statement, claim: Claim) -> None:
    told = statement.predicate
    if (told.get("job_id"), told.get("version"), statement.sha256) != (
        claim.job_id,
        claim.version,
        claim.state_sha256,
    ):
        _refuse(f"the statement is not about version {claim.version} of job {claim.job_id} and its state")
    plan = told.get("plan")
    if not isinstance(plan, dict) or "plan_name" not in plan or plan.get("plan_id") != sha256(claim.plan).hexdigest():
        _refuse("the registry's plan is not the one that the statement names")


def _require_logged(claim: Claim, model: str, consortium: str, log: VerifierKey) -> None:
    checkpoint = open_checkpoint(claim.checkpoint, log)
    registry = f"spiffe://{consortium}/service/registry"
    about = {"source": registry, "subject": f"job/{claim.job_id}", "version": claim.version}
    attested = {**about, "type": ATTESTED, "statement_sha256": sha256(claim.envelope).hexdigest()}
    if _said(claim.attested.leaf, attested) != attested:
        _refuse("the log's entry is not the one that tells of this version's statement: the version is not in the log")
    moved = {**about, "type": MOVED, "actor": claim.approved_by, "alias": claim.alias, "model": model}
    if _said(claim.moved.leaf, moved) != moved:
        _refuse(
            f"the log's entry is not the one that tells of {claim.alias} moving to this version: the move is not in the"
            " log"
        )
    for entry in (claim.attested, claim.moved):
        place = entry.place
        if place.size != checkpoint.size:
            _refuse(f"the entry is proven in a tree of {place.size} entries, the checkpoint has {checkpoint.size}")
        verify_inclusion(leaf_hash(entry.leaf), place.index, checkpoint.size, place.hashes, checkpoint.root)
    witnessed = best_witnessed(claim.checkpoint, list(claim.rosters))
    if not witnessed.complete:
        roster = witnessed.roster
        _refuse(
            f"the checkpoint is not witnessed: {len(witnessed.signers)} of {roster.size} hospitals cosigned it,"
            f" {roster.threshold} are needed"
        )


def _said(leaf: bytes, expected: Mapping[str, object]) -> dict[str, object]:
    """What an entry of the log says of these fields. Raises: FedmeshError(PROOF_INVALID)."""
    try:
        event = parse_canonical(leaf)
        body = event["body"]
        return {name: (event if name in _HEADER else body)[name] for name in expected}
    except (ValueError, KeyError, TypeError) as error:
        raise FedmeshError(Code.PROOF_INVALID, "the log's entry tells of no model version") from error


def _require_promoted(claim: Claim, registry: VerifierKey) -> None:
    if not claim.approved_by or claim.approved_by == claim.proposed_by:
        _refuse("no two people promoted this version")
    verdict = open_statement(claim.verdict, registry, VERDICT_PREDICATE)
    told = verdict.predicate
    if (told.get("job_id"), told.get("version"), verdict.sha256) != (claim.job_id, claim.version, claim.state_sha256):
        _refuse("the verdict is about another version")
    checks = told.get("checks")
    if not isinstance(checks, dict) or not checks:
        _refuse("the verdict names no checks")
    waived = told.get("waived", {})
    if not isinstance(waived, dict) or not all(waived.values()) or not WAIVABLE.issuperset(waived):
        _refuse("the verdict sets a check aside that nobody may, or for no reason")
    blocking = sorted(name for name, one in checks.items() if one.get("outcome") != "passed" and name not in waived)
    if blocking:
        _refuse(f"checks that had not passed: {', '.join(blocking)}")


def _require_findings(claim: Claim, roster: Roster) -> None:
    passed: dict[str, set[str]] = {check: set() for check in HOSPITAL_CHECKS}
    for report in claim.reports:
        found = open_findings(report.statement, report.signature, roster.signing_key(report.hospital_id))
        about = (found.hospital_id, found.job_id, found.version, found.state_sha256)
        if about != (report.hospital_id, claim.job_id, claim.version, claim.state_sha256):
            _refuse(f"{report.hospital_id}'s report is about another version or state")
        for item in found.findings:
            if item.passed:
                passed[item.check].add(report.hospital_id)
    short = [name for name, names in passed.items() if len(names) < roster.threshold]
    if short:
        _refuse(f"fewer than {roster.threshold} hospitals signed that these passed: {', '.join(short)}")


def _refuse(message: str) -> NoReturn:
    raise FedmeshError(Code.PROOF_INVALID, message)
