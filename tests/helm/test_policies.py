"""Rules that all rendered objects keep: pod security, probes, draining, budgets, an open edge for each that is used."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm.test_rendering import ENROLLING
from tests.support.charts import CENTRE, HOSPITAL, Object, named, pods, render, values_of

SERVICES = ("registry", "coordinator", "aggregator", "audit")
PRODUCTION = values_of(CENTRE / "values-production.yaml")
VARIANTS = {
    "defaults": (CENTRE, {}),
    "kind": (CENTRE, values_of(CENTRE / "values-kind.yaml")),
    "production": (CENTRE, PRODUCTION),
    "hospital": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml")),
    "hospital in kind": (HOSPITAL, values_of(HOSPITAL / "values-example.yaml", HOSPITAL / "values-kind.yaml")),
}


@pytest.fixture(params=VARIANTS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    chart, values = VARIANTS[request.param]
    return render(chart, values)


def containers(spec: Object) -> Iterator[Object]:
    yield from [*spec.get("initContainers", []), *spec["containers"]]


def test_pods_keep_the_restricted_standard(objects: list[Object]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, and a read-only root besides."""
    for owner, _metadata, spec in pods(objects):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), owner
        assert spec["securityContext"]["runAsNonRoot"] is True, owner
        assert spec["securityContext"]["runAsUser"] > 0, owner
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"]), owner
        for container in containers(spec):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, owner
            assert context["readOnlyRootFilesystem"] is True, owner
            assert context["capabilities"] == {"drop": ["ALL"]}, owner
            assert not any("hostPort" in port for port in container.get("ports", [])), owner


def test_only_the_job_that_makes_secrets_gets_a_token(objects: list[Object]) -> None:
    for owner, metadata, spec in pods(objects):
        with_token = metadata["labels"]["app.kubernetes.io/component"] == "secrets"
        assert spec["automountServiceAccountToken"] is with_token, owner
        assert spec["enableServiceLinks"] is False, owner


def test_images_are_exact_and_fetched_only_when_missing(objects: list[Object]) -> None:
    for owner, _metadata, spec in pods(objects):
        for container in containers(spec):
            assert re.search(r":\d+\.\d+|@sha256:[0-9a-f]{64}$", container["image"]), owner
            assert container["imagePullPolicy"] == "IfNotPresent", owner


def test_a_digest_takes_the_place_of_the_tag() -> None:
    digest = "sha256:" + "0" * 64
    image = {"repository": "registry.example/registry", "digest": digest}
    spec = named(render(CENTRE, {"services": {"registry": {"image": image}}}), "Deployment", "fedmesh-registry")[
        "spec"
    ]["template"]["spec"]
    assert {item["image"] for item in containers(spec)} == {f"registry.example/registry@{digest}"}


def test_whatever_runs_on_is_probed_and_has_limits(objects: list[Object]) -> None:
    for owner, _metadata, spec in pods(objects):
        for container in containers(spec):
            assert container["resources"]["limits"]["memory"], owner
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), owner
        if owner.startswith(("Deployment/", "StatefulSet/")):
            for container in spec["containers"]:
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    assert container[probe]["timeoutSeconds"] >= 2, f"{owner} {probe}"


@pytest.mark.parametrize("variant", ["defaults", "kind", "production"])
def test_probes_ask_for_what_the_servers_say(variant: str) -> None:
    """Liveness never depends on a store; readiness does."""
    objects = render(*VARIANTS[variant])
    for name in SERVICES:
        (container,) = named(objects, "Deployment", f"fedmesh-{name}")["spec"]["template"]["spec"]["containers"]
        assert container["livenessProbe"]["grpc"]["service"] == "live"
        assert container["readinessProbe"]["grpc"]["service"] == f"fedmesh.{name}.v1.{name.title()}Service"
        config = yaml.safe_load(named(objects, "ConfigMap", f"fedmesh-{name}")["data"][f"{name}.yaml"])
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert config["server"]["health_listen"].endswith(f":{container[probe]['grpc']['port']}")


