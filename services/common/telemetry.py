"""Logs, metrics and traces: set up once in main, used everywhere. What a trace is made of: see `tracing`."""

import logging
import sys
from typing import Any, Final

import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import Counter, Gauge, Histogram

from services.common.config import TelemetryConfig
from services.common.tracing import IDS, KeepRounds, attempt_span, exporters, tracer

__all__ = [
    "CALLS",
    "CALLS_MADE",
    "IN_FLIGHT",
    "LATENCY",
    "LATENCY_MADE",
    "SECOND_TRIES",
    "SERVING",
    "SHED",
    "attempt_span",
    "exemplar",
    "get_logger",
    "setup_telemetry",
    "shutdown_telemetry",
    "tracer",
]

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
CALLS_MADE: Final = Counter(
    "fedmesh_grpc_client_handled_total",
    "Calls made by this process, once all tries are over",
    ["method", "code", "objective"],
)
LATENCY_MADE: Final = Histogram(
    "fedmesh_grpc_client_handling_seconds",
    "Time that this process waited for a call, all tries included",
    ["method", "objective"],
    buckets=LATENCY_BUCKETS,
)
SECOND_TRIES: Final = Counter(
    "fedmesh_grpc_client_second_tries_total", "Calls made again at another replica because no answer had come yet"
)
SHED: Final = Counter(
    "fedmesh_grpc_server_shed_total",
    "Calls refused because too many were in flight, or their caller began too many, by bound",
    ["bound"],
)
for _bound in ("caller", "server"):
    SHED.labels(_bound)
SERVING: Final = Gauge("fedmesh_serving", "1 while this process is ready for calls", ["process"])


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
    sinks = exporters(config)
    if sinks:
        resource = Resource.create({"service.name": f"fedmesh-{process}"})
        provider = TracerProvider(resource=resource, sampler=KeepRounds(config.trace_calls), id_generator=IDS)
        for exporter in sinks:
            provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=5000))
        trace.set_tracer_provider(provider)


def shutdown_telemetry() -> None:
    """Flush what is still buffered; call once, last."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()  # type: ignore[no-untyped-call]


def _add_trace_id(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structured logger: `log.info("round_sealed", job_id=..., hospitals=15)`. Never log patient data or keys."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(component=name)
    return logger


def exemplar() -> dict[str, str] | None:
    """What links an observation to the trace that it was made in; None outside of a trace that is kept."""
    span = trace.get_current_span()
    return {"trace_id": f"{span.get_span_context().trace_id:032x}"} if span.is_recording() else None
