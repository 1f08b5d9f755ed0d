"""Faults of the network, of certificates, disks and clocks, and faults in pairs."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from loadtests.chaos.faults import FREEZE_S, SERVE_S, SERVICE_FAULTS, STORE_AWAY_S, STORE_FAULTS, Broken, Fault, Skipped
from loadtests.chaos.faults import replica_of as replica
from loadtests.chaos.mesh import REPLICAS, ChaosMesh
from loadtests.chaos.postgres import NODES
from loadtests.chaos.redis_cluster import SERVERS
from loadtests.chaos.rules import Rule

NETWORK_S: Final = 10.0
# 200 ms a round trip.
DELAY_S: Final = 0.1
# Linux repeats a lost segment after at least 200 ms on top of the round trip's time.
STALL_S: Final = 0.3
STALL_SHARE: Final = 0.01
# A client finds out by its keepalive: it pings every 20 s and waits 10 s.
HALF_OPEN_S: Final = 35.0
# A replica that is behind by so much has not got what was committed last, were commits not to wait for it.
LAG_S: Final = 0.15
LAGGING_S: Final = 3.0
SKEW_S: Final = 60
SKEWED_S: Final = 15.0
ROTATION_S: Final = 15.0
DISK_FULL_S: Final = 12.0


def _isolate(mesh: ChaosMesh, pids: list[int], *names: str) -> Callable[[], None]:
    """Cut processes off from everything behind a proxy, and everybody off from the proxies of these names."""
    rules = [Rule(cut=True, sources=tuple(pids)), *(Rule(cut=True, target=name) for name in names)]
    mesh.network.set_rules(rules)
    return lambda: mesh.network.set_rules([])


def _partition(service: str) -> Callable[[ChaosMesh, int], Broken]:
    def strike(mesh: ChaosMesh, turn: int) -> Broken:
        name = replica(service, turn)
        return Broken(name, NETWORK_S, _isolate(mesh, mesh.family(name), name))

    return strike


def _postgres_partition(mesh: ChaosMesh, turn: int) -> Broken:
    node = mesh.postgres.primary()
    mend = _isolate(mesh, mesh.postgres.family(node), node, f"{node}-api")
    return Broken(node, STORE_AWAY_S, mend, writer="postgres")


def _redis_partition(mesh: ChaosMesh, turn: int) -> Broken:
    server = mesh.redis.master()
    return Broken(server, FREEZE_S, _isolate(mesh, mesh.redis.family(server), server), writer="redis")


def _lose(mesh: ChaosMesh, name: str, followers: tuple[int, ...], kill: Callable[[str], None]) -> None:
    """Kill a server while its followers are behind, and lose what is on its way to them."""
    mesh.network.set_rules([Rule(target=name, sources=followers, delay_s=LAG_S)])
    time.sleep(LAGGING_S)
    # From here on nothing reaches them that they have not got; clients are still answered.
    mesh.network.set_rules([Rule(target=name, sources=followers, cut=True)])
    kill(name)
    mesh.network.act("drop", name)
    mesh.network.set_rules([])


def _postgres_lag_kill(mesh: ChaosMesh, turn: int) -> Broken:
    node = mesh.postgres.primary()
    standbys = tuple(pid for name in NODES if name != node for pid in mesh.postgres.family(name))
    _lose(mesh, node, standbys, mesh.postgres.kill_server)
    return Broken(node, 0.0, lambda: mesh.postgres.wait_replaced(node, SERVE_S), writer="postgres")


def _redis_lag_kill(mesh: ChaosMesh, turn: int) -> Broken:
    server = mesh.redis.master()
    replicas = tuple(pid for name in SERVERS if name != server for pid in mesh.redis.family(name))
    _lose(mesh, server, replicas, mesh.redis.kill_server)
    return Broken(server, 6.0, lambda: mesh.redis.start_server(server), writer="redis")


def _latency(mesh: ChaosMesh, turn: int) -> Broken:
    mesh.network.set_rules([Rule(target=name, delay_s=DELAY_S) for name in mesh.replicas])
    return Broken("all services", NETWORK_S, lambda: mesh.network.set_rules([]))


def _stalls(mesh: ChaosMesh, turn: int) -> Broken:
    mesh.network.set_rules(
        [Rule(target=name, delay_s=DELAY_S, stall_share=STALL_SHARE, stall_s=STALL_S) for name in mesh.replicas]
    )
    return Broken("all services", NETWORK_S, lambda: mesh.network.set_rules([]))


def _resets(mesh: ChaosMesh, turn: int) -> Broken:
    """Every two seconds one connection in three is reset."""
    count = 0
    for _ in range(int(NETWORK_S / 2)):
        count += sum(mesh.network.act("reset", name, 1 / 3) for name in mesh.replicas)
        time.sleep(2.0)
    return Broken(f"{count} connections", 0.0, lambda: None)


def _half_open(mesh: ChaosMesh, turn: int) -> Broken:
    count = sum(mesh.network.act("half_open", name, 1 / 10) for name in mesh.replicas)
    return Broken(f"{count} connections", HALF_OPEN_S, lambda: None)


def _rotation(mesh: ChaosMesh, turn: int) -> Broken:
    """New certificates and keys for every service, hospital and operator."""
    for service in REPLICAS:
        mesh.issue(service)
    for file in sorted((mesh.folder / "ca").glob("*-*.pem")):
        kind, name = file.stem.split("-", 1)
        (mesh.ca.issue_hospital if kind == "hospital" else mesh.ca.issue_operator)(name)
    return Broken("all certificates", ROTATION_S, lambda: None)


def _disk_full(mesh: ChaosMesh, turn: int) -> Broken:
    node = mesh.postgres.primary()
    home = mesh.postgres.folder / node
    if not home.is_mount():
        raise Skipped("a disk of its own for each PostgreSQL takes root and loop devices")
    ballast = home / "ballast"
    _fill(ballast)
    return Broken(node, DISK_FULL_S, lambda: ballast.unlink(), writer="postgres")


def _fill(ballast: Path) -> None:
    """Write until nothing fits any more; to the last block, in ever smaller pieces."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
        os.fsync(file.fileno())


