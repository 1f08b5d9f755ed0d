"""A whole consortium on one machine: PostgreSQL, Redis, a local CA, the four services, and hospitals beside them.

Everything lives in one folder. A stack with a guard ends with the process that started it (`fedmesh demo`); one without
stays until it is stopped (`fedmesh up`). Starting is idempotent and keeps all data.
"""

import shutil
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.identity import Kind
from services.common.migrations import migrate
from services.common.tls import channel_credentials, load_tls
from services.embedded import issuer, processes
from services.embedded.accounts import private_folder
from services.embedded.ca import CA_CERTIFICATE, CA_KEY, create_ca, load_ca
from services.embedded.guard import Guard
from services.embedded.postgres import EmbeddedPostgres
from services.embedded.redis import EmbeddedRedis
from services.embedded.supervisor import ChildSpec, Supervisor
from services.secure_sum.roster import MemberKeys, Roster, found, load_roster_file, save_roster_file, sign_roster

# Started in this order, stopped together: each only waits for what it calls.
SERVICES: Final = ("audit", "registry", "aggregator", "coordinator")
# The registry's second listener, behind the ports of the services, and the issuer of a stack in which people sign in.
ENROLMENT: Final = "enrolment"
ISSUER: Final = "issuer"
CONSORTIUM: Final = "consortium.local"
COMPILER: Final = "plan-compiler"
# A stack on one machine often lives for a minute only, and is to have witnessed rounds by then.
WITNESS_INTERVAL_S: Final = 5.0
# Fifteen hospital processes share a few cores: libraries that start a thread a core would only get in each other's way.
SINGLE_THREADED: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "CUDA_VISIBLE_DEVICES": "-1",
    "GRPC_VERBOSITY": "ERROR",
    "MALLOC_ARENA_MAX": "2",
}


@dataclass(frozen=True)
class Part:
    """One process of a stack as seen now; `address` is where it listens."""

    name: str
    running: bool
    pid: int | None
    address: str
    log: Path