@pytest.mark.parametrize("variant", ["defaults", "kind", "production"])
def test_a_pod_has_time_to_drain(variant: str) -> None:
    objects = render(*VARIANTS[variant])
    for name in SERVICES:
        deployment = named(objects, "Deployment", f"fedmesh-{name}")["spec"]
        spec = deployment["template"]["spec"]
        config = yaml.safe_load(named(objects, "ConfigMap", f"fedmesh-{name}")["data"][f"{name}.yaml"])
        slept = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert slept + config["server"]["drain_s"] + 10 <= spec["terminationGracePeriodSeconds"]
        assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        keys = {item["topologyKey"] for item in spec["topologySpreadConstraints"]}
        assert keys == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        # Else a fourth replica would never be scheduled on three nodes beside a tainted one.
        assert {item["nodeTaintsPolicy"] for item in spec["topologySpreadConstraints"]} == {"Honor"}


def test_in_kind_nobody_asks_for_what_its_nodes_may_not_measure() -> None:
    """Where a node offers no ephemeral storage, a pod that wants some, by a limit too, is never scheduled."""
    for objects in (render(*VARIANTS["kind"]), render(*VARIANTS["hospital in kind"])):
        for owner, _metadata, spec in pods(objects):
            for container in containers(spec):
                for amounts in container["resources"].values():
                    assert set(amounts) <= {"cpu", "memory"}, owner


def test_a_pod_that_never_gets_ready_is_replaced_by_a_rollback(objects: list[Object]) -> None:
    """https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#forced-rollback"""
    for item in objects:
        if item["kind"] == "StatefulSet":
            assert item["spec"]["podManagementPolicy"] == "Parallel"


def test_every_budget_lets_a_pod_go(objects: list[Object]) -> None:
    running = {item["metadata"]["name"]: item for item in objects if item["kind"] in ("Deployment", "StatefulSet")}
    scaled = {item["metadata"]["name"]: item for item in objects if item["kind"] == "HorizontalPodAutoscaler"}
    budgets = [item for item in objects if item["kind"] == "PodDisruptionBudget"]
    assert budgets
    for budget in budgets:
        name = budget["metadata"]["name"]
        least = scaled[name]["spec"]["minReplicas"] if name in scaled else running[name]["spec"]["replicas"]
        assert budget["spec"].get("maxUnavailable", 0) >= 1 or budget["spec"]["minAvailable"] < least
        pod = running[name]["spec"]["template"]["metadata"]["labels"]
        assert budget["spec"]["selector"]["matchLabels"].items() <= pod.items()


def test_an_autoscaler_owns_the_number_of_replicas() -> None:
    objects = render(CENTRE, PRODUCTION)
    scaled = {item["metadata"]["name"] for item in objects if item["kind"] == "HorizontalPodAutoscaler"}
    assert scaled == {"fedmesh-registry", "fedmesh-coordinator", "fedmesh-aggregator"}
    for name in SERVICES:
        spec = named(objects, "Deployment", f"fedmesh-{name}")["spec"]
        assert ("replicas" in spec) is (f"fedmesh-{name}" not in scaled)


# ---- who reaches whom


def used_edges(objects: list[Object]) -> set[tuple[str, str]]:
    """What the configurations in the pods name: (component, component or store)."""
    edges = set()
    for owner, metadata, spec in pods(objects):
        component = metadata["labels"]["app.kubernetes.io/component"]
        for volume in spec["volumes"]:
            if "configMap" in volume and not owner.startswith("StatefulSet/"):
                text = yaml.safe_dump(named(objects, "ConfigMap", volume["configMap"]["name"])["data"])
                for found in re.findall(r"fedmesh-([a-z]+)(?:-rw)?\.mesh\.svc\.cluster\.local:?", text):
                    edges.add((component, found))
    # The Job that makes certificates writes host names and calls nobody.
    return {edge for edge in edges if edge[0] != "secrets"}


