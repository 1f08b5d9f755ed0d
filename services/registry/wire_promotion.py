"""Between protobuf messages and the registry's own types: aliases, tags, checks, promotions."""

from typing import Final
from uuid import UUID

from fedmesh.registry.v1 import promotion_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.ids import require_uuid
from services.registry import wire
from services.registry.domain import promotion as domain
from services.registry.usecases.promotions import Provenance
from services.secure_sum.statements import SIGNATURE_BYTES
from services.transparency.canonical import canonical_json, parse_json
from services.transparency.findings import MAX_BYTES

_OUTCOME: Final = {
    domain.Outcome.PASSED: pb.CHECK_OUTCOME_PASSED,
    domain.Outcome.FAILED: pb.CHECK_OUTCOME_FAILED,
    domain.Outcome.MISSING: pb.CHECK_OUTCOME_MISSING,
}
_MAX_VERSION: Final = 2**31 - 1
_MAX_REASON: Final = 500


def require_version(value: int) -> int:
    """Raises: FedmeshError(INVALID_ARGUMENT) for a number beyond 31 bits."""
    if value > _MAX_VERSION:
        raise FedmeshError(Code.INVALID_ARGUMENT, "version is too large", field="version")
    return value


def require_reason(value: str) -> str:
    """Raises: FedmeshError(INVALID_ARGUMENT) for one of more than 500 characters."""
    if len(value) > _MAX_REASON:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a reason has at most {_MAX_REASON} characters", field="reason")
    return value.strip()


def read_report(request: pb.ReportChecksRequest, caller: Identity) -> tuple[UUID, domain.CheckReport]:
    """A hospital's report, and the job that it says it is about.

    Raises: FedmeshError(INVALID_ARGUMENT | TOO_LARGE | STATEMENT_INVALID).
    """
    report = request.report
    if report.hospital_id != caller.name:
        raise FedmeshError(Code.PERMISSION_DENIED, "a hospital reports for itself only", field="report.hospital_id")
    if len(report.statement) > MAX_BYTES or len(report.signature) != SIGNATURE_BYTES:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"a report has at most {MAX_BYTES} bytes and a signature of {SIGNATURE_BYTES}",
            field="report",
        )
    try:
        said = parse_json(report.statement)
        job_id, version = require_uuid(said["job_id"], "job_id"), require_version(int(said["version"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedmeshError(Code.STATEMENT_INVALID, "the report is no report of model checks") from error
    return job_id, domain.CheckReport(caller.name, job_id, version, report.statement, report.signature)


def alias(value: domain.Alias) -> pb.Alias:
    return pb.Alias(
        model=value.model,
        alias=value.alias,
        job_id=str(value.job_id),
        version=value.version,
        moved_by=value.moved_by,
        moved_at=wire.timestamp(value.moved_at),
        promotion_id=str(value.promotion_id or ""),
    )


def tags(values: tuple[domain.Tag, ...]) -> list[pb.Tag]:
    return [
        pb.Tag(key=item.key, value=item.value, set_by=item.set_by, set_at=wire.timestamp(item.set_at))
        for item in values
    ]


def check(value: domain.Check) -> pb.Check:
    return pb.Check(
        check=value.check,
        outcome=_OUTCOME[value.outcome],
        reason=value.reason,
        figures_json=canonical_json(dict(value.figures)).decode(),
        made_by=value.made_by,
        signed_by=value.signed_by,
    )


def promotion(value: domain.Promotion) -> pb.Promotion:
    return pb.Promotion(
        promotion_id=str(value.promotion_id),
        model=value.model,
        alias=value.alias,
        job_id=str(value.job_id),
        version=value.version,
        proposed_by=value.proposed_by,
        proposed_at=wire.timestamp(value.proposed_at),
        approved_by=value.approved_by or "",
        approved_at=wire.timestamp(value.approved_at),
        verdicts=[item for item in (value.proposal_verdict, value.approval_verdict) if item],
        reason=value.reason,
        alias_index=value.alias_index,
    )


def provenance(value: Provenance) -> pb.GetProvenanceResponse:
    made, back = value.attestation, value.rollback
    return pb.GetProvenanceResponse(
        attestation=None
        if made is None
        else pb.Attestation(envelope=made.envelope, event_id=str(made.event_id), index=made.index),
        checks=map(check, value.checks),
        reports=[
            pb.CheckReport(hospital_id=item.hospital_id, statement=item.statement, signature=item.signature)
            for item in value.reports
        ],
        promotions=map(promotion, value.promotions),
        aliases=map(alias, value.aliases),
        tags=tags(value.tags),
        rollback=None
        if back is None
        else pb.Rollback(
            diverged_version=back.diverged_version,
            good_version=back.good_version,
            reason=back.reason,
            at=wire.timestamp(back.at),
        ),
        charges=[
            pb.JobCharges(hospital_id=name, charged=charged) for name, charged in sorted(value.spending.charged.items())
        ],
    )
