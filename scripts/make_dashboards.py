"""Writes the Grafana dashboards of the Helm charts: `python scripts/make_dashboards.py FOLDER`, where the charts are.

A panel here is a title, a unit and its queries; the JSON around it is the same for all, so it is written once.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WIDTH = 24
_LOST = 'outcome!="committed"'
_BUSY = 'state="busy"'
_HOSPITAL = 'process="hospital"'
_FAILED = 'code!="OK"'


@dataclass(frozen=True)
class Panel:
    """queries: pairs of PromQL and legend. kind: Grafana's panel. width: of 24 columns. says: what to make of it."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    says: str
    kind: str = "timeseries"
    width: int = 12
    height: int = 8


def _sel(metric: str, *more: str) -> str:
    return metric + "{" + ", ".join(('namespace=~"$namespace"', *more)) + "}"


def _rate(metric: str, *more: str) -> str:
    return f"rate({_sel(metric, *more)}[$__rate_interval])"


def _quantile(quantile: float, metric: str, *by: str) -> str:
    return f"histogram_quantile({quantile}, sum by ({', '.join((*by, 'le'))}) ({_rate(metric + '_bucket')}))"


def _stat(title: str, unit: str, query: str, legend: str, says: str, width: int = 6) -> Panel:
    return Panel(title, unit, ((query, legend),), says, "stat", width, 5)


SLO = (
    _stat(
        "Calls that succeeded, three days",
        "percentunit",
        f"1 - {_sel('fedmesh:calls_failed:ratio_rate3d')}",
        "{{view}}",
        "The objective is 99.99 %. server: every try as answered; client: what services got after their retries.",
    ),
    _stat(
        "Error budget left, three days",
        "percentunit",
        f"1 - {_sel('fedmesh:calls_failed:ratio_rate3d')} / 0.0001",
        "{{view}}",
        "Below 0 more failed than the objective allows in three days.",
    ),
    _stat(
        "Calls within 0.5 s, three days",
        "percentunit",
        f"1 - {_sel('fedmesh:calls_slow:ratio_rate3d')}",
        "{{view}}",
        "The objective is 99 %.",
    ),
    _stat(
        "Replicas that are ready",
        "none",
        f"sum by (process) ({_sel('fedmesh_serving')})",
        "{{process}}",
        "At one, the next failure stops the service.",
    ),
    Panel(
        "How fast the error budget burns",
        "none",
        (
            (f"{_sel('fedmesh:calls_failed:ratio_rate1h')} / 0.0001", "{{view}} 1 h"),
            (f"{_sel('fedmesh:calls_failed:ratio_rate6h')} / 0.0001", "{{view}} 6 h"),
        ),
        "1 spends exactly the budget. Somebody is woken at 14.4 over an hour or 6 over six hours.",
    ),
    Panel(
        "How fast the budget of slow calls burns",
        "none",
        (
            (f"{_sel('fedmesh:calls_slow:ratio_rate1h')} / 0.01", "{{view}} 1 h"),
            (f"{_sel('fedmesh:calls_slow:ratio_rate6h')} / 0.01", "{{view}} 6 h"),
        ),
        "As beside.",
    ),
    Panel("Calls", "reqps", ((f"sum by (method) ({_sel('fedmesh:calls:rate5m')})", "{{method}}"),), "By method."),
    Panel(
        "Failures",
        "reqps",
        ((f"sum by (code) ({_sel('fedmesh:calls_failed:rate5m')})", "{{code}}"),),
        "Of all calls, streams too. UNAVAILABLE: a store or service is away. INTERNAL: a fault; the log has it.",
    ),
    Panel(
        "99th percentile",
        "s",
        ((_sel("fedmesh:call_seconds:p99_rate5m"), "{{method}}"),),
        "Of the methods that count. Exemplars of the buckets lead to traces.",
    ),
    Panel(
        "Calls being answered",
        "none",
        ((f"sum by (method) ({_sel('fedmesh_grpc_server_in_flight')})", "{{method}}"),),
        "WatchTasks is one for each connected hospital.",
    ),
    Panel(
        "Calls refused since too many were in flight",
        "reqps",
        ((f"sum by (bound) ({_rate('fedmesh_grpc_server_shed_total')})", "{{bound}}"),),
        "server: more replicas are needed. caller: one hospital or operator asks for too much at once.",
    ),
)

