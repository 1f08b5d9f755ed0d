"""The control-plane calls of the load: who makes them, how often, and what each acknowledges."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.ids import new_id
from services.embedded.stack import CONSORTIUM
from services.transparency.canonical import canonical_json

STUBS: Final[dict[str, Any]] = {
    "registry": registry_pb2_grpc.RegistryServiceStub,
    "coordinator": coordinator_pb2_grpc.CoordinatorServiceStub,
    "aggregator": aggregator_pb2_grpc.AggregatorServiceStub,
    "audit": audit_pb2_grpc.AuditServiceStub,
}
# Who makes a call: one of the many hospitals, an operator, or the certificate of a service.
HOSPITAL, OPERATOR, SERVICE = "hospital", "operator", "service"


@dataclass
class Known:
    """What the load has learnt, and asks about."""

    job_id: str
    plan: dict[str, Any]
    version: int = 0
    log_size: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(5))  # noqa: S311 - which entry is asked for


@dataclass(frozen=True)
class Kind:
    """One kind of call. weight: its share of all calls. acknowledged: what a success promises, (kind, key, facts)."""

    service: str
    method: str
    caller: str
    weight: float
    make: Callable[[Known], Any]
    acknowledged: Callable[[Any, Any], tuple[str, str, Any] | None] = lambda _request, _response: None


def _event(known: Known) -> audit_pb2.Event:
    now = Timestamp()
    now.FromNanoseconds(time.time_ns())
    return audit_pb2.Event(
        event_id=new_id(),
        type="chaos.noted",
        occurred_at=now,
        actor=f"spiffe://{CONSORTIUM}/service/coordinator",
        subject=f"job/{known.job_id}",
        body_json="{}",
    )


def _plan(known: Known) -> registry_pb2.CreatePlanRequest:
    """A plan that is different each time, by its description."""
    text = {**known.plan, "description": f"{known.plan['description']} {new_id()}"}
    return registry_pb2.CreatePlanRequest(request_id=new_id(), manifest=canonical_json(text))


def _appended(request: Any, response: Any) -> tuple[str, str, Any]:
    return "appended", request.events[0].event_id, response.placements[0].index


def _recorded(request: Any, _response: Any) -> tuple[str, str, Any]:
    return "recorded", request.events[0].event_id, None


def _planned(_request: Any, response: Any) -> tuple[str, str, Any]:
    return "plan", response.plan.plan_id, None


def _attempt(known: Known) -> round_pb2.Attempt:
    return round_pb2.Attempt(job_id=known.job_id, round=known.version + 1, attempt=1)


KINDS: Final = {
    f"{kind.service}.{kind.method}": kind
    for kind in (
        Kind("registry", "GetEpoch", HOSPITAL, 12, lambda _: registry_pb2.GetEpochRequest()),
        Kind("registry", "ListRosters", HOSPITAL, 6, lambda _: registry_pb2.ListRostersRequest()),
        Kind("registry", "ListLedgers", HOSPITAL, 6, lambda _: registry_pb2.ListLedgersRequest()),
        Kind("registry", "GetJob", OPERATOR, 8, lambda known: registry_pb2.GetJobRequest(job_id=known.job_id)),
        Kind(
            *("registry", "ListRounds", OPERATOR, 8),
            lambda known: registry_pb2.ListRoundsRequest(
                job_id=known.job_id, after_version=max(0, known.version - 1), page_size=5
            ),
        ),
        Kind(
            *("registry", "RecordEvents", SERVICE, 8),
            lambda known: registry_pb2.RecordEventsRequest(request_id=new_id(), events=[_event(known)]),
            _recorded,
        ),
        Kind("registry", "CreatePlan", OPERATOR, 1, _plan, _planned),
        Kind("coordinator", "GetRound", OPERATOR, 12, lambda k: coordinator_pb2.GetRoundRequest(job_id=k.job_id)),
        Kind("coordinator", "ListParticipants", OPERATOR, 8, lambda _: coordinator_pb2.ListParticipantsRequest()),
        Kind("aggregator", "GetSum", OPERATOR, 10, lambda k: aggregator_pb2.GetSumRequest(attempt=_attempt(k))),
        Kind("audit", "GetCheckpoint", OPERATOR, 8, lambda _: audit_pb2.GetCheckpointRequest()),
        Kind(
            *("audit", "GetInclusionProof", OPERATOR, 5),
            lambda known: audit_pb2.GetInclusionProofRequest(index=known.chance.randrange(max(1, known.log_size))),
        ),
        Kind(
            *("audit", "AppendEvents", SERVICE, 8),
            lambda known: audit_pb2.AppendEventsRequest(request_id=new_id(), events=[_event(known)]),
            _appended,
        ),
    )
}


def plan_document(manifest: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(manifest)
    return document
