"""The gRPC surface of the privacy budgets: what the watch over hospitals read last."""

from typing import Any

from fedmesh.registry.v1 import budget_pb2 as pb
from fedmesh.registry.v1 import budget_pb2_grpc as rpc

from services.common.errors import Code, FedmeshError
from services.registry import wire
from services.registry.watch import HospitalWatch


class BudgetServicer(rpc.BudgetServiceServicer):
    """Access is decided before, by the policy beside the method."""

    def __init__(self, watch: HospitalWatch) -> None:
        self._watch = watch

    async def ListBudgets(self, _request: pb.ListBudgetsRequest, _context: Any) -> pb.ListBudgetsResponse:
        """Raises: FedmeshError(SERVICE_UNAVAILABLE) before the ledgers were read for the first time."""
        seen = self._watch.seen
        if seen is None:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the ledgers were not read yet: ask again in some seconds")
        return pb.ListBudgetsResponse(
            budgets=[
                pb.HospitalBudget(hospital_id=name, epsilon_left=left.epsilon, delta_left=left.delta)
                for name, left in sorted(seen.left.items())
            ],
            epsilon_limit=seen.epsilon_limit,
            read_at=wire.timestamp(seen.at),
        )