ROUNDS = (
    _stat(
        "Jobs that run", "none", f"max({_sel('fedmesh_coordinator_running_jobs')})", "jobs", "As the registry has them."
    ),
    _stat(
        "Jobs that are driven",
        "none",
        f"sum({_sel('fedmesh_coordinator_leases')})",
        "leases",
        "Fewer than run for more than seconds: a job stands still.",
    ),
    _stat(
        "Attempts that ended, in the time shown",
        "none",
        f"sum by (outcome) (increase({_sel('fedmesh_coordinator_attempts_total')}[$__range]))",
        "{{outcome}}",
        "An aborted attempt is tried again; a burnt round has spent its budget for nothing.",
        12,
    ),
    Panel(
        "Phases, 95th percentile",
        "s",
        ((_quantile(0.95, "fedmesh_coordinator_phase_seconds", "phase"), "{{phase}}"),),
        "Where a round waits. TRAINING is the hospitals' work; the others should take seconds.",
        width=24,
    ),
    Panel(
        "From sealed to committed",
        "s",
        (
            (_quantile(0.5, "fedmesh_coordinator_round_overhead_seconds"), "p50"),
            (_quantile(0.99, "fedmesh_coordinator_round_overhead_seconds"), "p99"),
        ),
        "What the secure sum takes of a round. Exemplars lead to the round's trace.",
    ),
    Panel(
        "How attempts end",
        "none",
        ((f"sum by (outcome) ({_rate('fedmesh_coordinator_attempts_total')}) * 60", "{{outcome}}"),),
        "A minute.",
    ),
    Panel(
        "Jobs that failed, in the time shown",
        "none",
        ((f"sum by (cause) (increase({_sel('fedmesh_coordinator_jobs_failed_total')}[$__range]))", "{{cause}}"),),
        "disputed: hospitals computed another model than the one that was stored.",
        width=24,
    ),
)

FLEET = (
    _stat(
        "Hospitals",
        "none",
        f"sum by (status) (max by (hospital, status) ({_sel('fedmesh_registry_hospital_status')}))",
        "{{status}}",
        "By standing.",
        12,
    ),
    _stat(
        "Connected",
        "none",
        f"count(sum by (hospital) ({_sel('fedmesh_coordinator_hospital_streams')}) > 0)",
        "hospitals",
        "Have a task stream open.",
        12,
    ),
    Panel(
        "Task streams",
        "none",
        ((f"sum by (hospital) ({_sel('fedmesh_coordinator_hospital_streams')})", "{{hospital}}"),),
        "0: away. Rounds go on without it while enough others are there.",
    ),
    Panel(
        "Entries of the audit log that it has not cosigned for",
        "s",
        ((f"max by (hospital) ({_sel('fedmesh_audit_witness_age_seconds')})", "{{hospital}}"),),
        "A minute or two is usual.",
    ),
    Panel(
        "Strikes that count",
        "none",
        (
            (f"max by (hospital) ({_sel('fedmesh_registry_hospital_strikes')})", "{{hospital}}"),
            (f"max({_sel('fedmesh_registry_strike_limit')})", "limit"),
        ),
        "For what no honest node sends. At the limit the hospital is suspended.",
    ),
    Panel(
        "Certificates end in",
        "s",
        ((f"max by (hospital) ({_sel('fedmesh_hospital_certificate_not_after_seconds')}) - time()", "{{hospital}}"),),
        "As the hospital came with it last.",
    ),
)

BUDGET = (
    Panel(
        "Epsilon left",
        "none",
        ((f"min by (hospital) ({_sel('fedmesh_registry_epsilon_left')})", "{{hospital}}"),),
        "From the ledgers that hospitals reported; their own ledgers decide.",
        "bargauge",
        16,
    ),
    _stat(
        "Least of all",
        "none",
        f"min({_sel('fedmesh_registry_epsilon_left')})",
        "epsilon",
        "A plan that asks for more is refused by this hospital.",
        4,
    ),
    _stat(
        "Limit in 365 days", "none", f"max({_sel('fedmesh_registry_epsilon_limit')})", "epsilon", "By population.", 4
    ),
    Panel(
        "Over time",
        "none",
        ((f"min by (hospital) ({_sel('fedmesh_registry_epsilon_left')})", "{{hospital}}"),),
        "It comes back a year after a charge.",
        width=24,
    ),
    Panel(
        "Ledgers that were not the ones reported before",
        "none",
        ((f"sum(increase({_sel('fedmesh_registry_ledger_differences_total')}[$__range]))", "reports"),),
        "Any is a page: the ledger may have gone back in time.",
    ),
    Panel(
        "Rounds that cost budget and made no model",
        "none",
        (
            (
                f"sum by (outcome) (increase({_sel('fedmesh_coordinator_attempts_total', _LOST)}[$__range]))",
                "{{outcome}}",
            ),
        ),
        "burnt: always. aborted: when hospitals had sent already.",
    ),
)