def component_of(peer: Object) -> str | None:
    labels = peer.get("podSelector", {}).get("matchLabels", {})
    if "cnpg.io/cluster" in labels:
        return "postgres"
    return labels.get("app.kubernetes.io/component") if labels.get("app.kubernetes.io/instance") == "fedmesh" else None


def allowed_edges(objects: list[Object], direction: str, side: str) -> set[tuple[str, str]]:
    """What policies allow between components: by the sender's egress rules, or by the receiver's ingress rules."""
    edges = set()
    for item in objects:
        if item["kind"] == "NetworkPolicy":
            own = component_of({"podSelector": item["spec"]["podSelector"]})
            for rule in item["spec"].get(direction, []):
                for peer in rule.get(side, []):
                    other = component_of(peer)
                    if own and other and own != other:
                        edges.add((own, other) if direction == "egress" else (other, own))
    return edges


@pytest.mark.parametrize("variant", ["defaults", "kind", "production"])
def test_an_edge_is_open_on_both_sides_when_it_is_used_and_never_else(variant: str) -> None:
    objects = render(*VARIANTS[variant])
    used = used_edges(objects)
    assert {("registry", "audit"), ("coordinator", "aggregator"), ("audit", "postgres")} <= used
    assert allowed_edges(objects, "egress", "to") == used
    assert allowed_edges(objects, "ingress", "from") == used


def test_the_api_server_may_be_anywhere_unless_its_addresses_are_named() -> None:
    """To some network plugins its address belongs to no range."""
    ports = [{"port": number} for number in (443, 6443, 8443, 16443)]
    (rule,) = named(render(CENTRE), "NetworkPolicy", "fedmesh-secrets")["spec"]["egress"]
    assert rule == {"ports": ports}
    peers = [{"ipBlock": {"cidr": "192.0.2.1/32"}}]
    told = render(CENTRE, {"networkPolicy": {"apiServer": {"peers": peers}}})
    (rule,) = named(told, "NetworkPolicy", "fedmesh-secrets")["spec"]["egress"]
    assert rule == {"ports": ports, "to": peers}


def test_a_hospital_reaches_the_port_at_which_it_enrols() -> None:
    objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml", **ENROLLING))
    (rule, _names) = named(objects, "NetworkPolicy", "fedmesh")["spec"]["egress"]
    assert rule["ports"] == [{"port": 443}, {"port": 8443}]


def test_everything_is_denied_first(objects: list[Object]) -> None:
    policies = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]
    deny = [item for item in policies if not item.get("ingress") and not item.get("egress")]
    (first,) = [item for item in deny if set(item["policyTypes"]) == {"Ingress", "Egress"}]
    for owner, metadata, _spec in pods(objects):
        assert first["podSelector"]["matchLabels"].items() <= metadata["labels"].items(), owner


def test_nobody_reaches_the_health_port(objects: list[Object]) -> None:
    """It speaks plaintext; the kubelet needs no rule."""
    for item in objects:
        if item["kind"] == "NetworkPolicy":
            for rule in item["spec"].get("ingress", []):
                assert rule["ports"], "a rule without ports opens all of them"
                assert 7444 not in [port["port"] for port in rule["ports"]]


