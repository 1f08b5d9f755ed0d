"""What a hospital checks of a promoted version before it uses it, with no trust in the centre.

It chains: the registry signed a statement that names the state's digest, the plan and the roster; the statement's
digest is in the log; the log's checkpoint is cosigned by a quorum of the roster; the registry signed that every check
had passed when a second person approved; and at least t hospitals signed, with the keys of the roster that the job was
bound to, that the checks which only hospitals can make had passed for this very state.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NoReturn

from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import Roster
from services.transparency.attestation import VERDICT_PREDICATE, VERSION_PREDICATE, Statement, open_statement
from services.transparency.canonical import parse_canonical
from services.transparency.checkpoint import VerifierKey, open_checkpoint
from services.transparency.findings import HOSPITAL_CHECKS, open_findings
from services.transparency.merkle import leaf_hash, verify_inclusion
from services.transparency.receipt import Place
from services.transparency.witness import best_witnessed

ATTESTED: Final = "model.attested"


@dataclass(frozen=True)
class Report:
    """A hospital's signed word, as the registry hands it out."""

    hospital_id: str
    statement: bytes
    signature: bytes


@dataclass(frozen=True)
class Claim:
    """What the centre says of a version; nothing of it is believed.

    envelope: the version's statement. leaf, entry: the log's entry of the event that tells of it, and its place.
    checkpoint: the cosigned note over that tree. proposed_by, approved_by, verdict: of the promotion. reports: what
    hospitals signed. rosters: the whole chain, from the founding one, each verified under the one before.
    """

    job_id: str
    version: int
    state_sha256: str
    plan: bytes
    envelope: bytes
    leaf: bytes
    entry: Place
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
    _require_logged(claim, registry.name.removesuffix("/registry"), log)
    _require_promoted(claim, registry)
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
    if not isinstance(plan, dict) or plan.get("plan_id") != sha256(claim.plan).hexdigest():
        _refuse("the registry's plan is not the one that the statement names")


def _require_logged(claim: Claim, consortium: str, log: VerifierKey) -> None:
    try:
        event = parse_canonical(claim.leaf)
        body = event["body"]
        said = (event["type"], event["source"], event["subject"], body["version"], body["statement_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise FedmeshError(Code.PROOF_INVALID, "the log's entry tells of no model version") from error
    expected = (
        ATTESTED,
        f"spiffe://{consortium}/service/registry",
        f"job/{claim.job_id}",
        claim.version,
        sha256(claim.envelope).hexdigest(),
    )
    if said != expected:
        _refuse("the log's entry is not the one that tells of this version's statement: the version is not in the log")
    checkpoint = open_checkpoint(claim.checkpoint, log)
    if claim.entry.size != checkpoint.size:
        _refuse(f"the entry is proven in a tree of {claim.entry.size} entries, the checkpoint has {checkpoint.size}")
    verify_inclusion(leaf_hash(claim.leaf), claim.entry.index, checkpoint.size, claim.entry.hashes, checkpoint.root)
    witnessed = best_witnessed(claim.checkpoint, list(claim.rosters))
    if not witnessed.complete:
        roster = witnessed.roster
        _refuse(
            f"the checkpoint is not witnessed: {len(witnessed.signers)} of {roster.size} hospitals cosigned it,"
            f" {roster.threshold} are needed"
        )


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
    blocking = sorted(name for name, one in checks.items() if one.get("outcome") != "passed")
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