class Stack:
    """The stack in a folder. Makes what is missing; see the module for what lives how long."""

    def __init__(
        self,
        folder: Path,
        *,
        guard: Guard | None = None,
        base_port: int | None = None,
        settings: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        traces: bool = True,
    ) -> None:
        """folder: the stack's own, made by `start`. guard: ends everything with this process. base_port: services
        listen on loopback ports base_port to base_port + 5; None takes free ones at every start. settings: by service
        and section of its configuration, what differs from the defaults. traces: every process writes its spans to a
        file, which none does by default.
        """
        self.folder = folder.absolute()
        self._base_port = base_port
        self._guard = guard
        self._settings = settings or {}
        self._traces = traces
        self.postgres = EmbeddedPostgres(self.folder / "postgres", guard=guard)
        self.redis = EmbeddedRedis(self.folder / "redis", guard=guard)
        self.supervisor = Supervisor(self.folder / "run", guard=guard)

    # ---- life cycle

    def start(self, services: Sequence[str] = SERVICES, timeout_s: float = 180.0) -> None:
        """Start the stores and some of the services, and wait until they serve. Running parts are left alone.

        timeout_s: patience with a slow machine; a service that ends is noticed at once.

        Raises: FedmeshError: CONFIG_INVALID, STORE_FULL, STORE_UNAVAILABLE or SERVICE_UNAVAILABLE, quoting the log.
        """
        private_folder(self.folder)
        self._make_identities()
        self.postgres.start()
        if {"aggregator", "coordinator"} & set(services):
            self.redis.start()
        self._migrate()
        running = {status.name for status in self.supervisor.status() if status.running}
        self._assign_ports(running)
        starting = [name for name in SERVICES if name in services and name not in running]
        if self.signs_in and ISSUER not in running:
            # First: without its keys nobody is let in.
            self.supervisor.start(self._issuer_spec())
            self.supervisor.wait_ready([ISSUER], timeout_s)
        for name in starting:
            self._write_config(name, self._service_config(name))
            self.supervisor.start(self._spec(name))
        self.supervisor.wait_ready(starting, timeout_s)

    def require_sign_in(self) -> Path:
        """People sign in to this stack from its next start on, at an issuer of its own. The file of its users.

        Raises: FedmeshError(WRONG_STATE) while services run that let operators in without.
        """
        running = [status.name for status in self.supervisor.status() if status.running and status.name in SERVICES]
        if running and not self.signs_in:
            raise FedmeshError(Code.WRONG_STATE, f"{', '.join(running)} run without sign-in: `fedmesh down` first")
        private_folder(self.folder)
        return issuer.prepare(self.folder)

    @property
    def signs_in(self) -> bool:
        """Whether operators sign in, because this stack has an issuer."""
        return (self.folder / issuer.FOLDER / issuer.USERS).exists()

    def stop(self) -> None:
        """Stop everything in good order: hospitals, services, stores. Data stays."""
        self.supervisor.stop_all()
        self.redis.stop()
        self.postgres.stop()

    def destroy(self) -> None:
        """Stop everything and delete the folder."""
        self.stop()
        self.redis.destroy()
        self.postgres.destroy()
        shutil.rmtree(self.folder, ignore_errors=True)

    def exists(self) -> bool:
        """True when a stack was made in this folder."""
        return (self.folder / "ca").is_dir() and (self.folder / "config").is_dir()

    def status(self) -> list[Part]:
        """Stores, services and hospitals, running or not."""
        parts = []
        for store in (self.postgres, self.redis):
            seen = store.status()
            address = str(seen.socket_dir) if seen.socket_dir else ""
            parts.append(Part(store.name, seen.running, seen.pid, address, seen.log))
        ports = self._ports()
        children = {status.name: status for status in self.supervisor.status()}
        for name in (*SERVICES, *sorted(set(children) - set(SERVICES))):
            child = children.get(name)
            address = f"127.0.0.1:{ports[name]}" if name in ports else ""
            parts.append(
                Part(
                    name,
                    child is not None and child.running,
                    child.pid if child is not None and child.running else None,
                    address,
                    self.supervisor.log(name),
                )
            )
        return parts

    def pids(self) -> list[int]:
        """The pids of all running parts, stores included."""
        return [part.pid for part in self.status() if part.pid is not None]

    # ---- identities and addresses

    @property
    def ca_file(self) -> Path:
        """The certificate of this stack's authority."""
        return self.folder / "ca" / CA_CERTIFICATE

    def target(self, service: str) -> str:
        """The gRPC target of a service; `enrolment` is the registry's listener for hospitals without a certificate.

        Raises: FedmeshError(SERVICE_UNAVAILABLE) when the stack was never started.
        """
        ports = self._ports()
        if service not in ports:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"no {service} in {self.folder}: run `fedmesh up` first")
        return f"127.0.0.1:{ports[service]}"

    def operator(self, name: str) -> TlsConfig:
        """The certificate of a person at the consortium, issued when missing."""
        return self._issued(Kind.OPERATOR, name)

    def hospital_tls(self, hospital_id: str) -> TlsConfig:
        """The certificate of a hospital, issued when missing."""
        return self._issued(Kind.HOSPITAL, hospital_id)

    def service_tls(self, name: str) -> TlsConfig:
        """The certificate of a service, issued when missing."""
        return self._issued(Kind.SERVICE, name)

    @property
    def registry_key(self) -> Path:
        """The registry's signing key, for statements about model versions."""
        return self.folder / "keys" / "registry.key"

    @property
    def registry_verifier(self) -> Path:
        """The public half of `registry_key`."""
        return self.folder / "keys" / "registry.vkey"

    @property
    def audit_key(self) -> Path:
        """The audit log's private signing key."""
        return self.folder / "keys" / "audit.key"

    @property
    def audit_verifier(self) -> Path:
        """The audit log's public key, in signed-note form."""
        return self.folder / "keys" / "audit.vkey"

    # ---- the roster

    @property
    def roster_file(self) -> Path:
        """The founding roster, signed by all hospitals of this stack."""
        return self.folder / "keys" / "roster.json"

    def member_keys(self, hospital_id: str) -> Path:
        """A hospital's own signing and sealing keys. They lie here because all hospitals are on this machine."""
        return self.folder / "hospitals" / hospital_id / "member.keys"

    def found(self, hospital_ids: Iterable[str]) -> Roster:
        """Make the keys of the hospitals and their founding roster, as they would do among themselves; once.

        Raises: FedmeshError(CONFIG_INVALID) when this stack was founded by other hospitals.
        """
        wanted = sorted(hospital_ids)
        if self.roster_file.exists():
            roster = load_roster_file(self.roster_file)
            if list(roster.ids) != wanted:
                raise FedmeshError(
                    Code.CONFIG_INVALID,
                    f"the stack in {self.folder} was founded by {', '.join(roster.ids)}: use another --dir",
                )
            return roster
        members = [self._made_keys(name) for name in wanted]
        statement = found(CONSORTIUM, [keys.public() for keys in members])
        save_roster_file(
            self.roster_file, statement, {keys.hospital_id: sign_roster(statement, keys) for keys in members}
        )
        return load_roster_file(self.roster_file)

    def _made_keys(self, hospital_id: str) -> MemberKeys:
        path = self.member_keys(hospital_id)
        private_folder(path.parent)
        if not path.exists():
            MemberKeys.generate(hospital_id).save(path)
        return MemberKeys.load(path)

    # ---- hospitals

    def start_hospitals(self, configs: Iterable[tuple[str, dict[str, Any]]], module: str = "hospital_node") -> None:
        """Start hospital nodes: (hospital id, the settings that differ: `data`, `population`, `privacy`).

        The stack must have been founded by them. module: `python -m services.<module>`, a hospital node.
        """
        for hospital_id, settings in configs:
            self._write_config(hospital_id, self._hospital_config(hospital_id, settings))
            self.supervisor.start(self._spec(hospital_id, module=module, rank=2))

    def precompile(self, manifest: bytes) -> None:
        """Begin to compile a plan (canonical JSON) into the cache that the hospitals of this stack share.

        A hospital that needs it before it is done waits for it; nobody depends on its success.
        """
        private_folder(self.folder)
        plan = self.folder / "plan.json"
        processes.write_private(plan, manifest.decode())
        command = "from services.cli.entry import main; main()"
        argv = [sys.executable, "-c", command, "plan", "compile", str(plan), "--cache", str(self._compile_cache)]
        self.supervisor.start(ChildSpec(name=COMPILER, argv=argv, env=SINGLE_THREADED, rank=2))

    @property
    def _compile_cache(self) -> Path:
        return self.folder / "compiled"

    def hospital_data(self, hospital_id: str) -> Path:
        """The data folder of a hospital's node: ledger, states, keys of epochs."""
        return self.folder / "hospitals" / hospital_id

    def _hospital_config(self, hospital_id: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "hospital_id": hospital_id,
            "tls": _tls_section(self.hospital_tls(hospital_id)),
            "data_dir": str(self.hospital_data(hospital_id)),
            "member_keys": str(self.member_keys(hospital_id)),
            "roster": str(self.roster_file),
            "compile_cache": str(self._compile_cache),
            "telemetry": self._telemetry(hospital_id),
            "registry_key": str(self.registry_verifier),
            **{name: {"target": self.target(name)} for name in ("registry", "coordinator", "aggregator")},
            "witness": {
                "audit": {"target": self.target("audit")},
                "log_key": str(self.audit_verifier),
                "interval_s": WITNESS_INTERVAL_S,
                # Fifteen witnesses share two cores with what they witness.
                "spot_checks": 1,
            },
            **settings,
        }

    # ---- making

    def _make_identities(self) -> None:
        from services.transparency.checkpoint import generate_key, load_signing_key

        for name in ("keys", "config", "refusals"):
            private_folder(self.folder / name)
        for name in SERVICES:
            self._issued(Kind.SERVICE, name)
        for key, verifier, name in (
            (self.audit_key, self.audit_verifier, "audit"),
            (self.registry_key, self.registry_verifier, "registry"),
        ):
            if not key.exists():
                generate_key(key, f"{CONSORTIUM}/{name}")
            if not verifier.exists():
                # From the file, and not only when that is made: a start that a full disk cut short goes on here.
                processes.write_private(verifier, f"{load_signing_key(key).verifier}\n")

    def _migrate(self) -> None:
        from services.audit.store import MIGRATIONS as AUDIT_MIGRATIONS
        from services.registry.store import MIGRATIONS as REGISTRY_MIGRATIONS

        migrate(self.postgres.config("audit_migrator"), "audit", AUDIT_MIGRATIONS)
        migrate(self.postgres.config("registry_migrator"), "registry", REGISTRY_MIGRATIONS)

    def _ports(self) -> dict[str, int]:
        path = self.folder / "config" / "ports.yaml"
        if not path.exists():
            return {}
        return {str(name): int(port) for name, port in yaml.safe_load(path.read_text(encoding="utf-8")).items()}

    def _assign_ports(self, running: set[str]) -> None:
        ports = self._ports() if running else {}
        for offset, name in enumerate(SERVICES):
            if name in running:
                continue
            ports[name] = self._base_port + offset if self._base_port is not None else processes.free_port()
            processes.require_free_port(ports[name], name)
        if "registry" not in running or ENROLMENT not in ports:
            base = self._base_port
            ports[ENROLMENT] = base + len(SERVICES) if base is not None else processes.free_port()
            processes.require_free_port(ports[ENROLMENT], ENROLMENT)
        if self.signs_in and ISSUER not in running:
            base = self._base_port
            ports[ISSUER] = base + len(SERVICES) + 1 if base is not None else processes.free_port()
            processes.require_free_port(ports[ISSUER], ISSUER)
        processes.write_private(self.folder / "config" / "ports.yaml", yaml.safe_dump(ports))

    def _service_config(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "server": {
                "listen": self.target(name),
                "tls": _tls_section(self._issued(Kind.SERVICE, name)),
                "drain_s": 5.0,
                "refusals": {"directory": str(self.folder / "refusals" / name)},
            },
            "telemetry": self._telemetry(name),
        }
        if self.signs_in:
            config["server"]["people"] = issuer.people_section(f"http://{self.target(ISSUER)}")
        if name in ("audit", "registry"):
            store = self.postgres.config(f"{name}_service")
            config["postgres"] = {"dsn": store.dsn, "password_file": str(store.password_file)}
        else:
            cache = self.redis.config(name)
            config["redis"] = {"url": cache.url, "username": name, "password_file": str(cache.password_file)}
        if name == "registry":
            config["enrolment"] = {
                "listen": self.target(ENROLMENT),
                "ca_certificate": str(self.ca_file),
                "ca_key": str(self.folder / "ca" / CA_KEY),
            }
        if name == "audit":
            config["signing_key"] = str(self.audit_key)
            config["witness"] = {"period_s": 2 * WITNESS_INTERVAL_S}
        if name == "registry":
            config["signing_key"] = str(self.registry_key)
        for callee in {
            "registry": ["audit"],
            "audit": ["registry"],
            "aggregator": ["registry"],
            "coordinator": ["registry", "aggregator"],
        }.get(name, []):
            config[callee] = {"target": self.target(callee)}
        for section, values in self._settings.get(name, {}).items():
            config[section] = {**config.get(section, {}), **values}
        return config

    def _telemetry(self, name: str) -> dict[str, Any]:
        telemetry = {"log_level": "info"}
        if self._traces:
            folder = self.folder / "traces"
            private_folder(folder)
            telemetry["trace_file"] = str(folder / f"{name}.jsonl")
        return telemetry

    def _write_config(self, name: str, config: dict[str, Any]) -> None:
        processes.write_private(self.folder / "config" / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False))

    def _spec(self, name: str, *, module: str | None = None, rank: int = 1) -> ChildSpec:
        return ChildSpec(
            name=name,
            argv=[
                sys.executable,
                "-m",
                f"services.{module or name}",
                "--config",
                str(self.folder / "config" / f"{name}.yaml"),
            ],
            env=SINGLE_THREADED,
            ready=(lambda: self._serves(name)) if module is None else None,
            rank=rank,
        )

    def _issuer_spec(self) -> ChildSpec:
        argv = [sys.executable, "-m", "services.embedded.issuer", "--dir", str(self.folder), "--listen"]
        # Ended after the services, which ask it for its keys.
        return ChildSpec(
            name=ISSUER, argv=[*argv, self.target(ISSUER)], ready=lambda: _listens(self.target(ISSUER)), rank=0
        )

    def _serves(self, name: str) -> bool:
        target = self.target(name)
        if not _listens(target):
            return False
        with grpc.secure_channel(target, channel_credentials(self.operator("operator"))) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _issued(self, kind: Kind, name: str) -> TlsConfig:
        folder = self.folder / "ca"
        stem = name if kind is Kind.SERVICE else f"{kind.value}-{name}"
        known = TlsConfig(ca=folder / "ca.pem", certificate=folder / f"{stem}.pem", key=folder / f"{stem}.key")
        if known.certificate.exists():
            try:
                load_tls(known)
            except FedmeshError:
                pass  # expired or half-written: issue it anew
            else:
                return known
        ca = load_ca(folder) if folder.exists() else create_ca(folder, CONSORTIUM)
        issue = {
            Kind.OPERATOR: ca.issue_operator,
            Kind.HOSPITAL: ca.issue_hospital,
            Kind.SERVICE: ca.issue_service,
        }
        return issue[kind](name)


def _listens(target: str) -> bool:
    host, port = target.rsplit(":", 1)
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((host, int(port))) == 0


def _tls_section(tls: TlsConfig) -> dict[str, str]:
    return {"ca": str(tls.ca), "certificate": str(tls.certificate), "key": str(tls.key)}