def test_the_way_in_names_the_hosts_of_the_certificates() -> None:
    objects = render(CENTRE, PRODUCTION)
    for name in SERVICES:
        host = PRODUCTION["external"]["hosts"][name]
        certificate = named(objects, "Certificate", f"fedmesh-{name}")["spec"]
        assert certificate["uris"] == [f"spiffe://fedmesh.example/service/{name}"]
        assert {host, f"fedmesh-{name}.mesh.svc.cluster.local"} <= set(certificate["dnsNames"])
        assert {"client auth", "server auth"} <= set(certificate["usages"])
        entry = named(objects, "Service", f"fedmesh-{name}-entry")["spec"]
        assert (entry["type"], entry["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
        assert entry["loadBalancerSourceRanges"] == PRODUCTION["external"]["allowedCidrs"]


def test_the_check_may_ask_for_health_and_has_no_name_that_serves() -> None:
    certificate = named(render(CENTRE, PRODUCTION), "Certificate", "fedmesh-check")["spec"]
    assert certificate["uris"] == ["spiffe://fedmesh.example/service/check"]
    assert "dnsNames" not in certificate
    assert "server auth" not in certificate["usages"]


# ---- the stores of production


def test_postgresql_of_production_answers_a_commit_from_two_places_and_is_archived() -> None:
    objects = render(CENTRE, PRODUCTION)
    cluster = named(objects, "Cluster", "fedmesh-postgres")["spec"]
    assert cluster["instances"] == 3
    assert cluster["postgresql"]["synchronous"]["number"] == 1
    assert cluster["postgresql"]["synchronous"]["dataDurability"] == "required"
    assert cluster["certificates"]["serverAltDNSNames"] == ["fedmesh-postgres-rw.mesh.svc.cluster.local"]
    (plugin,) = cluster["plugins"]
    assert plugin["isWALArchiver"] is True
    assert named(objects, "ObjectStore", plugin["parameters"]["barmanObjectName"])
    backup = named(objects, "ScheduledBackup", "fedmesh-postgres")["spec"]
    assert backup["cluster"]["name"] == "fedmesh-postgres"
    assert len(backup["schedule"].split()) == 6
    keep = named(objects, "Cluster", "fedmesh-postgres")["metadata"]["annotations"]
    assert keep["helm.sh/resource-policy"] == "keep"


def test_a_restored_cluster_reads_the_old_folder_and_writes_another() -> None:
    settings: dict[str, Any] = {
        "backup": {"serverName": "after"},
        "recovery": {"serverName": "before", "targetTime": "2026-01-02 03:04:05+00"},
    }
    values = values_of(CENTRE / "values-production.yaml", postgres={"cloudNativePG": settings})
    spec = named(render(CENTRE, values), "Cluster", "fedmesh-postgres")["spec"]
    assert "initdb" not in spec["bootstrap"]
    assert spec["bootstrap"]["recovery"]["recoveryTarget"]["targetTime"] == "2026-01-02 03:04:05+00"
    (origin,) = spec["externalClusters"]
    assert origin["name"] == spec["bootstrap"]["recovery"]["source"]
    assert origin["plugin"]["parameters"]["serverName"] == "before"
    assert spec["plugins"][0]["parameters"]["serverName"] == "after"


def test_a_backup_is_restored_for_a_trial_that_writes_none() -> None:
    settings = {
        "backup": {"enabled": False, "destinationPath": "s3://fedmesh-backups.example/"},
        "recovery": {"serverName": "before"},
    }
    postgres = {"mode": "cloudNativePG", "sslmode": "verify-full", "cloudNativePG": settings}
    objects = render(CENTRE, {"postgres": postgres})
    (origin,) = named(objects, "Cluster", "fedmesh-postgres")["spec"]["externalClusters"]
    store = named(objects, "ObjectStore", origin["plugin"]["parameters"]["barmanObjectName"])["spec"]
    assert store["configuration"]["destinationPath"] == "s3://fedmesh-backups.example/"
    ways = named(objects, "NetworkPolicy", "fedmesh-postgres")["spec"]["egress"]
    assert [{"ipBlock": {"cidr": "0.0.0.0/0"}}] in [rule.get("to") for rule in ways]
    assert "plugins" not in named(objects, "Cluster", "fedmesh-postgres")["spec"]
    assert not [item for item in objects if item["kind"] == "ScheduledBackup"]


def test_one_instance_waits_for_no_standby() -> None:
    postgres = {"mode": "cloudNativePG", "sslmode": "verify-full", "cloudNativePG": {"instances": 1}}
    spec = named(render(CENTRE, {"postgres": postgres}), "Cluster", "fedmesh-postgres")["spec"]
    assert "synchronous" not in spec["postgresql"]


def test_valkey_of_production_has_three_pods_that_reach_each_other_and_nobody_else() -> None:
    objects = render(CENTRE, PRODUCTION)
    assert named(objects, "StatefulSet", "fedmesh-valkey")["spec"]["replicas"] == 3
    policy = named(objects, "NetworkPolicy", "fedmesh-valkey")["spec"]
    assert [component_of(peer) for rule in policy["egress"] for peer in rule["to"]] == ["valkey"]
    senders = [component_of(peer) for rule in policy["ingress"] for peer in rule["from"]]
    assert sorted(map(str, senders)) == ["aggregator", "coordinator", "valkey"]
    names = named(objects, "Certificate", "fedmesh-valkey")["spec"]["dnsNames"]
    assert "*.fedmesh-valkey.mesh.svc.cluster.local" in names
    for service in ("coordinator", "aggregator"):
        text = named(objects, "ConfigMap", f"fedmesh-{service}")["data"][f"{service}.yaml"]
        section = yaml.safe_load(text)["redis"]
        assert section["url"].startswith("rediss://")
        first = "fedmesh-valkey-0.fedmesh-valkey.mesh.svc.cluster.local:26379"
        assert (section["sentinel"]["addresses"][0], len(section["sentinel"]["addresses"])) == (first, 3)


# ---- one hospital


def test_a_hospital_is_one_pod_on_one_volume_that_stays() -> None:
    objects = render(HOSPITAL, values_of(HOSPITAL / "values-example.yaml"))
    spec = named(objects, "StatefulSet", "fedmesh")["spec"]
    assert spec["replicas"] == 1
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    config = yaml.safe_load(named(objects, "ConfigMap", "fedmesh")["data"]["hospital_node.yaml"])
    mounted = {item["mountPath"] for item in spec["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert any(config["data_dir"].startswith(f"{path}/") for path in mounted)


# ---- order of things


def test_an_upgrade_migrates_before_any_pod_is_replaced_and_an_install_beside_the_others() -> None:
    hook = named(render(CENTRE, upgrade=True), "Job", "fedmesh-database-upgrade")
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    # Pauses between tries double: more of them would outlast whoever waits for `helm upgrade`.
    assert hook["spec"]["backoffLimit"] == 2
    (job,) = [item for item in render(CENTRE) if item["kind"] == "Job" and "-database-" in item["metadata"]["name"]]
    assert "helm.sh/hook" not in job["metadata"].get("annotations", {})
    for name in ("registry", "audit"):
        spec = named(render(CENTRE), "Deployment", f"fedmesh-{name}")["spec"]["template"]["spec"]
        assert [item["name"] for item in spec["initContainers"]] == ["wait-schema"]


def test_secrets_come_before_everything_and_their_role_goes() -> None:
    objects = [item for item in render(CENTRE) if "helm.sh/hook" in item["metadata"].get("annotations", {})]
    early = {
        item["kind"]: item["metadata"]["annotations"]
        for item in objects
        if item["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    }
    assert early.keys() == {"ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Job"}
    assert all("hook-succeeded" in item["helm.sh/hook-delete-policy"] for item in early.values())
    last = int(early.pop("Job")["helm.sh/hook-weight"])
    assert all(int(item["helm.sh/hook-weight"]) < last for item in early.values())


def test_another_image_is_another_database_job() -> None:
    """A Job's pod cannot be changed; `kubectl apply` of a new rendering must not try."""
    names = set()
    for tag in ("0.1.0", "0.2.0"):
        objects = render(CENTRE, {"image": {"tag": tag}})
        names |= {item["metadata"]["name"] for item in objects if item["kind"] == "Job"}
    assert len([name for name in names if "-database-" in name]) == 2
