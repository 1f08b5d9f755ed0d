"""What the charts configure is what the programs accept: `--check-config` says so, on the mounts of the pods."""

import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.config import ServerConfig, load_config
from services.common.credentials import CredentialFolder
from services.deployment.config import SecretsConfig
from services.deployment.secrets import make_secrets
from services.embedded.ca import create_ca
from services.hospital_node.config import HospitalConfig
from services.secure_sum.roster import MemberKeys, found, save_roster_file, sign_roster
from services.transparency.checkpoint import generate_key
from tests.helm.test_rendering import ENROLLING
from tests.support.charts import CENTRE, HOSPITAL, MemorySecrets, Object, PodFolder, named, pods, render, values_of
from tests.support.played import SERVICES

EXTERNAL_VALKEY = {
    "mode": "external",
    "external": {
        "url": "rediss://valkey.example:6379/0?ssl_ca_certs=/etc/fedmesh/valkey-ca/ca.crt",
        "sentinels": ["valkey-0.example:26379", "valkey-1.example:26379"],
        "caSecret": {"name": "my-valkey-ca"},
        "ports": [6379, 26379],
        "peers": [{"ipBlock": {"cidr": "192.0.2.10/32"}}],
    },
}
VARIANTS = {
    "defaults": {},
    "kind": values_of(CENTRE / "values-kind.yaml"),
    "production": values_of(CENTRE / "values-production.yaml"),
    "external": values_of(CENTRE / "values-production.yaml", valkey=EXTERNAL_VALKEY),
}


