"""Logs, metrics and traces: set up once in main, used everywhere.

All spans of one attempt at a round share one trace, in every process, because the trace id is derived from the attempt:
whoever looks for round 3 of a job finds it without asking which service began it.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags
from prometheus_client import Counter, Gauge, Histogram

from services.common.config import TelemetryConfig
from services.common.errors import Code, FedmeshError

# Fine around the 500 ms objective, coarse elsewhere.
LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)

CALLS: Final = Counter(
    "fedmesh_grpc_server_handled_total", "Calls answered by this server", ["method", "code", "objective"]
)
LATENCY: Final = Histogram(
    "fedmesh_grpc_server_handling_seconds",
    "Time from a call's first byte to its status",
    ["method", "objective"],
    buckets=LATENCY_BUCKETS,
)
IN_FLIGHT: Final = Gauge("fedmesh_grpc_server_in_flight", "Calls being answered", ["method"])


class _FileExporter(SpanExporter):
    """Appends finished spans to a file, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        # None means one line; the stubs know only a number.
        lines = "".join(span.to_json(indent=None) + "\n" for span in spans)  # type: ignore[arg-type]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def setup_telemetry(process: str, config: TelemetryConfig) -> None:
    """Configure logging and tracing of this process. `process` names it in every line, for example `registry`.

    Raises: FedmeshError(CONFIG_INVALID) when OTLP is asked for and its exporter is not installed.
    """
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if config.log_format == "console"
        else structlog.processors.JSONRenderer(sort_keys=True)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace_id,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    exporters = _exporters(config)
    if exporters:
        provider = TracerProvider(resource=Resource.create({"service.name": f"fedmesh-{process}"}))
        for exporter in exporters:
            provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=5000))
        trace.set_tracer_provider(provider)


def shutdown_telemetry() -> None:
    """Flush what is still buffered; call once, last."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()  # type: ignore[no-untyped-call]


def _exporters(config: TelemetryConfig) -> list[SpanExporter]:
    exporters: list[SpanExporter] = []
    if config.trace_file is not None:
        exporters.append(_FileExporter(config.trace_file))
    if config.otlp_endpoint is not None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise FedmeshError(
                Code.CONFIG_INVALID, "telemetry.otlp_endpoint needs the extra `otlp`: install fedmesh[otlp]"
            ) from error
        exporters.append(OTLPSpanExporter(endpoint=config.otlp_endpoint))
    return exporters


def _add_trace_id(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structured logger: `log.info("round_sealed", job_id=..., hospitals=15)`. Never log patient data or keys."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(component=name)
    return logger


@lru_cache(maxsize=1)
def tracer() -> trace.Tracer:
    """fedmesh's tracer; one that was fetched before `setup_telemetry` follows the provider that comes."""
    return trace.get_tracer("fedmesh")


@contextmanager
def attempt_span(name: str, job_id: str, round_number: int, attempt: int) -> Iterator[Span]:
    """A span in the trace of one attempt, the same trace in every process that works on it."""
    attributes: dict[str, str | int] = {
        "fedmesh.job_id": job_id,
        "fedmesh.round": round_number,
        "fedmesh.attempt": attempt,
    }
    context = _attempt_context(job_id, round_number, attempt)
    with tracer().start_as_current_span(name, context=context, attributes=attributes) as span:
        yield span


@lru_cache(maxsize=256)
def _attempt_context(job_id: str, round_number: int, attempt: int) -> Context:
    digest = hashlib.sha256(f"{job_id}/{round_number}/{attempt}".encode()).digest()
    parent = SpanContext(
        trace_id=int.from_bytes(digest[:16], "big"),
        span_id=int.from_bytes(digest[16:24], "big"),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())
