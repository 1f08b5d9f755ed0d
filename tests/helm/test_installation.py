"""An installation of values-kind played on this machine: the chart's own scripts, commands and files, in its order.

Pods become processes whose mounts lie in folders; host names become loopback ports. What is left to a real cluster: its
scheduler, network policies, volumes and Helm's hooks.
"""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
import yaml

from services.cli import membership
from services.cli.centre import CentreConfig, load_centre
from services.cli.reaching import print_services
from services.common.config import PostgresConfig
from services.common.migrations import migrate
from services.embedded.processes import write_private
from services.embedded.redis import SERVICE_COMMANDS
from services.registry.store import MIGRATIONS, SCHEMA
from tests.support.charts import CENTRE, named, notes, render, values_of
from tests.support.played import SERVICES, SERVING, Cluster, played, wait


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with played(render(CENTRE, values_of(CENTRE / "values-kind.yaml"))) as made:
        yield made


def migrate_by_the_next_release(cluster: Cluster) -> str:
    """What the database Job of a newer release does, whose migration of the registry adds a column; its name."""
    folder = cluster.folder / "newer-migrations"
    shutil.copytree(MIGRATIONS, folder)
    number = len(list(folder.glob("*.sql")))
    name = f"{number + 1:04}_later"
    (folder / f"{name}.sql").write_text(
        f"-- oldest-release: {number:04}\nset role registry_owner;\n"
        "alter table registry.hospitals add column later integer;\n"
    )
    password = cluster.folder / "registry-migrator"
    password.write_bytes(cluster.secrets.content["fedmesh-postgres-registry-migrator"]["password"])
    password.chmod(0o600)
    dsn = f"host=127.0.0.1 port={cluster.ports['postgres']} user=registry_migrator dbname=fedmesh"
    assert migrate(PostgresConfig(dsn=dsn, password_file=password), SCHEMA, folder) == [name]
    return name


def test_the_chart_installs_checks_and_upgrades(cluster: Cluster) -> None:
    assert all(line.endswith(": made") for line in cluster.make_secrets())
    for store in ("postgres", "valkey"):
        cluster.start_store(store)
    (job,) = [item for item in cluster.objects if item["kind"] == "Job" and "-database-" in item["metadata"]["name"]]
    spec = job["spec"]["template"]["spec"]
    first = cluster.run(spec, spec["containers"][0])
    admin = cluster.secrets.content["fedmesh-postgres-admin"]["password"].decode()
    server = f"host=127.0.0.1 port={cluster.ports['postgres']} user=postgres dbname=postgres"
    with psycopg.connect(server, password=admin) as connection:
        assert connection.execute("SHOW huge_pages").fetchone() == ("off",)
    assert "registry: applied 0001_registry" in first
    assert "audit: applied 0001_log" in first
    for name in SERVICES:
        cluster.start_service(name)
        assert (cluster.folder / name / "var/lib/fedmesh/refusals/refusals.sqlite").exists()
    check = named(cluster.objects, "Pod", "fedmesh-check")["spec"]
    said = cluster.run(check, check["containers"][0])
    assert sorted(line.split()[1] for line in said.splitlines() if line.startswith("OK ")) == sorted(SERVICES)

    an_operator_reaches(cluster)

    # An upgrade: the same Jobs again, under running services.
    assert all(line.endswith(": kept") for line in cluster.make_secrets())
    upgrade = named(render(CENTRE, upgrade=True), "Job", "fedmesh-database-upgrade")["spec"]["template"]["spec"]
    cluster.objects += [item for item in render(CENTRE, upgrade=True) if item["metadata"]["name"].endswith("-upgrade")]
    again = cluster.run(upgrade, upgrade["containers"][0])
    assert "registry: up to date" in again
    assert "audit: up to date" in again
    assert "FAILED" not in cluster.run(check, check["containers"][0])

    # A newer release migrates. Pods of this one that start again in mid-upgrade serve, and so they do after the
    # rollback, whose Job is this release's.
    newest = migrate_by_the_next_release(cluster)
    for name in ("registry", "audit"):
        cluster.running[name].send_signal(signal.SIGTERM)
        assert cluster.running[name].wait(60) == 0
        cluster.start_service(name)
    assert newest in (cluster.folder / "registry.log").read_text()
    again = cluster.run(upgrade, upgrade["containers"][0])
    assert "registry: up to date" in again
    assert "audit: up to date" in again
    assert "FAILED" not in cluster.run(check, check["containers"][0])

    # A store that goes away makes services unready, not dead; the container's preStop ends it in good order.
    argv, options = cluster.store_command("postgres")
    subprocess.run([*argv, "stop"], check=True, capture_output=True, timeout=60, **options)
    assert cluster.running["postgres"].wait(10) == 0
    wait(lambda: cluster.health("registry", "fedmesh.registry.v1.RegistryService") != SERVING)
    assert cluster.health("registry", "live") == SERVING
    cluster.start_store("postgres")
    wait(lambda: cluster.health("registry", "fedmesh.registry.v1.RegistryService") == SERVING)
    cluster.running["registry"].send_signal(signal.SIGTERM)
    assert cluster.running["registry"].wait(30) == 0


