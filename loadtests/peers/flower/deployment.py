"""Flower as it is deployed: one SuperLink, one SuperNode a hospital, over loopback, without TLS.

Every message that a SuperNode receives is handled by a process of its own (`flwr-clientapp`): Flower's only way, in
both of its isolation modes. Each starts a Python that imports Flower, four times a round and hospital.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from loadtests.peers.children import Children, environment
from loadtests.peers.follow import follow
from loadtests.peers.settings import Request, Tell
from services.common.errors import Code, FedmeshError
from services.embedded.processes import LOOPBACK, free_port, wait_until

APP: Final = Path(__file__).parent / "app"
# How often a SuperExec asks for tasks. Flower's own setting: 1 s by default, at least 0.01 s; sixteen of them ask, so
# that much less only takes CPU from the round.
TASK_POLL_S: Final = 0.2
START_TIMEOUT_S: Final = 180.0
# Longer than any round may take: its four stages time out after 150 s each.
SILENCE_S: Final = 900.0

SETTINGS: Final[dict[str, Any]] = {
    "processes": "SuperLink and one SuperNode a hospital; isolation subprocess, state in memory, no TLS",
    "superexec_task_poll_s": TASK_POLL_S,
    "server_app_reply_poll_s": 0.05,
    "supernode_idle_poll_s": "3 (hard-coded)",
    "supernode_reply_poll_s": "0.5 (hard-coded)",
    "runtime_dependency_installation": False,
    "telemetry": False,
    "bytecode": "compiled at installation",
}


def rounds(request: Request, tell: Tell) -> Iterator[dict[str, Any]]:
    """Rounds of SecAgg+ in a real deployment; every process is gone when this ends.

    Raises:
        FedmeshError: SERVICE_UNAVAILABLE if a process of Flower fails, DEADLINE_EXCEEDED when it takes too long.
    """
    records = request.work / "rounds.jsonl"
    with Children(request.work, _environment(request), request.timeout_s) as children:
        _start(request, children, tell)
        tell("Flower's deployment: submitting the run")
        children.start("flwr-run", _submission(request, records), cwd=APP)
        yield from follow(records, children, SILENCE_S)


def _environment(request: Request) -> dict[str, str]:
    return environment(
        request.home,
        {
            "FLWR_HOME": str(request.work / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(TASK_POLL_S),
        },
    )


def _start(request: Request, children: Children, tell: Tell) -> None:
    programs = request.home / "bin"
    port, *own = _free_ports(request.hospitals + 1)
    _write_connection(request.work / "flwr", port)
    tell("Flower's deployment: starting the SuperLink")
    listen = ["--host", LOOPBACK, "--port", str(port), "--disable-runtime-dependency-installation"]
    log = children.start("superlink", [programs / "flower-superlink", "--insecure", *listen])
    _wait_for_port(port, children, log)
    tell(f"Flower's deployment: starting {request.hospitals} SuperNodes")
    logs = []
    for hospital, runtime_port in enumerate(own):
        connect = ["--superlink", f"{LOOPBACK}:{port}", "--node-config", f"partition-id={hospital}"]
        listen = ["--host", LOOPBACK, "--port", str(runtime_port)]
        name = f"supernode-{hospital:02}"
        logs.append(children.start(name, [programs / "flower-supernode", "--insecure", *connect, *listen]))
    _wait_for_nodes(logs, children)


def _free_ports(count: int) -> list[int]:
    ports: dict[int, None] = {}
    for _ in range(100 * count):
        ports[free_port()] = None
        if len(ports) == count:
            return list(ports)
    raise FedmeshError(Code.CONFIG_INVALID, f"no {count} free ports on {LOOPBACK}: stop what holds them")


def _write_connection(folder: Path, port: int) -> None:
    folder.mkdir()
    text = f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{LOOPBACK}:{port}"\ninsecure = true\n'
    (folder / "config.toml").write_text(text)


def _wait_for_port(port: int, children: Children, log: Path) -> None:
    def listening() -> bool:
        children.check()
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((LOOPBACK, port)) == 0

    if not wait_until(listening, START_TIMEOUT_S, 0.2):
        raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"the SuperLink does not listen on port {port}; see {log}")


def _wait_for_nodes(logs: list[Path], children: Children) -> None:
    """Until all are connected: what starts meanwhile would compete with them, and Flower ends tasks that start late."""

    def connected() -> bool:
        children.check()
        return all("SuperNode ID" in log.read_text(errors="replace") for log in logs)

    if not wait_until(connected, START_TIMEOUT_S, 0.5):
        raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"not all SuperNodes have connected; see {logs[0].parent}")


def _submission(request: Request, records: Path) -> list[str | Path]:
    config = {
        "params": f'"{",".join(map(str, request.params))}"',
        "clients": request.hospitals,
        "threshold": request.threshold,
        "runs": request.runs,
        "report": f'"{records}"',
    }
    arguments = " ".join(f"{key}={value}" for key, value in config.items())
    return [request.home / "bin" / "flwr", "run", ".", "bench", "--run-config", arguments]
