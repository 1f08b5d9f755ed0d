"""Faults of services and stores: what each breaks, for how long, and how it is mended."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from loadtests.chaos.mesh import REPLICAS, ChaosMesh
from services.embedded import processes

# How long the things last that do not end by themselves.
FREEZE_S: Final = 8.0
# Longer than Patroni's lock, so that another node must take over.
STORE_AWAY_S: Final = 32.0
SERVE_S: Final = 90.0


@dataclass
class Broken:
    """What a fault broke. mend: called once, `hold_s` seconds after it came. writer: the store that it stops."""

    target: str
    hold_s: float
    mend: Callable[[], None]
    writer: str = ""


@dataclass(frozen=True)
class Fault:
    """strike: break it. turn: 0, 1, 2 ... so that repetitions take different replicas."""

    name: str
    group: str
    strike: Callable[[ChaosMesh, int], Broken]


class Skipped(Exception):
    """This machine cannot do it; the text says why."""


def replica_of(service: str, turn: int) -> str:
    return f"{service}-{turn % REPLICAS[service] + 1}"


# ---- services


def _kill(service: str) -> Callable[[ChaosMesh, int], Broken]:
    def strike(mesh: ChaosMesh, turn: int) -> Broken:
        replica = replica_of(service, turn)
        mesh.supervisor.kill(replica)
        # A kubelet starts the container again within seconds.
        return Broken(replica, 2.0, lambda: mesh.start_replica(replica))

    return strike


def _freeze(service: str) -> Callable[[ChaosMesh, int], Broken]:
    def strike(mesh: ChaosMesh, turn: int) -> Broken:
        replica = replica_of(service, turn)
        pids = mesh.family(replica)
        processes.kill_all(pids, signal.SIGSTOP)
        return Broken(replica, FREEZE_S, lambda: processes.kill_all(pids, signal.SIGCONT))

    return strike


def _restart(service: str) -> Callable[[ChaosMesh, int], Broken]:
    def strike(mesh: ChaosMesh, turn: int) -> Broken:
        for number in range(1, REPLICAS[service] + 1):
            replica = f"{service}-{number}"
            mesh.supervisor.stop(replica)
            mesh.start_replica(replica)
            mesh.wait_serving([replica], SERVE_S)
        return Broken(service, 0.0, lambda: None)

    return strike


# ---- stores


def _postgres_kill(mesh: ChaosMesh, turn: int) -> Broken:
    node = mesh.postgres.primary()
    mesh.postgres.kill_server(node)
    return Broken(node, 0.0, lambda: mesh.postgres.wait_replaced(node, SERVE_S), writer="postgres")


def _postgres_node_kill(mesh: ChaosMesh, turn: int) -> Broken:
    node = mesh.postgres.primary()
    mesh.postgres.kill_node(node)
    return Broken(node, STORE_AWAY_S, lambda: mesh.postgres.start_node(node), writer="postgres")


def _postgres_freeze(mesh: ChaosMesh, turn: int) -> Broken:
    node = mesh.postgres.primary()
    pids = mesh.postgres.family(node)
    processes.kill_all(pids, signal.SIGSTOP)
    return Broken(node, STORE_AWAY_S, lambda: processes.kill_all(pids, signal.SIGCONT), writer="postgres")


def _redis_kill(mesh: ChaosMesh, turn: int) -> Broken:
    server = mesh.redis.master()
    mesh.redis.kill_server(server)
    return Broken(server, 6.0, lambda: mesh.redis.start_server(server), writer="redis")


def _redis_freeze(mesh: ChaosMesh, turn: int) -> Broken:
    server = mesh.redis.master()
    pids = mesh.redis.family(server)
    processes.kill_all(pids, signal.SIGSTOP)
    return Broken(server, FREEZE_S, lambda: processes.kill_all(pids, signal.SIGCONT), writer="redis")


SERVICE_FAULTS: Final = tuple(
    Fault(f"{name}-{service}", name, make(service))
    for name, make in (("kill", _kill), ("freeze", _freeze), ("restart", _restart))
    for service in REPLICAS
)
STORE_FAULTS: Final = (
    Fault("postgres-kill", "postgres", _postgres_kill),
    Fault("postgres-node-kill", "postgres", _postgres_node_kill),
    Fault("postgres-freeze", "postgres", _postgres_freeze),
    Fault("redis-kill", "redis", _redis_kill),
    Fault("redis-freeze", "redis", _redis_freeze),
)


def chosen(names: Iterable[str], all_faults: Sequence[Fault]) -> list[Fault]:
    """The faults of these names and groups; of none, all. Raises: KeyError for a name that is neither."""
    wanted = list(names)
    unknown = set(wanted) - {fault.name for fault in all_faults} - {fault.group for fault in all_faults}
    if unknown:
        raise KeyError(", ".join(sorted(unknown)))
    return [fault for fault in all_faults if not wanted or fault.name in wanted or fault.group in wanted]


def whole(mesh: ChaosMesh) -> bool:
    """Whether every replica serves and both stores have all their members in step."""
    with contextlib.suppress(OSError):
        return mesh.postgres.whole() and mesh.redis.whole() and all(mesh.serves(name) for name in mesh.replicas)
    return False


def wait_whole(mesh: ChaosMesh, timeout_s: float) -> float | None:
    """Seconds until the mesh is whole; None when it is not within the timeout."""
    began = time.monotonic()
    if processes.wait_until(lambda: whole(mesh), timeout_s, interval_s=0.3):
        return time.monotonic() - began
    return None
