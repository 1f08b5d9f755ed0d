"""Traces: derived ids, what is kept, and what is let out, over a real OTLP connection."""

import subprocess
import sys
import textwrap

import pytest
from opentelemetry.sdk.trace.sampling import Decision

from services.common.tracing import ALLOWED, KeepRounds
from tests.support.observed import Collector

# In a process of its own: a tracer provider is set once in a process.
PROGRAM = """
    import sys
    from services.common.config import TelemetryConfig
    from services.common.errors import Code, FedmeshError
    from services.common.telemetry import attempt_span, exemplar, setup_telemetry, shutdown_telemetry
    from services.common.tracing import trace_attempt, trace_round, tracer

    process, endpoint = sys.argv[1:]
    setup_telemetry(process, TelemetryConfig(otlp_endpoint=endpoint, trace_calls=0.0))
    assert exemplar() is None
    with tracer().start_as_current_span("elsewhere"):
        assert exemplar() is None, "not kept, so nothing points to it"
    try:
        with attempt_span(f"step of {process}", "job", 3, 2) as span:
            span.set_attribute("patient", "Mary")
            span.add_event("seen", {"patient": "Mary"})
            assert exemplar() == {"trace_id": f"{span.get_span_context().trace_id:032x}"}
            raise FedmeshError(Code.DATA_INVALID, "the row of Mary is broken")
    except FedmeshError:
        pass
    if process == "coordinator":
        trace_attempt("job", 3, 1, "aborted", 1_000)
        trace_attempt("job", 3, 2, "committed", 2_000)
        trace_round("job", 3, "committed", 1_000)
    shutdown_telemetry()
"""


def test_processes_that_never_met_write_one_connected_trace_and_nothing_of_a_patient() -> None:
    collector = Collector()
    with collector.listening() as endpoint:
        for process in ("coordinator", "hospital/h01"):
            subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM), process, endpoint], check=True, timeout=120)
    spans = {span.name: span for span in collector.spans}
    steps = {"step of coordinator", "step of hospital/h01"}
    assert spans.keys() == {"round committed", "attempt aborted", "attempt committed", *steps}
    assert len({span.trace_id for span in spans.values()}) == 1
    assert spans["round committed"].parent_id == b""
    for name in ("attempt aborted", "attempt committed"):
        assert spans[name].parent_id == spans["round committed"].span_id
    for name in steps:
        assert spans[name].parent_id == spans["attempt committed"].span_id
        assert spans[name].attributes["fedmesh.outcome"] == "data-invalid"
    for span in spans.values():
        assert set(span.attributes) <= ALLOWED
        assert (span.events, span.status_text) == (0, "")
    assert "Mary" not in repr(collector.spans)


@pytest.mark.parametrize(("ratio", "decision"), [(0.0, Decision.DROP), (1.0, Decision.RECORD_AND_SAMPLE)])
def test_calls_outside_of_rounds_are_kept_as_often_as_asked_for(ratio: float, decision: Decision) -> None:
    assert KeepRounds(ratio).should_sample(None, 1 << 100, "call").decision is decision
