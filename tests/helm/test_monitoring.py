"""What the charts give to Prometheus, Alertmanager and Grafana: rules that are tested, runbooks, queries that parse."""

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
from tests.support.charts import CENTRE, HOSPITAL, named, render, values_of
from tests.support.prometheus import program

ROOT = CENTRE.parents[1]
RULES = {chart: chart / "files" / "rules" for chart in (CENTRE, HOSPITAL)}
CASES = Path(__file__).parent / "promtool"
DASHBOARDS = [path for chart in RULES for path in sorted((chart / "files" / "dashboards").glob("*.json"))]
RUNBOOKS = ROOT / "docs" / "runbooks"


_MONITORING = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def rules(name: str, chart: Path = CENTRE) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES[chart] / f"{name}.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for chart in RULES for rule in rules("alerts", chart)}


def branches(expression: str) -> list[str]:
    """What stands between the `or`s that no parenthesis encloses."""
    parts, depth = [""], 0
    for word in re.split(r"([()]|\bor\b)", expression):
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word == "or" and depth == 0:
            parts.append("")
        else:
            parts[-1] += word
    return [part.strip() for part in parts]


def without_a_branch() -> list[Any]:
    """Every way to leave a branch out of a rule: the rule's name, and what is left of it."""
    left = []
    for name, rule in ALERTS.items():
        parts = branches(rule["expr"])
        for number in range(len(parts) if len(parts) > 1 else 0):
            kept = " or ".join(part for other, part in enumerate(parts) if other != number)
            left.append(pytest.param(name, kept, id=f"{name}-{number + 1}"))
    return left


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- rules


def test_promtool_accepts_the_rules() -> None:
    files = [str(path) for folder in RULES.values() for path in sorted(folder.glob("*.yaml"))]
    assert len(files) == 3
    assert "SUCCESS" in run(program("promtool"), "check", "rules", *files)


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


