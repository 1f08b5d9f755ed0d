"""Pods of the centre's chart as processes of this machine: mounts become folders, host names become loopback ports."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.config import load_config
from services.deployment.config import SecretsConfig
from services.deployment.secrets import make_secrets
from services.embedded.accounts import store_account
from services.embedded.postgres import EmbeddedPostgres
from services.embedded.processes import free_port
from services.embedded.redis import find_program
from tests.support.charts import MemorySecrets, Object, PodFolder, named

SERVICES = ("audit", "registry", "aggregator", "coordinator")
SERVING = health_pb2.HealthCheckResponse.SERVING


class Cluster:
    """What runs of one release, and where."""

    def __init__(self, folder: Path, objects: list[Object]) -> None:
        self.folder = folder
        self.objects = objects
        self.secrets = MemorySecrets()
        names = [
            *SERVICES,
            "postgres",
            "valkey",
            *(f"{name}-{part}" for name in SERVICES for part in ("probe", "page", "ops", "enrolment")),
        ]
        self.ports = {name: free_port() for name in names}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def addresses(self, own: str = "") -> dict[str, str]:
        """This machine's addresses in place of the cluster's, and of the listeners of a service."""
        end = ".mesh.svc.cluster.local"
        known = {f"dns:///fedmesh-{name}{end}:7443": f"localhost:{self.ports[name]}" for name in SERVICES}
        known[f"host=fedmesh-postgres{end} port=5432"] = f"host=127.0.0.1 port={self.ports['postgres']}"
        known[f"fedmesh-valkey{end}:6379"] = f"127.0.0.1:{self.ports['valkey']}"
        if own:
            known["0.0.0.0:7443"] = f"127.0.0.1:{self.ports[own]}"
            known["0.0.0.0:7444"] = f"127.0.0.1:{self.ports[f'{own}-probe']}"
            known["0.0.0.0:7445"] = f"127.0.0.1:{self.ports[f'{own}-enrolment']}"
            known["0.0.0.0:9464"] = f"127.0.0.1:{self.ports[f'{own}-page']}"
            known["127.0.0.1:7190"] = f"127.0.0.1:{self.ports[f'{own}-ops']}"
        return known

    def make_secrets(self) -> list[str]:
        """The Job of secrets, but for the API server."""
        file = self.folder / "secrets.yaml"
        file.write_text(named(self.objects, "ConfigMap", "fedmesh-secrets")["data"]["secrets.yaml"])
        return list(make_secrets(self.secrets, load_config(SecretsConfig, file)))

    def pod(self, spec: Object, container: Object, own: str = "", folder: str = "") -> PodFolder:
        """A container's files, laid out in a folder of its own."""
        laid = PodFolder(
            self.folder / (folder or container["name"]), self.objects, self.secrets.content, self.addresses(own)
        )
        laid.mount(spec, container)
        return laid

    def run(self, spec: Object, container: Object) -> str:
        """Run a container to its end; what it printed."""
        folder = self.pod(spec, container)
        argv = [sys.executable, *(folder.rewrite(part) for part in container["command"][1:])]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def start(self, name: str, argv: list[str], **options: Any) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(argv, stdout=log, stderr=log, **options)

    def done(self, name: str) -> bool:
        """Whether a process has ended."""
        return self.running[name].poll() is not None

    def store_command(
        self, name: str, pod: str = "", settings: dict[str, str] | None = None
    ) -> tuple[list[str], dict[str, Any]]:
        """How to run the script of a store: its arguments but the last, and options of the process.

        pod: name of one of several pods. settings: environment in place of the container's.
        """
        spec = named(self.objects, "StatefulSet", f"fedmesh-{name}")["spec"]["template"]["spec"]
        container = spec["containers"][0]
        root = self.pod(spec, container, folder=pod or name).folder
        account = store_account()
        for path in (root, *root.rglob("*")):
            os.chown(path, account.uid, account.gid)
        postgres = EmbeddedPostgres(self.folder / "programs")._programs()
        redis = self.folder / "bin"
        if not redis.exists():
            redis.mkdir()
            # Only these: a Redis of the system lies among everything else in /usr/bin.
            for program in find_program().parent.glob("redis-*"):
                shutil.copy(program, redis)
        environment = {item["name"]: item["value"] for item in container["env"] if "value" in item} | {
            "PATH": f"{postgres}:{redis}:/usr/bin:/bin",
            "PORT": str(self.ports[name]),
            "FEDMESH_ETC": f"{root}/etc/fedmesh",
            "FEDMESH_DATA": f"{root}/var/lib/fedmesh",
            "FEDMESH_RUN": f"{root}/run",
        }
        environment |= settings or {}
        script = container["command"][1].replace("/etc/fedmesh", f"{root}/etc/fedmesh")
        return ["/bin/sh", script], {"env": environment, "cwd": "/", **account.popen_arguments()}

    def start_store(self, name: str) -> None:
        argv, options = self.store_command(name)
        self.start(name, [*argv, "run"], **options)
        wait(lambda: self.done(name) or not subprocess.run([*argv, "ready"], check=False, **options).returncode)
        assert not self.done(name), (self.folder / f"{name}.log").read_text()

    def start_service(self, name: str) -> None:
        spec = named(self.objects, "Deployment", f"fedmesh-{name}")["spec"]["template"]["spec"]
        for container in spec.get("initContainers", []):
            assert "up to date" in self.run(spec, container)
        (container,) = spec["containers"]
        folder = self.pod(spec, container, name)
        self.start(name, [sys.executable, *(folder.rewrite(part) for part in container["command"][1:])])
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            wait(partial(self.serves, name, container[probe]["grpc"]["service"]))

    def health(self, name: str, asked: str) -> int | None:
        """What the plaintext health port answers about a name; None when it does not."""
        with grpc.insecure_channel(f"127.0.0.1:{self.ports[f'{name}-probe']}") as channel:
            try:
                request = health_pb2.HealthCheckRequest(service=asked)
                return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=2).status)
            except grpc.RpcError:
                return None

    def serves(self, name: str, asked: str) -> bool:
        return bool(self.health(name, asked) == SERVING)

    def stop(self) -> None:
        for child in self.running.values():
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        for child in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
            child.kill()
            child.wait()


def wait(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    ending = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ending, "the condition never held"
        time.sleep(0.1)


@contextlib.contextmanager
def played(objects: list[Object]) -> Iterator[Cluster]:
    """A cluster of these objects; what was started is stopped at the end."""
    # A short path, for Unix sockets, that the account of the stores can enter.
    folder = Path(tempfile.mkdtemp(prefix="fm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder, objects)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
