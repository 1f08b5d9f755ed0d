"""Every metric that the code declares: its labels are of closed sets, and what counts is what the objectives say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from fedmesh.aggregator.v1 import aggregator_pb2
from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import access_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import budget_pb2, performance_pb2, promotion_pb2, registry_pb2
from prometheus_client import CollectorRegistry, Counter, generate_latest

from services.common.grpc.access import load_policy
from services.common.grpc.objective import FAILED, objective_label
from tests.support.labels import allowed, families, offences

SERVICES = Path(__file__).parents[3] / "services"
PROTOS = (registry_pb2, promotion_pb2, budget_pb2, performance_pb2, coordinator_pb2, aggregator_pb2, audit_pb2)
KINDS = {"Counter", "Gauge", "Histogram"}


def declared() -> dict[str, list[str]]:
    """Label names of every metric in the source, by name."""
    return {name: labels for name, (labels, _path) in _places().items()}


def _places() -> dict[str, tuple[list[str], Path]]:
    found = {}
    for path in SERVICES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
                continue
            if len(node.args) >= 2 and isinstance(node.args[0], ast.Constant):
                labels = ast.literal_eval(node.args[2]) if len(node.args) > 2 else []
                found[str(node.args[0].value)] = (labels, path)
    return found


def test_every_metric_has_a_documented_name_and_labels_of_closed_sets() -> None:
    metrics = declared()
    assert len(metrics) > 50
    text = (SERVICES.parent / "docs" / "observability.md").read_text(encoding="utf-8")
    sets = allowed(())
    for name, labels in metrics.items():
        assert name.startswith("fedmesh_"), name
        assert f"`{name}`" in text, f"{name} is not in docs/observability.md"
        family = name.removesuffix("_total")
        assert set(labels) <= sets["*"].keys() | sets.get(family, {}).keys(), name


def test_what_an_alert_counts_from_the_first_on_begins_at_zero() -> None:
    """A series that appears with 1 has not increased: the first event would fire nothing."""
    text = "".join(path.read_text(encoding="utf-8") for path in SERVICES.parent.glob("helm/*/files/rules/alerts.yaml"))
    wanted = set(re.findall(r"increase\((fedmesh_\w+_total)[^)]*\)\) > 0", text))
    assert {"fedmesh_grpc_server_shed_total", "fedmesh_hospital_tasks_total"} <= wanted
    wanted -= {"fedmesh_hospital_witness_looks_total"}  # Looks come every half minute, and the alert waits for many.
    places = _places()
    for name in wanted:
        module = ".".join(places[name][1].relative_to(SERVICES.parent).with_suffix("").parts)
        script = f"import {module}, prometheus_client as p; print(p.generate_latest().decode())"
        page = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
        (family,) = [item for item in families(page.stdout) if item.name == name.removesuffix("_total")]
        assert family.samples, name


def test_a_label_of_no_closed_set_is_found() -> None:
    registry = CollectorRegistry()
    calls = Counter("fedmesh_grpc_server_handled_total", "Calls", ["method", "code", "peer"], registry=registry)
    calls.labels("/fedmesh.registry.v1.RegistryService/GetJob", "OK", "10.0.0.1").inc()
    calls.labels("/made.up/Method", "OK", "10.0.0.2").inc()
    wrong = offences(families(generate_latest(registry).decode()), ())
    assert wrong == [
        "fedmesh_grpc_server_handled: label peer is of no closed set",
        "fedmesh_grpc_server_handled: method='/made.up/Method' is not one of its values",
    ]


@pytest.mark.parametrize("proto", PROTOS)
def test_only_unary_methods_count_and_client_and_server_agree_which(proto: object) -> None:
    for service in proto.DESCRIPTOR.services_by_name.values():  # type: ignore[attr-defined]
        policy = load_policy([service])
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            counts = method.GetOptions().Extensions[access_pb2.access].objective
            assert not (counts and (method.client_streaming or method.server_streaming)), path
            assert policy[path].objective is counts
            assert objective_label(path) == ("yes" if counts else "no")


def test_methods_that_are_not_ours_do_not_count() -> None:
    assert objective_label("/grpc.health.v1.Health/Check") == "no"
    assert objective_label("/nobody.knows/This") == "no"


def test_refusals_that_are_the_callers_own_fault_are_no_failures() -> None:
    own = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION}
    assert not own & FAILED