DATA = (
    Panel(
        "Ciphertexts",
        "Bps",
        (
            (f"sum({_rate('fedmesh_aggregator_upload_bytes_total')})", "uploaded"),
            (f"sum({_rate('fedmesh_aggregator_compute_bytes_total')})", "added"),
            (f"sum({_rate('fedmesh_aggregator_download_bytes_total')})", "sums downloaded"),
        ),
        "Bytes a second.",
    ),
    Panel(
        "Uploads and sums, 95th percentile",
        "s",
        (
            (_quantile(0.95, "fedmesh_aggregator_upload_seconds"), "upload"),
            (_quantile(0.95, "fedmesh_aggregator_compute_seconds"), "sum"),
        ),
        "An upload is as fast as the hospital's line.",
    ),
    Panel(
        "What waits",
        "none",
        (
            (f"sum({_sel('fedmesh_aggregator_uploads_in_flight')})", "uploads in flight"),
            (f"sum({_sel('fedmesh_aggregator_waiting_segments')})", "segments for a worker"),
            (f"sum({_sel('fedmesh_coordinator_unread_tasks')})", "tasks for hospitals"),
            (f"max({_sel('fedmesh_registry_outbox_waiting')})", "events in the outbox"),
            (f"sum({_sel('fedmesh_audit_queued_events')})", "events in the audit service"),
        ),
        "Every queue has a bound, behind which callers are told to come again.",
    ),
    Panel(
        "Behind the audit log",
        "s",
        (
            (f"max({_sel('fedmesh_registry_outbox_lag_seconds')})", "oldest event in the outbox"),
            (_quantile(0.99, "fedmesh_audit_batch_seconds"), "a batch, p99"),
        ),
        "Seconds.",
    ),
    Panel(
        "PostgreSQL's connections",
        "percentunit",
        (
            (f"max({_sel('fedmesh_postgres_connections')} / {_sel('fedmesh_postgres_connections_max')})", "server"),
            (
                f"max(sum without (state) ({_sel('fedmesh_postgres_pool_connections', _BUSY)})"
                f" / {_sel('fedmesh_postgres_pool_max')})",
                "fullest pool",
            ),
        ),
        "Of what there may be.",
    ),
    Panel(
        "Transactions, 99th percentile",
        "s",
        ((_quantile(0.99, "fedmesh_postgres_transaction_seconds", "name"), "{{name}}"),),
        "Retries included.",
    ),
    Panel(
        "Waiting for PostgreSQL",
        "none",
        (
            (f"sum({_sel('fedmesh_postgres_pool_waiting')})", "transactions without a connection"),
            (f"max({_sel('fedmesh_postgres_ping_seconds')})", "answer to one statement, s"),
            (f"max({_sel('fedmesh_postgres_standbys')})", "standbys"),
            (f"max({_sel('fedmesh_postgres_wal_archive_failed')})", "WAL not archived"),
        ),
        "Standbys that stream; 1 while archiving fails.",
    ),
    Panel(
        "Redis",
        "none",
        (
            (f"max({_sel('fedmesh_redis_pool_in_use')} / {_sel('fedmesh_redis_pool_max')})", "fullest pool"),
            (f"max({_sel('fedmesh_redis_clients')} / {_sel('fedmesh_redis_clients_max')})", "connections"),
            (f"max({_sel('fedmesh_redis_ping_seconds')})", "answer, s"),
            (f"max({_sel('fedmesh_redis_replicas')})", "replicas"),
        ),
        "Parts of what there may be, and how it answers.",
    ),
    Panel(
        "Redis' memory",
        "bytes",
        (
            (f"max({_sel('fedmesh_redis_memory_used_bytes')})", "used"),
            (f"max({_sel('fedmesh_redis_memory_max_bytes')})", "limit"),
        ),
        "Writes are refused above the limit.",
    ),
    Panel(
        "Stores answer",
        "none",
        (
            (f"max({_sel('fedmesh_postgres_up')})", "PostgreSQL"),
            (f"max({_sel('fedmesh_redis_up')})", "Redis"),
        ),
        "1: at least one service reaches it.",
    ),
)


