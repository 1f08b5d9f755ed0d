"""What the chart gives to Prometheus, Alertmanager and Grafana: rules that are tested, runbooks, queries that parse."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from services.common.grpc.objective import AVAILABILITY, FAILED, QUICK, QUICK_S
from tests.support.charts import CENTRE, named, render, values_of
from tests.support.prometheus import program

ROOT = CENTRE.parents[1]
RULES = CENTRE / "files" / "rules"
CASES = Path(__file__).parent / "promtool"
DASHBOARDS = sorted((CENTRE / "files" / "dashboards").glob("*.json"))
RUNBOOKS = ROOT / "docs" / "runbooks"


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / f"{name}.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts")}


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- rules


def test_promtool_accepts_the_rules() -> None:
    assert "SUCCESS" in run(program("promtool"), "check", "rules", *map(str, sorted(RULES.glob("*.yaml"))))


@pytest.mark.parametrize("cases", sorted(CASES.glob("*.yaml")), ids=lambda path: path.stem)
def test_alerts_fire_and_stay_silent(cases: Path) -> None:
    run(program("promtool"), "test", "rules", str(cases), cwd=CASES)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    seen: dict[str, set[bool]] = {}
    for path in CASES.glob("*.yaml"):
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for case in test.get("alert_rule_test", []):
                seen.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert seen == {name: {True, False} for name in ALERTS}


def test_every_alert_has_a_severity_and_a_runbook_and_every_runbook_an_alert() -> None:
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
    assert {path.stem for path in RUNBOOKS.glob("Fedmesh*.md")} == ALERTS.keys()


@pytest.mark.parametrize("name", ALERTS)
def test_a_runbook_says_what_it_means_how_to_look_what_to_do_and_whom_to_wake(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["What it means", "Look", "Do", "Wake"]
    for metric in re.findall(r"`(fedmesh_\w+|cnpg_\w+|barman_\w+)", text):
        assert metric in (ROOT / "docs/observability.md").read_text(encoding="utf-8"), metric


def test_rules_count_what_the_code_calls_failed_and_quick() -> None:
    failed = "|".join(sorted(code.name for code in FAILED))
    for rule in rules("recording"):
        if rule["record"].startswith("fedmesh:calls_failed"):
            assert f'code=~"{failed}"' in rule["expr"]
        if rule["record"].startswith("fedmesh:calls_slow"):
            assert f'le="{QUICK_S}"' in rule["expr"]
    for name, budget in {"FedmeshCallsFailing": 1 - AVAILABILITY, "FedmeshCallsSlow": 1 - QUICK}.items():
        for alert, pairs in {
            name: {("1h", "5m", 14.4), ("6h", "30m", 6.0)},
            f"{name}ForDays": {("1d", "2h", 3.0), ("3d", "6h", 1.0)},
        }.items():
            compared = re.findall(r"rate(\d+\w) > ([\d.]+) \* ([\d.]+)", ALERTS[alert]["expr"])
            assert all(float(item[2]) == pytest.approx(budget) for item in compared)
            both = zip(compared[::2], compared[1::2], strict=True)
            found = {(long[0], short[0], float(long[1])) for long, short in both if long[1] == short[1]}
            assert found == pairs


def test_a_window_is_as_long_as_its_name_says() -> None:
    windows = set()
    for rule in rules("recording"):
        named_window = re.search(r"_rate(\d+[mhd])$", rule["record"])
        assert named_window is not None or rule["record"].endswith(":rate5m"), rule["record"]
        window = named_window[1] if named_window else "5m"
        assert set(re.findall(r"\[(\w+)\]", rule["expr"])) == {window}
        windows.add(window)
    assert windows == {"5m", "30m", "1h", "2h", "6h", "1d", "3d"}


def test_amtool_accepts_the_example_and_routes_by_it() -> None:
    config = str(CENTRE / "files" / "alertmanager.yaml")
    amtool = program("amtool")
    run(amtool, "check-config", config)
    for labels, receiver in {
        ("severity=page", "alertname=FedmeshPostgresDown"): "pager",
        ("severity=ticket", "alertname=FedmeshReplicasMissing"): "tickets",
        ("severity=ticket", "alertname=FedmeshWitnessStale", "hospital=h01"): "hospitals",
        ("severity=page", "alertname=FedmeshWitnessAlarm", "kind=fork"): "pager",
    }.items():
        assert run(amtool, "config", "routes", "test", f"--config.file={config}", *labels).strip() == receiver
    for matchers in yaml.safe_load(Path(config).read_text())["inhibit_rules"]:
        for matcher in (*matchers["source_matchers"], *matchers["target_matchers"]):
            pattern = matcher.split("=", 1)[1].lstrip("~").strip().strip('"')
            assert any(re.fullmatch(pattern, name) for name in ALERTS), matcher


# ---- dashboards


def queries() -> list[Any]:
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    return found


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    """As rules, which promtool parses with Prometheus' own parser."""
    some = queries()
    assert len(some) > 50
    recorded = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m").replace("$__range", "1h")}
        for number, (_title, query) in enumerate(some)
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}), encoding="utf-8")
    assert f"{len(some)} rules found" in run(program("promtool"), "check", "rules", str(file))


