"""Traces: one for each round of a job, the same in every process that works on it.

Ids are derived, not carried: the trace from job and round, the spans `round` and `attempt` from their numbers. Whoever
takes a step up again after a crash, or reads an event out of the outbox, is in the right trace without being told; and
who looks for round 3 of a job can compute its trace id. Everything else is a child of what gRPC's metadata names.

A trace leaves the consortium's hands when it is exported: only attributes of `ALLOWED` go, events and texts never.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.sdk.util import ns_to_iso_str
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, Status, StatusCode, TraceFlags

from services.common.config import TelemetryConfig
from services.common.errors import Code, FedmeshError

_ROUND: Final = "fedmesh.round"
ALLOWED: Final = frozenset(
    {"fedmesh.job_id", _ROUND, "fedmesh.attempt", "fedmesh.outcome", "fedmesh.uploads", "rpc.grpc.code"}
)
"""The attributes that spans may carry: ids, numbers and codes; nothing of a patient, a payload or an error's text."""

Attributes = dict[str, str | int]

_chosen: ContextVar[tuple[int, int] | None] = ContextVar("chosen", default=None)


class _Ids(RandomIdGenerator):
    """Random ids, unless a span's own were derived."""

    def generate_trace_id(self) -> int:
        chosen = _chosen.get()
        return super().generate_trace_id() if chosen is None else chosen[0]

    def generate_span_id(self) -> int:
        chosen = _chosen.get()
        return super().generate_span_id() if chosen is None else chosen[1]


IDS: Final = _Ids()


class KeepRounds(Sampler):
    """Keeps every trace of a round, and a part of the other calls. ratio: that part, 0 to 1."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._others = TraceIdRatioBased(ratio)

    def should_sample(
        self, parent_context: Context | None, trace_id: int, name: str, *arguments: Any, **more: Any
    ) -> SamplingResult:
        parent = trace.get_current_span(parent_context).get_span_context()
        if parent.is_valid:
            keep = parent.trace_flags.sampled
        elif _chosen.get() is not None:
            keep = True
        else:
            return self._others.should_sample(parent_context, trace_id, name, *arguments, **more)
        decision = Decision.RECORD_AND_SAMPLE if keep else Decision.DROP
        attributes = arguments[1] if len(arguments) > 1 else more.get("attributes")
        return SamplingResult(decision, attributes if keep else None, parent.trace_state)

    def get_description(self) -> str:
        return f"KeepRounds{{{self._ratio}}}"


class _AllowListed(SpanExporter):
    """Passes on spans without whatever is not in `ALLOWED`."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([_stripped(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _stripped(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=_allowed(span),
        kind=span.kind,
        instrumentation_scope=span.instrumentation_scope,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
    )


def _allowed(span: ReadableSpan) -> dict[str, Any]:
    return {key: value for key, value in (span.attributes or {}).items() if key in ALLOWED}


class _FileExporter(SpanExporter):
    """Appends finished spans to a file, one JSON object a line, with what is allowed only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(span) for span in spans))
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def _line(span: ReadableSpan) -> str:
    """As `ReadableSpan.to_json`, which makes the resource anew for every span, and without what never leaves."""
    context = span.context
    return (
        json.dumps(
            {
                "name": span.name,
                "context": {"trace_id": f"0x{context.trace_id:032x}", "span_id": f"0x{context.span_id:016x}"},
                "kind": str(span.kind),
                "parent_id": None if span.parent is None else f"0x{span.parent.span_id:016x}",
                "start_time": ns_to_iso_str(span.start_time or 0),
                "end_time": ns_to_iso_str(span.end_time or 0),
                "status": {"status_code": span.status.status_code.name},
                "attributes": _allowed(span),
                "service": span.resource.attributes.get(SERVICE_NAME),
            },
        )
        + "\n"
    )


def exporters(config: TelemetryConfig) -> list[SpanExporter]:
    """Where spans go; nowhere by default.

    Raises: FedmeshError(CONFIG_INVALID) when OTLP is asked for and its exporter is not installed.
    """
    found: list[SpanExporter] = []
    if config.trace_file is not None:
        found.append(_FileExporter(config.trace_file))
    if config.otlp_endpoint is not None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise FedmeshError(
                Code.CONFIG_INVALID, "telemetry.otlp_endpoint needs the extra `otlp`: install fedmesh[otlp]"
            ) from error
        found.append(_AllowListed(OTLPSpanExporter(endpoint=config.otlp_endpoint)))
    return found


@lru_cache(maxsize=1)
def tracer() -> trace.Tracer:
    """fedmesh's tracer; one that was fetched before `setup_telemetry` follows the provider that comes."""
    return trace.get_tracer("fedmesh")


@contextmanager
def attempt_span(name: str, job_id: str, round_number: int, attempt: int) -> Iterator[Span]:
    """A span in the trace of a round, below its attempt, in every process that works on it."""
    context = _context(*_attempt_ids(job_id, round_number, attempt))
    with tracer().start_as_current_span(
        name,
        context=context,
        attributes=_attributes(job_id, round_number, attempt),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except Exception as error:
            fail_span(span, error)
            raise


def fail_span(span: Span, error: Exception) -> None:
    """Note the code of an error, and nothing of what it says."""
    code = error.code if isinstance(error, FedmeshError) else Code.INTERNAL
    span.set_status(Status(StatusCode.ERROR))
    span.set_attribute("fedmesh.outcome", code.value)


def trace_attempt(job_id: str, round_number: int, attempt: int, outcome: str, began_ns: int) -> None:
    """Write the span of an attempt that has ended; its steps are below it. began_ns: Unix nanoseconds."""
    trace_id, span_id = _attempt_ids(job_id, round_number, attempt)
    attributes = _attributes(job_id, round_number, attempt) | {"fedmesh.outcome": outcome}
    above = _context(*_round_ids(job_id, round_number))
    _write(f"attempt {outcome}", above, (trace_id, span_id), attributes, began_ns)


def trace_round(job_id: str, round_number: int, outcome: str, began_ns: int) -> None:
    """Write the span of a round that is over, the root of its trace. began_ns: Unix nanoseconds."""
    attributes: Attributes = {"fedmesh.job_id": job_id, _ROUND: round_number, "fedmesh.outcome": outcome}
    _write(f"round {outcome}", Context(), _round_ids(job_id, round_number), attributes, began_ns)


def _write(name: str, context: Context, ids: tuple[int, int], attributes: Attributes, began_ns: int) -> None:
    token = _chosen.set(ids)
    try:
        tracer().start_span(name, context=context, attributes=attributes, start_time=began_ns).end()
    finally:
        _chosen.reset(token)


def _attributes(job_id: str, round_number: int, attempt: int) -> Attributes:
    return {"fedmesh.job_id": job_id, _ROUND: round_number, "fedmesh.attempt": attempt}


@lru_cache(maxsize=256)
def _round_ids(job_id: str, round_number: int) -> tuple[int, int]:
    digest = hashlib.sha256(f"{job_id}/{round_number}".encode()).digest()
    return int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")


@lru_cache(maxsize=256)
def _attempt_ids(job_id: str, round_number: int, attempt: int) -> tuple[int, int]:
    digest = hashlib.sha256(f"{job_id}/{round_number}/{attempt}".encode()).digest()
    return _round_ids(job_id, round_number)[0], int.from_bytes(digest[:8], "big")


@lru_cache(maxsize=256)
def _context(trace_id: int, span_id: int) -> Context:
    parent = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())
