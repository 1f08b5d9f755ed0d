"""Every setting of every program is in the charts' hands, or is left to `settings` for a reason that stands here."""

from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from services.aggregator.config import AggregatorConfig
from services.audit.config import AuditConfig
from services.common.config import Section
from services.coordinator.config import CoordinatorConfig
from services.hospital_node.config import HospitalConfig
from services.registry.config import RegistryConfig
from tests.helm.test_rendering import ENROLLING
from tests.support.charts import CENTRE, HOSPITAL, named, render, values_of

# What a chart leaves to `settings`, by the beginning of its name.
TUNING = "a default that is right for a pod, changed by whoever measured that it is not"
LEFT: dict[str, dict[str, str]] = {
    "every service": {
        "server.max_connection_age_s": TUNING,
        "server.refusals.max_bytes": "the default, for which every `spool` that the schema lets in has room",
        "server.people.allow_loopback_issuer": "never on Kubernetes: such an issuer asks nobody for a proof",
        "postgres.pool_max": TUNING,
        "standing": TUNING,
        "telemetry.log_format": "JSON, which log collectors read",
        "telemetry.trace_file": "a read-only root; spans go to telemetry.otlpEndpoint",
    },
    "registry": {"blobs": TUNING, "relay": TUNING, "budget": TUNING, "epochs": TUNING, "strikes": TUNING},
    "coordinator": {"rounds": TUNING, "driver": TUNING, "tasks": TUNING, "rate": TUNING},
    "aggregator": {
        "computing": TUNING,
        "uploads": TUNING,
        "chunks": "sums above 10 million parameters: a folder of one's own",
    },
    "audit": {"batch": TUNING, "witness": TUNING},
    "hospital": {
        "data.files": "several files in place of one: rare, and a list that only `settings` can say",
        "data.patients_across_files": "with data.files",
        "data.partition": "for public benchmarks",
        "data.omop.connect_timeout_s": TUNING,
        "data.fhir": "rendered with data.source fhir",
        "data.omop": "rendered with data.source omop",
        "data.sql": "rendered with data.sqlConfigMap",
        "data.until": "rendered with data.until",
        "data.mapping": "rendered with data.mappingConfigMap",
        "witness.spot_checks": TUNING,
        "plan_families": "packages that are in an image of one's own",
        "compile_cache": "inside data_dir: one pod shares with nobody",
        "checks": TUNING,
        "limits": TUNING,
        "telemetry": "the log level is a value; a hospital sends its traces to nobody",
    },
}
SENTINEL = {"mode": "external", "external": {"url": "rediss://valkey.example:6379/0", "sentinels": ["a.example:26379"],
            "peers": [{"ipBlock": {"cidr": "192.0.2.10/32"}}]}}  # fmt: skip
CENTRE_VALUES: dict[str, Any] = {
    "valkey": SENTINEL,
    "people": {"jwksUrl": "https://idp.example/keys", "caConfigMap": {"name": "idp"}},
    "telemetry": {"otlpEndpoint": "http://otel.example:4317"},
    "networkPolicy": {"otlp": {"peers": [{"namespaceSelector": {}}]}},
}
APPROVED = {"epsilonLimit": 1, "approvalConfigMap": "approval", "approvers": {"ann": "0" * 64, "bob": "1" * 64}}
MODELS: dict[str, type[Section]] = {
    "registry": RegistryConfig,
    "coordinator": CoordinatorConfig,
    "aggregator": AggregatorConfig,
    "audit": AuditConfig,
    "hospital": HospitalConfig,
}


def settings(model: type[BaseModel], prefix: str = "") -> set[str]:
    """The dotted names of a configuration's leaves."""
    found = set()
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found |= settings(inner[0], f"{prefix}{name}.") if inner else {f"{prefix}{name}"}
    return found


def rendered(name: str) -> dict[str, Any]:
    if name == "hospital":
        objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml", privacy=APPROVED, **ENROLLING))
        told = named(objects, "ConfigMap", "fedmesh")["data"]["hospital_node.yaml"]
    else:
        objects = render(CENTRE, values_of(CENTRE / "values-production.yaml", **CENTRE_VALUES))
        told = named(objects, "ConfigMap", f"fedmesh-{name}")["data"][f"{name}.yaml"]
    config: dict[str, Any] = yaml.safe_load(told)
    return config


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_has_a_value_of_the_chart_or_a_reason(name: str) -> None:
    config = rendered(name)
    MODELS[name].model_validate(config)

    def is_set(path: str) -> bool:
        node: Any = config
        for part in path.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    known = settings(MODELS[name])
    for path in LEFT[name]:
        assert any(f"{item}.".startswith(f"{path}.") for item in known), f"{path} is no setting any more"
    left = LEFT[name] | ({} if name == "hospital" else LEFT["every service"])
    missing = {path for path in known if not is_set(path)}
    assert {path for path in missing if not any(f"{path}.".startswith(f"{item}.") for item in left)} == set()