def check(command: list[str], folder: PodFolder) -> str:
    """Run a container's command with `--check-config` in the pod's folder; what it said."""
    argv = [sys.executable, *(folder.rewrite(part) for part in command[1:]), "--check-config"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made_secrets(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """All Secrets that the chart's Job makes for the default values."""
    text = named(render(CENTRE), "ConfigMap", "fedmesh-secrets")["data"]["secrets.yaml"]
    file = tmp_path / "secrets.yaml"
    file.write_text(text)
    store = MemorySecrets()
    list(make_secrets(store, load_config(SecretsConfig, file)))
    return store.content


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_program_of_the_centre_accepts_its_configuration(variant: str, tmp_path: Path) -> None:
    objects = render(CENTRE, VARIANTS[variant])
    secrets = made_secrets(tmp_path)
    # Of the operators, whose content is opaque to us: a certificate authority and an account.
    authority = {"ca.crt": secrets["fedmesh-authority"]["ca.crt"]}
    secrets |= {
        "fedmesh-postgres-ca": authority,
        "fedmesh-valkey-tls": authority,
        "my-valkey-ca": authority,
        "fedmesh-issuing-authority": {
            "tls.crt": secrets["fedmesh-authority"]["ca.crt"],
            "tls.key": secrets["fedmesh-authority"]["ca.key"],
        },
        "fedmesh-postgres-superuser": secrets["fedmesh-postgres-admin"],
    }
    checked = set()
    for owner, _metadata, spec in pods(objects):
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            if container["command"][0] != "python":
                continue
            folder = PodFolder(tmp_path / owner / container["name"], objects, secrets)
            folder.mount(spec, container)
            said = check(container["command"], folder)
            assert said.endswith("is OK\n")
            checked.add(container["name"])
    expected = {"registry", "coordinator", "aggregator", "audit", "wait-schema", "database", "check"}
    assert checked == expected | ({"secrets"} if variant in ("defaults", "kind") else set())


def test_the_hospital_accepts_its_configuration(tmp_path: Path) -> None:
    objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml"))
    secrets = hospital_secrets(tmp_path)
    roster = (tmp_path / "roster.json").read_text()
    log_key = generate_key(tmp_path / "audit.key", "consortium.local/audit")
    brought = {"fedmesh-roster": {"roster.json": roster}, "fedmesh-audit-log": {"audit.vkey": f"{log_key}\n"}}
    objects += [{"kind": "ConfigMap", "metadata": {"name": name}, "data": data} for name, data in brought.items()]
    spec = named(objects, "StatefulSet", "fedmesh")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    folder = PodFolder(tmp_path / "pod", objects, secrets, {"/var/lib": f"{tmp_path}/pod/var/lib"})
    folder.mount(spec, container)
    (tmp_path / "pod/var/lib/fedmesh-data/encounters.parquet").touch()
    assert check(container["command"], folder).endswith("is OK\n")


def test_a_hospital_enrols_once_for_each_token(tmp_path: Path) -> None:
    """The script of the init container, with a `python` that notes how it was called; then the node's settings."""
    objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml", **ENROLLING))
    spec = named(objects, "StatefulSet", "fedmesh")["spec"]["template"]["spec"]
    (enrol,) = spec["initContainers"]
    assert "tls" not in {volume["name"] for volume in spec["volumes"]}
    assert [item for item in objects if item["kind"] == "Pod"] == []
    calls, command = tmp_path / "calls", tmp_path / "python"
    command.write_text(f'#!/bin/sh\n[ -e {tmp_path}/away ] && exit 1\necho "$@" >> {calls}\n')
    command.chmod(0o755)
    token = tmp_path / "etc/fedmesh/token/token"
    for folder in (token.parent, tmp_path / "var/lib/fedmesh"):
        folder.mkdir(parents=True)

    def run() -> int:
        argv = [
            part.replace("/etc/", f"{tmp_path}/etc/").replace("/var/", f"{tmp_path}/var/") for part in enrol["command"]
        ]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run(argv, env=environment, timeout=60, check=False).returncode

    token.write_text("first\n")
    (tmp_path / "away").touch()
    assert run() != 0
    (tmp_path / "away").unlink()
    assert (run(), run()) == (0, 0)
    assert calls.read_text().count("\n") == 1
    assert calls.read_text().startswith("-m services.cli.at_hospital enrol --token-file ")
    assert calls.read_text().endswith("/var/lib/fedmesh/tls --registry registry.fedmesh.example:8443\n")
    token.write_text("second\n")
    assert run() == 0
    assert calls.read_text().count("\n") == 2
    text = named(objects, "ConfigMap", "fedmesh")["data"]["hospital_node.yaml"]
    config = HospitalConfig.model_validate(yaml.safe_load(text))
    assert config.renewal is not None
    assert dict(config.tls) == dict(CredentialFolder(config.renewal.folder).tls)
    mounted = {Path(item["mountPath"]) for item in spec["containers"][0]["volumeMounts"]}
    assert config.registry_key is not None
    assert {config.registry_key.parent, config.renewal.folder.parent} <= mounted


def test_everybody_signs_in_where_production_says_so() -> None:
    objects = render(CENTRE, VARIANTS["production"])
    for name in SERVICES:
        told = yaml.safe_load(named(objects, "ConfigMap", f"fedmesh-{name}")["data"][f"{name}.yaml"])
        people = ServerConfig.model_validate(told["server"]).people
        assert people is not None
        assert (people.issuer, people.allow_loopback_issuer) == ("https://idp.example/realms/consortium", False)
        assert people.roles["fedmesh-admins"] == "consortium-admin"
        egress = named(objects, "NetworkPolicy", f"fedmesh-{name}")["spec"]["egress"]
        assert {"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 443}]} in egress


def test_only_the_registry_opens_the_port_for_strangers_and_only_to_hospitals() -> None:
    objects = render(CENTRE, VARIANTS["production"])
    for name in SERVICES:
        spec = named(objects, "Deployment", f"fedmesh-{name}")["spec"]["template"]["spec"]["containers"][0]
        opened = {port["containerPort"] for port in spec["ports"]}
        ingress = named(objects, "NetworkPolicy", f"fedmesh-{name}")["spec"]["ingress"]
        rules = [rule for rule in ingress if {"port": 7445} in rule["ports"]]
        assert (7445 in opened, bool(rules)) == (name == "registry", name == "registry")
        assert all("component" not in str(rule["from"]) for rule in rules)
    entry = named(objects, "Service", "fedmesh-registry-entry")["spec"]["ports"]
    assert {"name": "enrolment", "port": 8443, "targetPort": "enrolment"} in entry


@pytest.mark.parametrize("source", ["omop", "fhir"])
def test_the_hospitals_other_sources_reach_its_configuration(source: str) -> None:
    values = {
        "data": {"source": source, "until": "2024-12-31", "omop": {"existingSecret": "omop"}, "sqlConfigMap": "sql"},
        "networkPolicy": {"database": {"peers": [{"ipBlock": {"cidr": "10.1.2.3/32"}}]}},
    }
    objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml", **values))
    text = named(objects, "ConfigMap", "fedmesh")["data"]["hospital_node.yaml"]
    data = HospitalConfig.model_validate(yaml.safe_load(text)).data
    assert data.until == date(2024, 12, 31)
    spec = named(objects, "StatefulSet", "fedmesh")["spec"]["template"]["spec"]
    mounted = {Path(item["mountPath"]) for item in spec["containers"][0]["volumeMounts"]}
    wanted = data.omop.dsn_file if data.omop is not None else data.fhir.folder if data.fhir is not None else None
    assert data.sql is not None
    assert {wanted.parent if wanted else None, data.sql.parent} <= mounted
    ways = [rule["ports"] for rule in named(objects, "NetworkPolicy", "fedmesh")["spec"]["egress"]]
    assert ([{"port": 5432}] in ways) == (source == "omop")


def hospital_secrets(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """What a hospital brings: its certificate and keys; the founding roster in roster.json."""
    issued = create_ca(tmp_path / "ca", "consortium.local").issue_hospital("hospital-01")
    keys = [MemberKeys.generate(f"hospital-0{number}") for number in range(1, 5)]
    keys[0].save(tmp_path / "member.keys")
    statement = found("consortium.local", [item.public() for item in keys])
    save_roster_file(
        tmp_path / "roster.json", statement, {item.hospital_id: sign_roster(statement, item) for item in keys}
    )
    certificate = {"ca.crt": issued.ca, "tls.crt": issued.certificate, "tls.key": issued.key}
    return {
        "hospital-01-tls": {name: path.read_bytes() for name, path in certificate.items()},
        "hospital-01-member": {"member.keys": (tmp_path / "member.keys").read_bytes()},
    }


def test_settings_reach_the_configuration_over_what_the_chart_sets() -> None:
    settings = {"services": {"registry": {"settings": {"epochs": {"max_age_h": 6}, "postgres": {"pool_max": 3}}}}}
    config = registry_config(render(CENTRE, settings))
    assert config["epochs"] == {"max_age_h": 6}
    assert config["postgres"]["pool_max"] == 3
    assert config["postgres"]["password_file"] == "/etc/fedmesh/store/password"


def test_a_changed_configuration_restarts_its_service_and_no_other() -> None:
    settings = {"services": {"registry": {"settings": {"epochs": {"max_age_h": 6}}}}}
    before, after = render(CENTRE), render(CENTRE, settings)
    changed = {owner for owner, metadata, _ in pods(after) if metadata not in [item for _, item, _ in pods(before)]}
    assert changed == {"Deployment/fedmesh-registry"}


def test_no_configuration_holds_a_secret() -> None:
    for values in VARIANTS.values():
        for item in render(CENTRE, values):
            assert item["kind"] != "Secret"
            if item["kind"] == "ConfigMap":
                for name, text in item["data"].items():
                    if name.endswith(".yaml"):
                        assert list(inline_passwords(yaml.safe_load(text))) == []


def inline_passwords(node: Any, path: str = "") -> Any:
    """Paths of settings that hold a password itself, in a key of its own or in a connection string."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "password" or (key in ("dsn", "url") and ("password=" in value or "@" in value)):
                yield f"{path}.{key}"
            yield from inline_passwords(value, f"{path}.{key}")
    elif isinstance(node, list):
        for item in node:
            yield from inline_passwords(item, path)


def test_the_ops_page_stays_on_the_loopback_of_its_pods() -> None:
    objects = render(CENTRE)
    text = named(objects, "ConfigMap", "fedmesh-coordinator")["data"]["coordinator.yaml"]
    assert yaml.safe_load(text)["ops_listen"] == "127.0.0.1:7190"
    kept = [item for item in objects if item["kind"] in ("Service", "NetworkPolicy", "Deployment")]
    assert kept
    assert "7190" not in yaml.safe_dump_all(kept)
    without = named(render(CENTRE, {"ports": {"ops": 0}}), "ConfigMap", "fedmesh-coordinator")
    assert "ops_listen" not in yaml.safe_load(without["data"]["coordinator.yaml"])


def registry_config(objects: list[Object]) -> Any:
    return yaml.safe_load(named(objects, "ConfigMap", "fedmesh-registry")["data"]["registry.yaml"])
