"""The gRPC surface of performance over time: checks the form of requests, calls a use case, words the answer."""

from typing import Any

from fedmesh.registry.v1 import performance_pb2 as pb
from fedmesh.registry.v1 import performance_pb2_grpc as rpc

from services.common.grpc.gate import caller
from services.registry import wire_performance
from services.registry.usecases.performance import PerformanceUseCases


class PerformanceServicer(rpc.PerformanceServiceServicer):
    """Access is decided before: by the policy beside each method and by the views behind each query."""

    def __init__(self, usecases: PerformanceUseCases) -> None:
        self._usecases = usecases

    async def ListPerformance(self, request: pb.ListPerformanceRequest, _context: Any) -> pb.ListPerformanceResponse:
        subject, after, versions = wire_performance.read_list(request)
        measured, last = await self._usecases.list(caller(), subject, after, versions)
        return wire_performance.listed(measured, last, after)

    async def SummarizePerformance(
        self, request: pb.SummarizePerformanceRequest, _context: Any
    ) -> pb.SummarizePerformanceResponse:
        subject, days = wire_performance.read_summarize(request)
        found = await self._usecases.by_day(caller(), subject, days)
        return pb.SummarizePerformanceResponse(days=map(wire_performance.daily, found))