def _of_node(title: str, metric: str, says: str) -> Panel:
    return _stat(title, "none", f"max by (pod) ({_sel(metric)})", "{{pod}}", says)


_ENDS = f"min by (pod) ({_sel('fedmesh_certificate_not_after_seconds', _HOSPITAL)}) - time()"
NODE = (
    _of_node("Connected", "fedmesh_hospital_connected", "1 while the node gets its tasks."),
    _of_node("Ledger differs", "fedmesh_hospital_ledger_differs", "1: see the runbook. The node spends nothing then."),
    _of_node("Witness's alarm", "fedmesh_hospital_witness_alarm", "1 while it refuses to cosign the audit log."),
    _stat("Certificate ends in", "s", _ENDS, "{{pod}}", "The node renews what it got by enrolment by itself."),
    Panel(
        "Tasks",
        "none",
        ((f"sum by (outcome) (increase({_sel('fedmesh_hospital_tasks_total')}[$__range]))", "{{outcome}}"),),
        "declined, failed, dropped: the log says why. stale, superseded: the round had gone on.",
    ),
    Panel(
        "Tasks, by what was asked",
        "none",
        ((f"sum by (kind) ({_rate('fedmesh_hospital_tasks_total')}) * 60", "{{kind}}"),),
        "A minute.",
    ),
    Panel(
        "Calls to the consortium that failed",
        "reqps",
        ((f"sum by (code) ({_rate('fedmesh_grpc_client_handled_total', _FAILED)})", "{{code}}"),),
        "After all tries.",
    ),
    Panel(
        "Calls to the consortium, 99th percentile",
        "s",
        ((_quantile(0.99, "fedmesh_grpc_client_handling_seconds", "method"), "{{method}}"),),
        "All tries included.",
    ),
    Panel(
        "Looks at the audit log",
        "none",
        ((f"sum by (outcome) ({_rate('fedmesh_hospital_witness_looks_total')}) * 60", "{{outcome}}"),),
        "A minute. failed: not reached; stale: an old state was shown; refused: an alarm.",
    ),
    Panel(
        "Entries of the audit log that were verified",
        "none",
        ((f"max by (pod) ({_sel('fedmesh_hospital_witness_size')})", "{{pod}}"),),
        "It only grows.",
    ),
)

DASHBOARDS = {
    "fedmesh-slo": ("fedmesh: objectives", SLO),
    "fedmesh-rounds": ("fedmesh: rounds", ROUNDS),
    "fedmesh-hospitals": ("fedmesh: hospitals", FLEET),
    "fedmesh-privacy": ("fedmesh: privacy budget", BUDGET),
    "fedmesh-data-plane": ("fedmesh: data plane", DATA),
    "fedmesh-node": ("fedmesh: a hospital's node", NODE),
}
# Whose chart has it, and the metric by which Grafana finds the namespaces.
_CENTRE = ("fedmesh", "fedmesh_serving")
_OWNERS = {"fedmesh-node": ("fedmesh-hospital", "fedmesh_hospital_connected")}


def _variables(everywhere: str) -> dict[str, Any]:
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    namespace = {
        "name": "namespace",
        "type": "query",
        "label": "Namespace",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values({everywhere}, namespace)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": False,
        "current": {"text": "All", "value": "$__all"},
    }
    return {"list": [source, namespace]}


def _panel(number: int, panel: Panel, place: tuple[int, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "exemplar": "_bucket" in query}
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": place[0], "y": place[1], "w": panel.width, "h": panel.height},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0 if panel.kind == "bargauge" else None},
            "overrides": [],
        },
        "targets": targets,
    }


def dashboard(uid: str) -> dict[str, Any]:
    """A dashboard as Grafana (schema 39, version 11) reads it."""
    title, panels = DASHBOARDS[uid]
    made, x, y, tallest = [], 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > _WIDTH:
            x, y, tallest = 0, y + tallest, 0
        made.append(_panel(number, panel, (x, y)))
        x, tallest = x + panel.width, max(tallest, panel.height)
    return {
        "uid": uid,
        "title": title,
        "tags": ["fedmesh"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["fedmesh"], "title": "fedmesh", "asDropdown": True}],
        "templating": _variables(_OWNERS.get(uid, _CENTRE)[1]),
        "panels": made,
    }


def main(folder: Path) -> None:
    for uid in DASHBOARDS:
        file = folder / _OWNERS.get(uid, _CENTRE)[0] / "files" / "dashboards" / f"{uid}.json"
        file.write_text(json.dumps(dashboard(uid), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
