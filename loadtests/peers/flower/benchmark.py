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
from services.common.errors import FedmeshError

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
        FedmeshError: as `protocol_rounds`. A deployment that fails is told of in the report.
    """
    alone = _Figures("protocol alone", tell)
    alone.take(protocol_rounds(_within(request, "protocol")))
    deployed, failure = _Figures("deployment", tell), None
    try:
        deployed.take(deployment.rounds(_within(request, "deployment"), tell))
    except FedmeshError as error:
        failure = str(error)  # what was measured before it counts
        tell(f"Flower's deployment FAILED: {failure}")
    shares = {"num_shares": request.hospitals, "reconstruction_threshold": request.threshold}
    return {
        "version": version(request.home, "flwr"),
        "python": python(request.home),
        "mode": "deployment: SuperLink and SuperNodes, one process a message",
        "settings": {**PROTOCOL, **shares, **deployment.SETTINGS},
        "params": deployed.report(),
        "failed_rounds": deployed.failed,
        "failure": failure,
        "protocol_alone": {
            "mode": "long-lived client processes joined by sockets: no polling, no process started within a round",
            "settings": {**PROTOCOL, **shares},
            "params": alone.report(),
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


class _Figures:
    """The rounds of one mode, as they come."""

    def __init__(self, mode: str, tell: Tell) -> None:
        self._mode, self._tell = mode, tell
        self._rounds: dict[str, list[dict[str, Any]]] = {}
        self.failed = 0

    def take(self, records: Iterable[dict[str, Any]]) -> None:
        """Keep every round and tell of it."""
        for record in records:
            if "failed" in record:
                self.failed += 1
                self._tell(f"Flower's {self._mode}: a round FAILED: {record['failed']}")
                continue
            state = "warming up" if record["warm_up"] else f"{record['round_s']:.2f} s"
            right = "" if record["exact"] else ", sum WRONG"
            self._tell(f"Flower's {self._mode}: {record['params']:,} parameters: {state}{right}")
            self._rounds.setdefault(str(record["params"]), []).append(record)

    def report(self) -> Report:
        """The figures by vector length; a length of which only the warm-up ended is left out."""
        return {
            size: {
                "round_s": summary([record["round_s"] for record in rounds if not record["warm_up"]]),
                "upload_bytes_per_parameter": rounds[-1]["upload_bytes_per_parameter"],
                "exact": all(record["exact"] for record in rounds),
            }
            for size, rounds in self._rounds.items()
            if not rounds[-1]["warm_up"]
        }
