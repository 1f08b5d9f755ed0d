"""Which labels fedmesh's metrics may have, and where their values come from: closed sets, all of them.

A label whose values are not bounded by the code or by the roster makes as many series as somebody likes.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import grpc
from fedmesh.aggregator.v1 import aggregator_pb2
from fedmesh.audit.v1 import audit_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import (
    budget_pb2,
    enrolment_pb2,
    membership_pb2,
    performance_pb2,
    promotion_pb2,
    registry_pb2,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.audit.domain.witnesses import AlarmKind
from services.common.errors import Code
from services.common.grpc.access import STANDARD
from services.coordinator.domain.attempt import OVER, Phase
from services.coordinator.domain.machine import Cause
from services.hospital_node.domain.tasks import TaskKind
from services.registry.domain.entities import HospitalStatus

SERVICES = Path(__file__).parents[2] / "services"
PROTOS = (
    registry_pb2,
    promotion_pb2,
    budget_pb2,
    performance_pb2,
    enrolment_pb2,
    membership_pb2,
    coordinator_pb2,
    aggregator_pb2,
    audit_pb2,
)
SHORT_METHODS = {
    method.name
    for proto in PROTOS
    for service in proto.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
METHODS = {
    f"/{service.full_name}/{method.name}"
    for proto in PROTOS
    for service in proto.DESCRIPTOR.services_by_name.values()
    for method in service.methods
} | set(STANDARD)


def _transactions() -> set[str]:
    """The names that the code gives its transactions."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in SERVICES.rglob("*.py"))
    named = set(re.findall(r"(?:run|run_tx|ask|require_job)\((?:\s*[\w.]+,)?\s*\"([\w.]+)\"", source))
    return named | {f"audit.{name}" for name in named} | SHORT_METHODS


def allowed(hospitals: Collection[str]) -> dict[str, dict[str, set[str]]]:
    """Values by metric and label; `*` stands for metrics that are not named."""
    statuses = {code.name for code in grpc.StatusCode}
    codes = {code.value for code in Code}
    return {
        "*": {
            "method": METHODS,
            "code": statuses | codes,
            "objective": {"yes", "no"},
            "process": {"registry", "coordinator", "aggregator", "audit", "hospital"},
            "hospital": set(hospitals),
            "phase": {phase.name.lower() for phase in Phase if phase not in OVER},
            "state": {"busy", "free"},
            "bound": {"caller", "rate", "server", "kinds", "queue", "audit"},
            "status": {status.value for status in HospitalStatus},
            "name": _transactions(),
            "kind": {kind.value for kind in AlarmKind},
        },
        "fedmesh_coordinator_attempts": {"outcome": {"committed", "burnt", "aborted"}},
        "fedmesh_coordinator_jobs_failed": {"cause": {cause.value for cause in Cause}},
        "fedmesh_coordinator_statements_refused": {"method": SHORT_METHODS},
        "fedmesh_aggregator_uploads": {"outcome": {"counted", "repeated", "broken", *codes}},
        "fedmesh_audit_events": {"outcome": {"new", "known", "refused", "failed"}},
        "fedmesh_hospital_renewals": {"outcome": {"renewed", "failed"}},
        "fedmesh_registry_certificates_issued": {"by": {"enrolment", "renewal"}},
        "fedmesh_hospital_tasks": {
            "kind": {kind.name for kind in TaskKind},
            "outcome": {"done", "failed", "declined", "superseded", "dropped", "stale"},
        },
        "fedmesh_hospital_witness_looks": {"outcome": {"cosigned", "current", "stale", "refused", "failed"}},
        "fedmesh_postgres_transaction_retries": {
            "reason": {"SerializationFailure", "DeadlockDetected", "UniqueViolation"}
        },
    }


def families(page: str) -> list[Metric]:
    """Metrics of fedmesh on a page in text form, without the times at which their series began."""
    found = text_string_to_metric_families(page)
    return [item for item in found if item.name.startswith("fedmesh_") and not item.name.endswith("_created")]


def offences(found: Iterable[Metric], hospitals: Collection[str]) -> list[str]:
    """Labels and values that are in no closed set, one line each."""
    sets = allowed(hospitals)
    wrong = set()
    for family in found:
        own = {**sets["*"], **sets.get(family.name, {})}
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label == "le":
                    continue
                if label not in own:
                    wrong.add(f"{family.name}: label {label} is of no closed set")
                elif value not in own[label]:
                    wrong.add(f"{family.name}: {label}={value!r} is not one of its values")
    return sorted(wrong)