def test_dashboards_are_what_their_source_says() -> None:
    made = _maker()
    assert {path.stem for path in DASHBOARDS} == made.DASHBOARDS.keys()
    for path in DASHBOARDS:
        assert json.loads(path.read_text(encoding="utf-8")) == made.dashboard(path.stem), "run `make dashboards`"


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dashboards", ROOT / "scripts" / "make_dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    sys.modules["make_dashboards"] = module
    spec.loader.exec_module(module)
    return module


def test_panels_neither_overlap_nor_leave_the_page() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert max(x for x, _ in cells) < 24
            assert not cells & taken, panel["title"]
            taken |= cells


# ---- the chart


def test_nothing_of_it_is_rendered_unless_it_is_asked_for() -> None:
    kinds = {item["kind"] for item in render(CENTRE)}
    assert not kinds & {"PodMonitor", "PrometheusRule"}
    assert not [item for item in render(CENTRE) if "dashboard" in item["metadata"]["name"]]


def test_production_ships_rules_dashboards_and_a_monitor_of_all_services() -> None:
    objects = render(CENTRE, values_of(CENTRE / "values-production.yaml"))
    for name in ("recording", "alerts"):
        shipped = named(objects, "PrometheusRule", f"fedmesh-{name}")["spec"]
        assert shipped == yaml.safe_load((RULES / f"{name}.yaml").read_text(encoding="utf-8"))
    monitor = named(objects, "PodMonitor", "fedmesh")["spec"]
    (expression,) = monitor["selector"]["matchExpressions"]
    assert sorted(expression["values"]) == ["aggregator", "audit", "coordinator", "registry"]
    for service in expression["values"]:
        template = named(objects, "Deployment", f"fedmesh-{service}")["spec"]["template"]
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        policy = named(objects, "NetworkPolicy", f"fedmesh-{service}")["spec"]
        opened = [rule["from"] for rule in policy["ingress"] if {"port": ports["metrics"]} in rule["ports"]]
        assert opened == [[{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]]


def test_rules_and_dashboards_come_as_config_maps_too_with_links_to_where_runbooks_are() -> None:
    monitoring = {
        "rules": {"form": "configMap", "runbooks": "https://wiki.example/fedmesh/", "labels": {"team": "sre"}},
        "dashboards": {"enabled": True},
    }
    objects = render(CENTRE, {"monitoring": monitoring})
    shipped = named(objects, "ConfigMap", "fedmesh-alerts")
    assert shipped["metadata"]["labels"]["team"] == "sre"
    text = shipped["data"]["alerts.yaml"]
    assert "runbook_url: https://wiki.example/fedmesh/FedmeshPostgresDown.md" in text
    assert "docs/runbooks" not in text.split("groups:")[1]
    for path in DASHBOARDS:
        item = named(objects, "ConfigMap", f"fedmesh-dashboard-{path.stem.removeprefix('fedmesh-')}")
        assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(item["data"][path.name]) == json.loads(path.read_text(encoding="utf-8"))
