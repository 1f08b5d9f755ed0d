"""Objects of operators have only fields that the operators' own types have, with values that those take.

Objects of Kubernetes itself are checked in test_rendering.py. The types are models from npm, which `make helm-check`
installs (operators/package.json). Rules that an operator has as CEL expressions or in a webhook are not in them.
"""

import json
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.helm.test_rendering import FOREIGN, GATEWAY, VARIANTS
from tests.support.charts import CENTRE, HOSPITAL, Object, render, values_of

CHECK = Path(__file__).parent / "operators" / "check.mjs"
INSTALLED = Path(__file__).parents[2] / ".cache" / "helm-operators"
POSTGRES = {
    "recovery": {"recovery": {"serverName": "before", "targetTime": "2026-01-02 03:04:05+00"}},
    "recovery of everything": {"recovery": {"serverName": "before"}, "backup": {"serverName": "after"}},
    "a role of the cloud": {"backup": {"credentialsSecret": "", "endpointURL": "https://s3.example"}},
    "storage classes": {"storage": {"storageClass": "fast"}, "walStorage": {"storageClass": "faster"}},
}
WATCHED = {"podMonitor": {"enabled": True}, "rules": {"form": "prometheusRule"}}
ISSUER = {"name": "consortium", "kind": "ClusterIssuer", "group": "cert-manager.io"}
# Where a key of each kind may be misspelt, besides `spec` itself.
INNER: dict[str, tuple[str | int, ...]] = {
    "Issuer": (),
    "Certificate": ("privateKey",),
    "Cluster": ("postgresql", "synchronous"),
    "ObjectStore": ("configuration", "s3Credentials"),
    "ScheduledBackup": ("pluginConfiguration",),
    "ExternalSecret": ("data", 0, "remoteRef"),
    "TLSRoute": ("rules", 0, "backendRefs", 0),
    "PodMonitor": ("podMetricsEndpoints", 0),
    "PrometheusRule": ("groups", 0, "rules", 0),
}


def production(**more: Any) -> dict[str, Any]:
    return values_of(CENTRE / "values-production.yaml", **more)


def gateway(version: str) -> dict[str, Any]:
    values = production(**GATEWAY)
    values["external"]["gateway"]["apiVersion"] = f"gateway.networking.k8s.io/{version}"
    return values


OPERATED = {
    **VARIANTS,
    **{name: (CENTRE, production(postgres={"cloudNativePG": settings})) for name, settings in POSTGRES.items()},
    **{f"gateway {version}": (CENTRE, gateway(version)) for version in ("v1alpha2", "v1alpha3")},
    "hospital that operators watch": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml", monitoring=WATCHED)),
    "issuer of the consortium": (CENTRE, production(tls={"certManager": {"issuerRef": ISSUER}})),
}


def foreign(variant: str) -> list[Object]:
    return [item for item in render(*OPERATED[variant]) if item["kind"] in FOREIGN]


def errors_of(objects: list[Object]) -> list[list[str]]:
    """What is wrong with each object."""
    assert (INSTALLED / "node_modules").is_dir(), "run `make helm-check`: it installs the operators' models"
    done = subprocess.run(
        ["node", CHECK, INSTALLED], input=json.dumps(objects), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    errors: list[list[str]] = json.loads(done.stdout)
    assert len(errors) == len(objects)
    return errors


@pytest.mark.parametrize("variant", OPERATED)
def test_operators_know_every_key_and_take_every_value(variant: str) -> None:
    objects = foreign(variant)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert {name: errors for name, errors in zip(names, errors_of(objects), strict=True) if errors} == {}


def test_no_kind_of_an_operator_is_left_out() -> None:
    kinds = {item["kind"] for variant in OPERATED for item in foreign(variant)}
    assert kinds == FOREIGN == set(INNER)


def test_a_misspelt_key_or_a_value_of_the_wrong_kind_is_refused() -> None:
    """In every kind, in its `spec` and further down: else the test above would prove nothing."""
    spoilt, expected = [], []
    for item in {item["kind"]: item for item in foreign("gateway")}.values():
        for path in {(), INNER[item["kind"]]}:
            broken = deepcopy(item)
            place = broken["spec"]
            for key in path:
                place = place[key]
            place["mispelt"] = "value"
            spoilt.append(broken)
            expected.append(["/".join(map(str, ["", "spec", *path, "mispelt"])) + " is unknown"])
    assert errors_of(spoilt) == expected

    cluster, store = (
        next(item for item in foreign("production") if item["kind"] == kind) for kind in ("Cluster", "ObjectStore")
    )
    cluster["spec"] |= {"instances": "three", "primaryUpdateMethod": "replace"}
    store["spec"] |= {"retentionPolicy": "a month"}
    store["spec"]["configuration"]["wal"]["maxParallel"] = "4"
    cluster_errors, store_errors = errors_of([cluster, store])
    assert any(error.startswith("/spec/instances ") for error in cluster_errors)
    assert any(error.startswith("/spec/primaryUpdateMethod ") for error in cluster_errors)
    assert any(error.startswith("/spec/retentionPolicy ") for error in store_errors)
    assert any(error.startswith("/spec/configuration/wal/maxParallel ") for error in store_errors)


def test_an_object_that_nothing_describes_is_refused() -> None:
    unknown = {"apiVersion": "example.com/v1", "kind": "Cluster", "metadata": {"name": "x"}, "spec": {}}
    assert errors_of([unknown]) == [["no model of example.com/v1 Cluster"]]
