"""Flower's figures: SecAgg+ in its deployment, and the protocol alone."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from loadtests.peers.children import Children, environment
from loadtests.peers.environments import python, version
from loadtests.peers.flower import deployment
from loadtests.peers.follow import follow
from loadtests.peers.percentiles import summary
from loadtests.peers.settings import Report, Request, Tell

PROTOCOL: Final[dict[str, Any]] = {
    "workflow": "SecAggPlusWorkflow and secaggplus_mod",
    "clipping_range": 1.0,
    "quantization_range": 2**20,
    "modulus_range": 2**32,
    "max_weight": 1000.0,
    "model_sent_down": "none",
    "tls": False,
}


def measure(request: Request, tell: Tell) -> Report:
    """All figures of Flower.

    Raises:
        FedmeshError: as `deployment.rounds`.
    """
    alone = _report(protocol_rounds(_within(request, "protocol")), "protocol alone", tell)
    deployed = _report(deployment.rounds(_within(request, "deployment"), tell), "deployment", tell)
    shares = {"num_shares": request.hospitals, "reconstruction_threshold": request.threshold}
    return {
        "version": version(request.home, "flwr"),
        "python": python(request.home),
        "mode": "deployment: SuperLink and SuperNodes, one process a message",
        "settings": {**PROTOCOL, **shares, **deployment.SETTINGS},
        "params": deployed,
        "protocol_alone": {
            "mode": "long-lived client processes joined by sockets: no polling, no process started within a round",
            "settings": {**PROTOCOL, **shares},
            "params": alone,
        },
    }


def protocol_rounds(request: Request) -> Iterator[dict[str, Any]]:
    """Rounds of Flower's workflow and mod without its deployment; every process is gone when this ends.

    Raises:
        FedmeshError: SERVICE_UNAVAILABLE if a process fails, DEADLINE_EXCEEDED when it takes too long.
    """
    records = request.work / "rounds.jsonl"
    settings = {"PYTHONPATH": str(deployment.APP), "FLWR_TELEMETRY_ENABLED": "0"}
    with Children(request.work, environment(request.home, settings), request.timeout_s) as children:
        numbers = [str(request.hospitals), str(request.threshold), str(request.runs)]
        arguments = [str(records), *numbers, ",".join(map(str, request.params))]
        children.start("protocol", [request.home / "bin" / "python", "-m", "securesum.alone", *arguments])
        yield from follow(records, children, deployment.SILENCE_S)


def _within(request: Request, folder: str) -> Request:
    work: Path = request.work / folder
    work.mkdir()
    return dataclasses.replace(request, work=work)


def _report(records: Iterable[dict[str, Any]], mode: str, tell: Tell) -> Report:
    rounds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "failed" in record:
            tell(f"Flower's {mode}: a round FAILED: {record['failed']}")
            continue
        state = "warming up" if record["warm_up"] else f"{record['round_s']:.2f} s"
        tell(f"Flower's {mode}: {record['params']:,} parameters: {state}{'' if record['exact'] else ', sum WRONG'}")
        rounds.setdefault(str(record["params"]), []).append(record)
    return {
        size: {
            "round_s": summary([record["round_s"] for record in measured if not record["warm_up"]]),
            "upload_bytes_per_parameter": measured[-1]["upload_bytes_per_parameter"],
            "exact": all(record["exact"] for record in measured),
        }
        for size, measured in rounds.items()
    }
