"""A small consortium that is watched: its processes' metrics pages, and an OTLP collector that gets all their spans.

Everything is real but the training: hospitals are the benchmark's, with vectors from a seed.
"""

import asyncio
import io
import json
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from fedmesh.registry.v1 import registry_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from rich.console import Console

from services.bench.secure_sum import BenchOptions, bench_plan
from services.cli.mesh import stub
from services.common.grpc.client import call
from services.common.ids import new_id
from services.demo.progress import Progress, watch_job
from services.demo.run import APPROVER, all_connected, prepare
from services.demo.view import View
from services.embedded.guard import Guard
from services.embedded.processes import free_port
from services.embedded.stack import SERVICES, Stack

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@dataclass(frozen=True)
class Sent:
    """A span as it came over the wire. process: the resource's `service.name`."""

    process: str
    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    attributes: dict[str, Any]
    events: int
    status_text: str


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP/gRPC collector that keeps everything."""

    spans: list[Sent] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [_sent(names["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    @contextmanager
    def listening(self) -> Iterator[str]:
        server = grpc.server(ThreadPoolExecutor(max_workers=4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def _sent(process: str, span: Any) -> Sent:
    attributes = {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
    ids = (span.trace_id, span.span_id, span.parent_span_id)
    return Sent(process, span.name, *ids, attributes, len(span.events), span.status.message)


@dataclass
class Watched:
    """A running consortium. metrics: addresses of the metrics pages by process."""

    stack: Stack
    names: tuple[str, ...]
    metrics: dict[str, str]
    collector: Collector

    def page(self, process: str, accept: str = "text/plain") -> str:
        request = urllib.request.Request(f"http://{self.metrics[process]}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())

    def run_job(self, rounds: int = 1) -> str:
        """Register the hospitals and complete a job of so many rounds and one more; its id."""
        return asyncio.run(self._run_job(rounds))

    async def _run_job(self, rounds: int) -> str:
        plan = bench_plan(BenchOptions(self.stack.folder, params=2048, hospitals=len(self.names), rounds=rounds))
        progress = Progress(self.names, plan.rounds.count)
        with View(Console(file=io.StringIO()), "watched", None) as view:
            async with (
                stub(self.stack, "registry") as registry,
                stub(self.stack, "registry", self.stack.operator(APPROVER)) as second,
                stub(self.stack, "coordinator") as coordinator,
            ):
                plan_id = await prepare(registry, second, self.stack, plan, self.names)
                await all_connected(self.stack, coordinator, progress, view)
                request = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=self.names)
                job_id = (await call(registry.CreateJob, request, patience_s=30)).job.job_id
                await watch_job(registry, coordinator, job_id, progress, _nothing)
        assert progress.job is not None
        assert progress.job.status == registry_pb2.JOB_STATUS_COMPLETED, progress.job.reason
        return str(job_id)


async def _nothing(_progress: Progress) -> None:
    return None


@contextmanager
def watched(folder: Path, hospitals: int = 4) -> Iterator[Watched]:
    """Start everything; end everything, however the block ends."""
    names = tuple(f"hospital-{number:02d}" for number in range(1, hospitals + 1))
    metrics = {name: f"127.0.0.1:{free_port()}" for name in (*SERVICES, *names)}
    collector, guard = Collector(), Guard()
    with collector.listening() as endpoint:
        telemetry: dict[str, Any] = {"otlp_endpoint": endpoint, "trace_calls": 0.0}
        settings = {name: {"server": {"metrics_listen": metrics[name]}, "telemetry": telemetry} for name in SERVICES}
        stack = Stack(folder / "stack", guard=guard, settings=settings)
        try:
            stack.start()
            stack.found(names)
            stack.start_hospitals(_hospitals(stack, names, metrics, telemetry), module="bench.hospital")
            yield Watched(stack, names, metrics, collector)
        finally:
            stack.stop()
            guard.close()


def _hospitals(
    stack: Stack, names: Sequence[str], metrics: dict[str, str], telemetry: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, name in enumerate(names):
        path = stack.folder / "vectors" / name / "vector.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"seed": 20, "hospital": number}), encoding="utf-8")
        yield (
            name,
            {
                "population": name,
                "data": {"file": str(path)},
                "privacy": {"allow_without_privacy": True},
                "metrics_listen": metrics[name],
                "telemetry": telemetry,
            },
        )
