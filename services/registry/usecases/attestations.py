"""Signed statements of the registry about model versions."""

import hashlib
from collections.abc import Sequence
from typing import Any

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.plans.manifest import PlanManifest, read_manifest, schema_sha256
from services.registry.domain.entities import CommittedRound, Job, Plan
from services.registry.domain.events import event
from services.registry.domain.promotion import Attestation, Check, Evidence, verdict
from services.registry.usecases.ports import Transaction
from services.transparency.attestation import VERDICT_PREDICATE, VERSION_PREDICATE, Statement, sign_statement
from services.transparency.checkpoint import SigningKey


class Attestor:
    """Signs with the registry's key. Without one it attests nothing, and nothing can be promoted."""

    def __init__(self, key: SigningKey | None) -> None:
        self._key = key

    async def attest(self, tx: Transaction, caller: Identity, job: Job, committed: CommittedRound) -> None:
        """Store the statement of a version that is being committed, with the event that tells of its SHA-256."""
        if self._key is None:
            return
        plan = await tx.plans.get(job.plan_id)
        assert plan is not None, "a foreign key holds the plan"
        envelope = sign_statement(_of_version(plan, job, committed), self._key)
        sha256 = hashlib.sha256(envelope).hexdigest()
        told = committed.round
        facts = {
            "version": told.version,
            "state_sha256": told.state_sha256,
            "statement_sha256": sha256,
            # Who may read this entry of the log by itself.
            "hospitals": list(job.hospital_ids),
        }
        telling = event("model.attested", committed.committed_at, caller, f"job/{job.job_id}", **facts)
        await tx.promotions.add_attestation(Attestation(job.job_id, told.version, envelope, sha256, telling.event_id))
        await tx.outbox.add([telling])

    def sign_verdict(self, seen: Evidence, checks: Sequence[Check], reason: str) -> bytes:
        """The envelope of the checks of a version. reason: why a failed one was set aside; empty when none was.

        Raises: FedmeshError(WRONG_STATE) without a signing key.
        """
        if self._key is None:
            raise FedmeshError(
                Code.WRONG_STATE, "this registry has no signing key: set `signing_key` in its configuration"
            )
        told = seen.rounds[-1].round
        statement = Statement(
            version_subject(seen.plan.name, seen.job, seen.version),
            told.state_sha256,
            VERDICT_PREDICATE,
            verdict(seen, checks, reason),
        )
        return sign_statement(statement, self._key)


def version_subject(model: str, job: Job, version: int) -> str:
    """The name of a version in statements."""
    return f"{model}/{job.job_id}/{version}"


def _of_version(plan: Plan, job: Job, committed: CommittedRound) -> Statement:
    told, manifest = committed.round, read_manifest(plan.manifest)
    predicate: dict[str, Any] = {
        "agreeing": sorted(told.agreeing),
        "attempt": told.attempt,
        "contributions": {item.hospital_id: item.ciphertext_sha256 for item in told.contributions},
        "contributions_root": committed.contributions_root,
        "finalizer": told.finalizer,
        "hospitals": list(job.hospital_ids),
        "job_id": str(job.job_id),
        "parent": {"state_sha256": job.state_sha256, "version": told.version - 1},
        "plan": {
            "approved_by": plan.approved_by or "",
            "feature_schema_sha256": schema_sha256(manifest),
            "plan_id": plan.plan_id,
            "plan_name": plan.name,
            "proposed_by": plan.proposed_by,
        },
        "privacy": _privacy(manifest),
        "roster_sha256": job.roster_sha256,
        "round_event_id": str(committed.event_id),
        "sum_sha256": told.sum_sha256,
        "survivors_sha256": told.survivors_sha256,
        "version": told.version,
    }
    return Statement(version_subject(plan.name, job, told.version), told.state_sha256, VERSION_PREDICATE, predicate)


def _privacy(manifest: PlanManifest) -> dict[str, Any] | None:
    privacy = manifest.privacy
    if privacy is None:
        return None
    compositions = manifest.rounds.count + privacy.extra_attempts
    return {"compositions": compositions, "delta": privacy.delta, "epsilon": privacy.epsilon, "unit": privacy.unit}
