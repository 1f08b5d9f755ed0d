"""What an operator sees of a running consortium: one connected trace of a round, and metrics with bounded labels."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from services.common.tracing import ALLOWED
from tests.support.labels import families, offences
from tests.support.observed import OPENMETRICS, Sent, watched

pytestmark = pytest.mark.slow
SERVICES = ("registry", "coordinator", "aggregator", "audit")


@dataclass(frozen=True)
class Seen:
    """What was left of a run of two rounds."""

    names: tuple[str, ...]
    job_id: str
    pages: dict[str, str]
    open_page: str
    spans: list[Sent]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    with watched(tmp_path_factory.mktemp("seen")) as running:
        job_id = running.run_job(rounds=1)
        pages = {name: running.page(name) for name in running.metrics}
        open_page = running.page("coordinator", OPENMETRICS)
        names = running.names
        # Whatever is buffered is sent when a process ends.
        running.stack.stop()
        yield Seen(names, job_id, pages, open_page, running.collector.spans)


def test_a_round_is_one_connected_trace_through_all_processes(seen: Seen) -> None:
    """Every span but the root has a parent that was sent too."""
    (root,) = [span for span in seen.spans if span.name.startswith("round ") and span.attributes["fedmesh.round"] == 2]
    trace = [span for span in seen.spans if span.trace_id == root.trace_id]
    sent = {span.span_id for span in trace}
    assert len(sent) == len(trace)
    assert root.parent_id == b""
    assert [span for span in trace if span is not root and span.parent_id not in sent] == []
    expected = {f"fedmesh-{name}" for name in SERVICES} | {f"fedmesh-hospital/{name}" for name in seen.names}
    assert {span.process for span in trace} == expected
    names = {span.name for span in trace}
    assert names >= {"attempt committed", "coordinator.seal", "aggregator.compute", "audit.append", "hospital.upload"}
    assert "/fedmesh.registry.v1.RegistryService/CommitRound" in names


def test_nothing_leaves_in_a_span_but_what_is_listed(seen: Seen) -> None:
    assert seen.spans
    for span in seen.spans:
        assert set(span.attributes) <= ALLOWED, span.name
        assert (span.events, span.status_text) == (0, ""), span.name


def test_only_rounds_are_traced_when_no_other_call_is_asked_for(seen: Seen) -> None:
    traces = {span.trace_id for span in seen.spans if "fedmesh.round" in span.attributes}
    assert len(traces) == 2
    assert {span.trace_id for span in seen.spans} == traces


def test_all_labels_of_running_processes_are_of_closed_sets(seen: Seen) -> None:
    for process, page in seen.pages.items():
        found = families(page)
        assert len(found) > 5, process
        assert offences(found, seen.names) == [], process


def test_every_process_shows_what_all_of_them_show(seen: Seen) -> None:
    for process, page in seen.pages.items():
        label = process if process in SERVICES else "hospital"
        assert f'fedmesh_certificate_not_after_seconds{{process="{label}"}}' in page
        if process in SERVICES:
            assert f'fedmesh_serving{{process="{process}"}} 1.0' in page


def test_latencies_of_traced_calls_point_to_their_trace(seen: Seen) -> None:
    rounds = {span.trace_id.hex() for span in seen.spans if span.name.startswith("round ")}
    linked = [line for line in seen.open_page.splitlines() if '# {trace_id="' in line]
    assert any("fedmesh_grpc_server_handling_seconds_bucket" in line for line in linked)
    assert any("fedmesh_coordinator_phase_seconds_bucket" in line for line in linked)
    assert {line.split('# {trace_id="')[1].split('"')[0] for line in linked} <= rounds