def an_operator_reaches(cluster: Cluster) -> None:
    """By the file that Helm prints and the certificate that it says how to get; tunnels are this machine's ports."""
    authority, folder = cluster.secrets.content["fedmesh-authority"], cluster.folder / "authority"
    folder.mkdir(mode=0o700)
    for name in ("ca.crt", "ca.key"):
        write_private(folder / f"ca.{'pem' if name == 'ca.crt' else 'key'}", authority[name].decode())
    issue = [sys.executable, "-m", "services.deployment", "issue", "operator", "alice", "--authority", str(folder)]
    subprocess.run(issue, check=True, capture_output=True, timeout=60)
    (cluster.folder / "audit.vkey").write_bytes(cluster.secrets.content["fedmesh-audit-key"]["audit.vkey"])
    settings = printed_centre("values-kind.yaml")
    for place, name in enumerate(("registry", "coordinator", "aggregator", "audit")):
        assert settings[name]["target"] == f"localhost:{17441 + place}"
        settings[name]["target"] = f"127.0.0.1:{cluster.ports[name]}"
    file = cluster.folder / "centre.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert print_services(load_centre(file))
    membership.register("hospital-01", centre=file)
    membership.suspend("hospital-01", "tried", centre=file)
    # By its address alone a pod is nobody: its certificate is for a name.
    for name in SERVICES:
        del settings[name]["server_name"]
    file.write_text(yaml.safe_dump(settings))
    assert not print_services(load_centre(file))


def printed_centre(values: str) -> dict[str, Any]:
    """The file of an operator's that Helm prints."""
    said = notes(CENTRE, values_of(CENTRE / values)).partition("\n5. ")[2]
    lines = [line for line in said.splitlines() if re.match("   [a-z_]+: ", line)]
    settings: dict[str, Any] = yaml.safe_load("\n".join(lines))
    CentreConfig.model_validate(settings)
    return settings


def test_the_file_of_an_operator_names_the_hosts_of_the_outside_and_the_issuer() -> None:
    settings = printed_centre("values-production.yaml")
    assert settings["registry"] == {"target": "registry.fedmesh.example:443"}
    assert settings["enrolment"] == "registry.fedmesh.example:8443"
    assert settings["sign_in"]["issuer"] == "https://idp.example/realms/consortium"


def test_the_services_of_valkey_have_the_rights_of_the_embedded_redis(cluster: Cluster) -> None:
    cluster.make_secrets()
    cluster.start_store("valkey")
    assert (CENTRE / "files/service-commands").read_text().strip() == SERVICE_COMMANDS

    def client(user: str) -> redis.Redis:
        password = cluster.secrets.content[f"fedmesh-valkey-{user}"]["password"].decode()
        return redis.Redis(port=cluster.ports["valkey"], username=user, password=password)

    with client("coordinator") as own, client("aggregator") as other, redis.Redis(port=cluster.ports["valkey"]) as none:
        assert own.set("coordinator:x", 1)
        assert own.eval("return redis.call('get', KEYS[1])", 1, "coordinator:x") == b"1"
        for denied in (lambda: other.get("coordinator:x"), lambda: own.config_get("*"), none.ping):
            with pytest.raises(redis.RedisError):
                denied()
