"""What an operator sees of a running consortium: one connected trace of a round, metrics with bounded labels, and rules
and dashboards over a real Prometheus that scrapes it. `make observe-check` runs this."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.common.tracing import ALLOWED
from tests.support.labels import families, offences
from tests.support.observed import OPENMETRICS, Sent, watched
from tests.support.prometheus import Prometheus, scraping

pytestmark = pytest.mark.slow
SERVICES = ("registry", "coordinator", "aggregator", "audit")
CHARTS = Path(__file__).parents[2] / "helm"
# How long panels may take to fill: what is measured every ten seconds, then scraped, then recorded, then rated.
PATIENCE_S = 150
# Enough of them that some lie between two scrapes of the last minute, which panels show. One more follows.
ROUNDS = 20


@dataclass(frozen=True)
class Seen:
    """What was left of a run of two rounds. at: when Prometheus knew most."""

    names: tuple[str, ...]
    job_id: str
    pages: dict[str, str]
    open_page: str
    spans: list[Sent]
    prometheus: Prometheus
    at: float


def queries() -> dict[str, str]:
    """Every query of every dashboard of both charts, by where it stands."""
    found = {}
    for path in sorted(CHARTS.glob("*/files/dashboards/*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$namespace", ".*").replace("$__rate_interval", "1m")
                found[f"{path.stem}, {panel['title']}, {target['refId']}"] = query.replace("$__range", "10m")
    return found


def empty(prometheus: Prometheus, at: float) -> list[str]:
    """The queries that have no number at a moment."""
    return [
        where for where, query in queries().items() if all(math.isnan(value) for value in prometheus.values(query, at))
    ]


def often(folder: Path) -> list[Path]:
    """The charts' rules, evaluated every second and not every few minutes."""
    rules = []
    for path in sorted(CHARTS.glob("*/files/rules/*.yaml")):
        text = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rules.append(folder / f"{path.parents[2].name}-{path.name}")
        rules[-1].write_text("".join(line for line in text if not line.startswith("    interval: ")), encoding="utf-8")
    return rules


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("seen")
    with watched(folder) as running, scraping(folder / "prometheus", running.metrics, often(folder)) as prometheus:
        job_id = running.run_job(ROUNDS)
        deadline = time.monotonic() + PATIENCE_S
        while empty(prometheus, at := time.time()) and time.monotonic() < deadline:
            time.sleep(2)
        pages = {name: running.page(name) for name in running.metrics}
        open_page = running.page("coordinator", OPENMETRICS)
        names = running.names
        # Whatever is buffered is sent when a process ends.
        running.stack.stop()
        yield Seen(names, job_id, pages, open_page, running.collector.spans, prometheus, at)


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
    assert len(traces) == ROUNDS + 1
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


def test_no_panel_of_a_dashboard_is_empty(seen: Seen) -> None:
    assert len(queries()) > 50
    assert empty(seen.prometheus, seen.at) == []


def test_prometheus_evaluates_all_rules(seen: Seen) -> None:
    rules = [rule for group in seen.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 80
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_the_objectives_have_both_views_and_nothing_is_lost_between_page_and_rule(seen: Seen) -> None:
    answer: Any = seen.prometheus.ask("query", query="fedmesh:calls_failed:ratio_rate5m", time=str(seen.at))
    assert {item["metric"]["view"] for item in answer["result"]} == {"server", "client"}
    (left,) = set(seen.prometheus.values("fedmesh_registry_epsilon_left", seen.at))
    assert left == 0.5, "the plan has no privacy: nothing is spent"
