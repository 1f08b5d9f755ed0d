"""What a committed round says of itself in the audit log, so that a hospital can check it offline."""

from typing import Any

from services.registry.domain.entities import CommittedRound, Job, Round
from services.transparency.merkle import leaf_hash, tree_root
from services.transparency.receipt import Counted


def contribution_leaves(committed: Round) -> list[bytes]:
    """The leaves of a round's contribution tree, sorted by hospital: canonical JSON that binds hospital and
    ciphertext to job, version and attempt. A hospital's receipt is an inclusion proof of its leaf.
    """
    job_id, version, attempt = str(committed.job_id), committed.version, committed.attempt
    return [
        Counted(job_id, version, attempt, item.hospital_id, item.ciphertext_sha256).leaf()
        for item in sorted(committed.contributions, key=lambda item: item.hospital_id)
    ]


def contributions_root(committed: Round) -> str:
    """Merkle root (RFC 9162, 2.1.1) over `contribution_leaves`, in hex."""
    return tree_root(map(leaf_hash, contribution_leaves(committed))).hex()


def committed_facts(job: Job, committed: CommittedRound) -> dict[str, Any]:
    """The body of a `round.committed` or `round.burnt` event."""
    told = committed.round
    contributions = sorted(told.contributions, key=lambda item: item.hospital_id)
    burnt = {"reason": told.burnt_reason} if told.burnt else {}
    return {
        **burnt,
        "attempt": told.attempt,
        "version": told.version,
        "plan_id": job.plan_id,
        "private": job.private,
        "hospitals": len(job.hospital_ids),
        "contributions": [
            {"hospital_id": item.hospital_id, "ciphertext_sha256": item.ciphertext_sha256} for item in contributions
        ],
        # In versions, in the order of the contributions; the staleness weights follow from them.
        "ages": [item.age for item in contributions],
        "contributions_root": committed.contributions_root,
        "survivors_sha256": told.survivors_sha256,
        "sum_sha256": told.sum_sha256,
        "state_sha256": told.state_sha256,
        "parent": told.version - 1,
        "agreeing": sorted(told.agreeing),
        "dissenting": sorted(told.dissenting),
        "finalizer": told.finalizer,
        "attesting": sorted(told.attesting),
    }
