"""The whole consortium for one run: replicated stores, replicated services, hospitals, and the network between them."""

import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loadtests.chaos.addresses import Addresses
from loadtests.chaos.names import DOMAIN
from loadtests.chaos.network import Control
from loadtests.chaos.postgres import PatroniCluster
from loadtests.chaos.priority import HOSPITAL_NICE, MEASURING_NICE, at_nice
from loadtests.chaos.programs import Programs
from loadtests.chaos.redis_cluster import RedisCluster
from services.bench.secure_sum import PLAN, SEED
from services.common.config import TlsConfig
from services.common.migrations import migrate
from services.common.tls import channel_credentials
from services.embedded import processes
from services.embedded.accounts import private_folder
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.guard import Guard
from services.embedded.processes import LOOPBACK, ProcessRecord, wait_until, write_private
from services.embedded.stack import CONSORTIUM, SINGLE_THREADED
from services.embedded.supervisor import ChildSpec, Supervisor
from services.secure_sum.roster import MemberKeys, found, save_roster_file, sign_roster
from services.transparency.checkpoint import generate_key, load_signing_key

REPLICAS: Final = {"audit": 2, "registry": 2, "aggregator": 3, "coordinator": 3}
CALLEES: Final = {
    "audit": ("registry",),
    "registry": ("audit",),
    "aggregator": ("registry",),
    "coordinator": ("registry", "aggregator"),
}
NETWORK: Final = "network"
# A round takes this and what its phases take: about ten a minute, which leaves the machine room for the load.
TRAINING_S: Final = 3.0
WITNESS_INTERVAL_S: Final = 10.0


