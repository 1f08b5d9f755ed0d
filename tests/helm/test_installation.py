"""An installation of values-kind played on this machine: the chart's own scripts, commands and files, in its order.

Pods become processes whose mounts lie in folders; host names become loopback ports. What is left to a real cluster: its
scheduler, network policies, volumes and Helm's hooks.
"""

import signal
import subprocess
from collections.abc import Iterator

import psycopg
import pytest
import redis

from services.embedded.redis import SERVICE_COMMANDS
from tests.support.charts import CENTRE, named, render, values_of
from tests.support.played import SERVICES, SERVING, Cluster, played, wait


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with played(render(CENTRE, values_of(CENTRE / "values-kind.yaml"))) as made:
        yield made


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

    # An upgrade: the same Jobs again, under running services.
    assert all(line.endswith(": kept") for line in cluster.make_secrets())
    upgrade = named(render(CENTRE, upgrade=True), "Job", "fedmesh-database-upgrade")["spec"]["template"]["spec"]
    cluster.objects += [item for item in render(CENTRE, upgrade=True) if item["metadata"]["name"].endswith("-upgrade")]
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