def _skew(mesh: ChaosMesh, turn: int) -> Broken:
    """One replica's clock is ahead of the others'."""
    if mesh.faketime is None:
        raise Skipped("libfaketime is missing: install Debian's faketime")
    service = list(REPLICAS)[turn % len(REPLICAS)]
    name = replica(service, turn)
    env = {"LD_PRELOAD": str(mesh.faketime), "FAKETIME": f"+{SKEW_S}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    mesh.supervisor.stop(name)
    mesh.start_replica(name, env)
    mesh.wait_serving([name], SERVE_S)

    def mend() -> None:
        mesh.supervisor.stop(name)
        mesh.start_replica(name)

    return Broken(name, SKEWED_S, mend)


def _both(first: Fault, second: Fault) -> Fault:
    def strike(mesh: ChaosMesh, turn: int) -> Broken:
        one, other = first.strike(mesh, turn), second.strike(mesh, turn)

        def mend() -> None:
            one.mend()
            other.mend()

        target = f"{one.target} and {other.target}"
        return Broken(target, max(one.hold_s, other.hold_s), mend, writer=one.writer or other.writer)

    return Fault(f"{first.name}+{second.name}", "pair", strike)


NETWORK_FAULTS: Final = (
    *(Fault(f"partition-{service}", "network", _partition(service)) for service in REPLICAS),
    Fault("latency", "network", _latency),
    Fault("latency-stalls", "network", _stalls),
    Fault("resets", "network", _resets),
    Fault("half-open", "network", _half_open),
)
LOSS_FAULTS: Final = (
    Fault("postgres-partition", "postgres", _postgres_partition),
    Fault("postgres-lag-kill", "postgres", _postgres_lag_kill),
    Fault("redis-partition", "redis", _redis_partition),
    Fault("redis-lag-kill", "redis", _redis_lag_kill),
)
OTHER_FAULTS: Final = (
    Fault("certificate-rotation", "certificates", _rotation),
    Fault("disk-full", "disk", _disk_full),
    Fault("clock-skew", "clock", _skew),
)
_SINGLE: Final = {
    fault.name: fault for fault in (*SERVICE_FAULTS, *STORE_FAULTS, *NETWORK_FAULTS, *LOSS_FAULTS, *OTHER_FAULTS)
}
PAIRS: Final = tuple(
    _both(_SINGLE[first], _SINGLE[second])
    for first, second in (
        ("kill-registry", "redis-kill"),
        ("freeze-coordinator", "postgres-kill"),
        ("latency-stalls", "kill-aggregator"),
        ("kill-coordinator", "partition-registry"),
        ("certificate-rotation", "postgres-kill"),
        ("clock-skew", "redis-freeze"),
    )
)
ALL: Final = (*_SINGLE.values(), *PAIRS)