class ChaosMesh:
    """Made in `folder`, which is emptied first. Everything in it ends with this process, or by `stop`."""

    def __init__(
        self, folder: Path, programs: Programs, hospitals: Sequence[str], guard: Guard, *, disks: bool = False
    ) -> None:
        """disks: PostgreSQL's servers get small disks of their own, which can be filled."""
        self.folder = folder.absolute()
        self.hospitals = tuple(hospitals)
        self.addresses = Addresses()
        self._programs = programs
        self._disks = disks
        self._guard = guard
        self.supervisor = Supervisor(self.folder / "run", guard=guard)
        for service, replicas in REPLICAS.items():
            self.addresses.add_service(service, replicas)
        parts = (programs, self.addresses, self.supervisor)
        self.postgres = PatroniCluster(self.folder / "postgres", *parts)
        self.redis = RedisCluster(self.folder / "redis", *parts, guard)
        self.network = Control(self.folder / "control.sock")
        self.replicas = tuple(f"{name}-{number}" for name, count in REPLICAS.items() for number in range(1, count + 1))

    # ---- life cycle

    def prepare(self) -> None:
        """Folders, identities and keys."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in ("", "config", "keys", "run", "truth"):
            private_folder(self.folder / folder)
        # The stores' accounts pass through here to folders of their own.
        self.folder.chmod(0o711)
        self.ca = create_ca(self.folder / "ca", CONSORTIUM)
        for service in REPLICAS:
            self.issue(service)
        generate_key(self.audit_key, f"{CONSORTIUM}/audit")
        write_private(self.audit_verifier, f"{load_signing_key(self.audit_key).verifier}\n")
        keys = [MemberKeys.generate(name) for name in self.hospitals]
        for member in keys:
            member.save(private_folder(self.hospital_folder(member.hospital_id)) / "member.keys")
        statement = found(CONSORTIUM, [member.public() for member in keys])
        save_roster_file(
            self.roster_file, statement, {member.hospital_id: sign_roster(statement, member) for member in keys}
        )
        self.postgres.prepare(disks=self._disks)

    def start(self) -> None:
        """Start everything but the hospitals. Raises: FedmeshError naming what did not start."""
        self._start_network()
        self.postgres.start()
        self.redis.start()
        from services.audit.store import MIGRATIONS as AUDIT_MIGRATIONS
        from services.registry.store import MIGRATIONS as REGISTRY_MIGRATIONS

        migrate(self.postgres.config("audit_migrator"), "audit", AUDIT_MIGRATIONS)
        migrate(self.postgres.config("registry_migrator"), "registry", REGISTRY_MIGRATIONS)
        for replica in self.replicas:
            self.start_replica(replica)
        self.supervisor.wait_ready(self.replicas, 180)

    def stop(self) -> None:
        """End everything. Frozen processes are continued first: they could not end otherwise."""
        for name in self.replicas:
            processes.kill_all(self.family(name), signal.SIGCONT)
        self.supervisor.stop_all()
        self.redis.stop()
        self.postgres.stop()

    def _start_network(self) -> None:
        config = {
            "links": list(self.addresses.links.values()),
            "names": self.addresses.names,
            "names_port": self.addresses.names_port,
            "control": str(self.folder / "control.sock"),
        }
        path = self.folder / "config" / "network.json"
        write_private(path, json.dumps(config))
        argv = at_nice(MEASURING_NICE, [sys.executable, "-m", "loadtests.chaos.network", "--config", str(path)])
        ready = (self.folder / "control.sock").exists
        self.supervisor.start(ChildSpec(name=NETWORK, argv=argv, ready=ready, rank=-2))
        self.supervisor.wait_ready([NETWORK], 30)

    # ---- identities

    def issue(self, service: str) -> TlsConfig:
        """Issue a service's certificate, anew if there is one. All replicas of a service share it."""
        return self.ca.issue_service(service, dns=(f"{service}.{DOMAIN}", "localhost"))

    def tls(self, stem: str) -> TlsConfig:
        """The files of an issued certificate, by the stem of their names."""
        folder = self.folder / "ca"
        return TlsConfig(ca=folder / "ca.pem", certificate=folder / f"{stem}.pem", key=folder / f"{stem}.key")

    ca: CertificateAuthority

    @property
    def faketime(self) -> Path | None:
        """The library that gives a process another clock; None where it is missing."""
        return self._programs.faketime

    @property
    def audit_key(self) -> Path:
        return self.folder / "keys" / "audit.key"

    @property
    def audit_verifier(self) -> Path:
        return self.folder / "keys" / "audit.vkey"

    @property
    def roster_file(self) -> Path:
        return self.folder / "keys" / "roster.json"

    # ---- services

    def start_replica(self, replica: str, env: dict[str, str] | None = None) -> None:
        """Start a replica of a service. env: added to its environment."""
        service = replica.rsplit("-", 1)[0]
        path = self.folder / "config" / f"{replica}.yaml"
        write_private(path, yaml.safe_dump(self._service_config(service, replica)))
        argv = [sys.executable, "-m", f"services.{service}", "--config", str(path)]
        environment = {**SINGLE_THREADED, **(env or {})}
        self.supervisor.start(
            ChildSpec(name=replica, argv=argv, env=environment, ready=lambda: self.serves(replica), rank=1)
        )

    def serves(self, replica: str) -> bool:
        """Whether a replica says SERVING at its own port."""
        target = f"{LOOPBACK}:{self.addresses.own(replica)}"
        with grpc.secure_channel(target, channel_credentials(self.tls(replica.rsplit("-", 1)[0]))) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_serving(self, replicas: Sequence[str], timeout_s: float) -> bool:
        return wait_until(lambda: all(self.serves(name) for name in replicas), timeout_s, interval_s=0.2)

    def family(self, name: str) -> list[int]:
        """Pids of a supervised part, its descendants included."""
        for child in self.supervisor.status():
            if child.name == name and child.running and (record := ProcessRecord.of(child.pid)) is not None:
                return record.family()
        return []

    def _service_config(self, service: str, replica: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "server": {
                "listen": f"{LOOPBACK}:{self.addresses.own(replica)}",
                "tls": self.tls(service).model_dump(mode="json"),
                "drain_s": 5.0,
            },
            "telemetry": {"log_level": "info"},
        }
        if service in ("audit", "registry"):
            config["postgres"] = self.postgres.config(f"{service}_service").model_dump(mode="json")
        else:
            config["redis"] = self.redis.config(service).model_dump(mode="json")
        if service == "audit":
            config |= {"signing_key": str(self.audit_key), "witness": {"period_s": 2 * WITNESS_INTERVAL_S}}
        if service == "coordinator":
            # As many attempts as it takes: what is asked of a run is that rounds go on.
            config["rounds"] = {"max_attempts": 1000}
        for callee in CALLEES.get(service, ()):
            config[callee] = {"target": self.addresses.target(callee)}
        return config

    # ---- hospitals

    def hospital_folder(self, hospital_id: str) -> Path:
        return self.folder / "hospitals" / hospital_id

    def vector_file(self, hospital_id: str) -> Path:
        """What the hospital sums follows from this file; its sums are noted beside it."""
        return self.folder / "vectors" / hospital_id / "vector.json"

    def start_hospitals(self) -> None:
        """Start the hospital nodes: real ones, whose training makes integers from a seed."""
        for number, name in enumerate(self.hospitals):
            vector = self.vector_file(name)
            vector.parent.mkdir(parents=True)
            facts = {"seed": SEED, "hospital": number, "train_s": {PLAN: TRAINING_S}}
            vector.write_text(json.dumps(facts), encoding="utf-8")
            path = self.folder / "config" / f"{name}.yaml"
            write_private(path, yaml.safe_dump(self._hospital_config(name)))
            argv = at_nice(HOSPITAL_NICE, [sys.executable, "-m", "services.bench.hospital", "--config", str(path)])
            self.supervisor.start(ChildSpec(name=name, argv=argv, env=SINGLE_THREADED, rank=2))

    def _hospital_config(self, name: str) -> dict[str, Any]:
        return {
            "hospital_id": name,
            "tls": self.ca.issue_hospital(name).model_dump(mode="json"),
            "data_dir": str(self.hospital_folder(name)),
            "member_keys": str(self.hospital_folder(name) / "member.keys"),
            "roster": str(self.roster_file),
            "population": name,
            "data": {"file": str(self.vector_file(name))},
            "privacy": {"allow_without_privacy": True},
            "limits": {"max_rounds": 10_000},
            "telemetry": {"log_level": "info"},
            **{part: {"target": self.addresses.target(part)} for part in ("registry", "coordinator", "aggregator")},
            "witness": {
                "audit": {"target": self.addresses.target("audit")},
                "log_key": str(self.audit_verifier),
                "interval_s": WITNESS_INTERVAL_S,
                "spot_checks": 1,
            },
        }