@pytest.mark.parametrize(("name", "left"), without_a_branch())
def test_every_branch_of_a_rule_has_a_case_that_needs_it(name: str, left: str, tmp_path: Path) -> None:
    """A rule without one of its branches fails its own cases, of which the others are left out."""
    (tmp_path / "alerts.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "cut", "rules": [{**ALERTS[name], "expr": left}]}]}), encoding="utf-8"
    )
    tests = [
        test
        for path in CASES.glob("*.yaml")
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
        if any(case["alertname"] == name for case in test.get("alert_rule_test", []))
    ]
    cases = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases), encoding="utf-8")
    command = [program("promtool"), "test", "rules", "cases.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600)
    assert done.returncode != 0
    assert "got:[]" in done.stdout + done.stderr, "the rule that was cut must parse, and miss something"


def test_cases_feed_in_what_there_is() -> None:
    """Labels that nobody attaches would make a rule work in its case only."""
    table = dict(
        re.findall(
            r"^\| `(fedmesh_\w+)` \| \w+ \| ([\w, ]*)\|", (ROOT / "docs/observability.md").read_text(), re.MULTILINE
        )
    )
    assert len(table) > 80
    fed = 0
    for path in CASES.glob("*.yaml"):
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for item in test["input_series"]:
                name, labels = re.fullmatch(r"([\w:]+)(?:\{(.*)\})?", item["series"]).groups()  # type: ignore[union-attr]
                if not name.startswith("fedmesh_"):
                    continue
                own = re.sub(r"_(bucket|sum|count)$", "", name)
                known = set(table[own].replace(",", " ").split()) | {"namespace", "pod"}
                known |= {"le"} if own != name else set()
                assert set(re.findall(r"(\w+)=", labels or "")) <= known, f"{path.name}: {item['series']}"
                fed += 1
    assert fed > 100


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
    for metric in re.findall(r"`(fedmesh_\w+|cnpg_\w+|barman_\w+|kubelet_\w+)", text):
        assert metric in (ROOT / "docs/observability.md").read_text(encoding="utf-8"), metric


def test_the_metrics_of_others_that_alerts_use_are_documented() -> None:
    documented = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    used = {name for rule in ALERTS.values() for name in re.findall(r"\b((?:cnpg|barman|kubelet)_\w+)", rule["expr"])}
    assert len(used) > 4
    for name in used:
        assert f"`{name}" in documented, name


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
    assert [path.stem for path in DASHBOARDS[-1:]] == ["fedmesh-node"]
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


@pytest.mark.parametrize("chart", [CENTRE, HOSPITAL], ids=lambda chart: chart.name)
def test_nothing_of_it_is_rendered_unless_it_is_asked_for(chart: Path) -> None:
    objects = render(chart, values_of(*chart.glob("values-example.yaml")))
    assert not {item["kind"] for item in objects} & {"PodMonitor", "PrometheusRule"}
    assert not [item for item in objects if re.search("dashboard|alerts", item["metadata"]["name"])]


def test_production_ships_rules_dashboards_and_a_monitor_of_all_services() -> None:
    objects = render(CENTRE, values_of(CENTRE / "values-production.yaml"))
    for name in ("recording", "alerts"):
        shipped = named(objects, "PrometheusRule", f"fedmesh-{name}")["spec"]
        assert shipped == yaml.safe_load((RULES[CENTRE] / f"{name}.yaml").read_text(encoding="utf-8"))
    monitor = named(objects, "PodMonitor", "fedmesh")["spec"]
    (expression,) = monitor["selector"]["matchExpressions"]
    assert sorted(expression["values"]) == ["aggregator", "audit", "coordinator", "registry"]
    for service in expression["values"]:
        template = named(objects, "Deployment", f"fedmesh-{service}")["spec"]["template"]
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        policy = named(objects, "NetworkPolicy", f"fedmesh-{service}")["spec"]
        opened = [rule["from"] for rule in policy["ingress"] if {"port": ports["metrics"]} in rule["ports"]]
        assert opened == [_MONITORING]


def test_production_scrapes_the_instances_of_postgresql_whose_metrics_alerts_use() -> None:
    objects = render(CENTRE, values_of(CENTRE / "values-production.yaml"))
    cluster = named(objects, "Cluster", "fedmesh-postgres")["metadata"]["name"]
    monitor = named(objects, "PodMonitor", "fedmesh-postgres")["spec"]
    assert monitor["selector"] == {"matchLabels": {"cnpg.io/cluster": cluster}}
    policy = named(objects, "NetworkPolicy", "fedmesh-postgres")["spec"]
    assert [rule["from"] for rule in policy["ingress"] if {"port": 9187} in rule["ports"]] == [_MONITORING]
    without = render(CENTRE, {"monitoring": {"podMonitor": {"enabled": True}}})
    assert [item["metadata"]["name"] for item in without if item["kind"] == "PodMonitor"] == ["fedmesh"]


def test_alerts_on_volumes_know_the_names_of_the_charts_claims() -> None:
    """Of a StatefulSet: template, name, number. CloudNativePG: cluster, number, and `-wal` for the second volume."""
    trial = render(CENTRE, values_of(CENTRE / "values-kind.yaml"))
    production = render(CENTRE, values_of(CENTRE / "values-production.yaml"))
    node = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml"))
    claims: dict[str, set[str]] = {}
    for alert, objects in {
        "FedmeshVolumeNearlyFull": [*trial, *production],
        "FedmeshVolumeFull": [*trial, *production],
        "FedmeshNodeVolumeNearlyFull": node,
    }.items():
        for item in objects:
            name = item["metadata"]["name"]
            if item["kind"] == "StatefulSet":
                templates = item["spec"].get("volumeClaimTemplates", [])
                claims.setdefault(alert, set()).update(f"{made['metadata']['name']}-{name}-0" for made in templates)
            if item["kind"] == "Cluster":
                claims.setdefault(alert, set()).update({f"{name}-1", f"{name}-1-wal"})
    assert {len(found) for found in claims.values()} == {4, 1}
    for alert, found in claims.items():
        (pattern,) = set(re.findall(r'persistentvolumeclaim=~"(.+?)"', ALERTS[alert]["expr"]))
        assert [claim for claim in found if not re.fullmatch(pattern, claim)] == []


def test_a_hospital_is_watched_by_its_own_prometheus() -> None:
    monitoring = {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "30s"},
        "rules": {"form": "prometheusRule", "runbooks": "https://wiki.example/fedmesh"},
        "dashboards": {"enabled": True},
    }
    objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml", monitoring=monitoring))
    monitor = named(objects, "PodMonitor", "fedmesh")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "metrics", "interval": "30s"}]
    template = named(objects, "StatefulSet", "fedmesh")["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    policy = named(objects, "NetworkPolicy", "fedmesh")["spec"]
    assert policy["ingress"] == [{"from": _MONITORING, "ports": [{"port": ports["metrics"]}]}]
    shipped = named(objects, "PrometheusRule", "fedmesh-alerts")["spec"]["groups"]
    names = [rule["alert"] for group in shipped for rule in group["rules"]]
    assert names == [rule["alert"] for rule in rules("alerts", HOSPITAL)]
    links = {rule["annotations"]["runbook_url"] for group in shipped for rule in group["rules"]}
    assert "https://wiki.example/fedmesh/FedmeshNodeAbsent.md" in links
    item = named(objects, "ConfigMap", "fedmesh-dashboard-node")
    assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(item["data"]["fedmesh-node.json"]) == json.loads(DASHBOARDS[-1].read_text(encoding="utf-8"))


def test_a_hospitals_alerts_come_as_a_config_map_too() -> None:
    monitoring = {"rules": {"form": "configMap", "labels": {"team": "sre"}}}
    objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml", monitoring=monitoring))
    shipped = named(objects, "ConfigMap", "fedmesh-alerts")
    assert shipped["metadata"]["labels"]["team"] == "sre"
    text = (RULES[HOSPITAL] / "alerts.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(shipped["data"]["alerts.yaml"]) == yaml.safe_load(text)


def test_no_two_alerts_of_the_charts_share_a_name() -> None:
    both = [rule["alert"] for chart in RULES for rule in rules("alerts", chart)]
    assert len(both) == len(set(both))


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
    for path in DASHBOARDS[:-1]:
        item = named(objects, "ConfigMap", f"fedmesh-dashboard-{path.stem.removeprefix('fedmesh-')}")
        assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(item["data"][path.name]) == json.loads(path.read_text(encoding="utf-8"))
