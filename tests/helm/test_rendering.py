"""Every values file renders to objects that Kubernetes takes; what is unsafe is refused by name."""

from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from tests.support.charts import CENTRE, HOSPITAL, render, values_of

KUBERNETES = ("1.29", "1.33", "1.37")
# Of operators; their schemas are in no package.
FOREIGN = {
    "Issuer", "Certificate", "Cluster", "ObjectStore", "ScheduledBackup", "ExternalSecret", "TLSRoute", "PodMonitor",
    "PrometheusRule"
}  # fmt: skip
BAD = Path(__file__).parent / "refused"
GATEWAY = {
    "external": {
        "mode": "gateway",
        "hosts": {"registry": "registry.fedmesh.example", "enrolment": "enrol.fedmesh.example"},
        "gateway": {"parentRefs": [{"name": "edge", "sectionName": "tls"}], "peers": [{"namespaceSelector": {}}]},
    }
}
OMOP = {
    "data": {"source": "omop", "omop": {"existingSecret": "hospital-01-omop"}, "sqlConfigMap": "hospital-01-sql"},
    "networkPolicy": {"database": {"peers": [{"ipBlock": {"cidr": "10.1.2.3/32"}}]}},
}
ENROLLING = {
    "tls": {"existingSecret": ""},
    "enrolment": {
        "registry": "registry.fedmesh.example:8443",
        "tokenSecret": "hospital-01-token",
        "caConfigMap": "fedmesh-authority",
    },
    "registryKey": {"configMap": "fedmesh-registry-key"},
}
WATCHED = {
    "monitoring": {
        "rules": {"form": "configMap"},
        "dashboards": {"enabled": True},
        "alertmanagerExample": {"enabled": True},
    }
}
WATCHED_HOSPITAL = {
    "monitoring": {"podMonitor": {"enabled": True}, "rules": {"form": "configMap"}, "dashboards": {"enabled": True}}
}
VARIANTS = {
    "defaults": (CENTRE, {}),
    "kind": (CENTRE, values_of(CENTRE / "values-kind.yaml")),
    "production": (CENTRE, values_of(CENTRE / "values-production.yaml")),
    "gateway": (CENTRE, values_of(CENTRE / "values-production.yaml", **GATEWAY)),
    "watched without operators": (CENTRE, values_of(CENTRE / "values-kind.yaml", **WATCHED)),
    "sentinel": (CENTRE, values_of(CENTRE / "values-kind.yaml", valkey={"mode": "sentinel"})),
    "hospital": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml")),
    "hospital that enrols": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml", **ENROLLING)),
    "hospital with OMOP": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml", **OMOP)),
    "hospital that is watched": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml", **WATCHED_HOSPITAL)),
    "hospital in kind": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml", HOSPITAL / "values-kind.yaml")),
}


@pytest.mark.parametrize("upgrade", [False, True], ids=["install", "upgrade"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_objects_are_valid_in_several_versions_of_kubernetes(variant: str, upgrade: bool) -> None:
    chart, values = VARIANTS[variant]
    objects = render(chart, values, upgrade=upgrade)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names)), "two objects of one name"
    for item in objects:
        if item["kind"] in FOREIGN:
            continue
        # The upgrade's objects are the same ones but for the database Job.
        for version in KUBERNETES[-1:] if upgrade else KUBERNETES:
            kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_lints_without_a_warning(variant: str) -> None:
    chart, values = VARIANTS[variant]
    report = helm_python.lint(str(chart), values, strict=True, kube_version="v1.33.0")
    assert report["errors"] == []
    assert [item for item in report["messages"] if item["severity"] >= 2] == []


def refused() -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted(BAD.glob("*.yaml"))]


@pytest.mark.parametrize("path", refused())
def test_unsafe_values_are_refused_by_name(path: Path) -> None:
    """A file holds the values, the base that they go over, and the words that the refusal must say."""
    case = yaml.safe_load(path.read_text(encoding="utf-8"))
    chart = CENTRE if case["chart"] == "fedmesh" else HOSPITAL
    base = values_of(chart / case["base"]) if case["base"] else {}
    render(chart, base)
    with pytest.raises(helm_python.HelmError) as caught:
        render(chart, values_of(*([chart / case["base"]] if case["base"] else []), **case["values"]))
    for words in case["says"]:
        assert words in str(caught.value)


def test_values_of_the_chart_are_all_described_by_the_schema() -> None:
    """Whoever misspells a key hears of it, everywhere."""
    for chart in (CENTRE, HOSPITAL):
        with pytest.raises(helm_python.HelmError, match="additional properties 'replica' not allowed"):
            render(chart, values_of(*chart.glob("values-example.yaml"), replica=3))
