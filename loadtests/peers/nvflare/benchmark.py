"""NVFlare's figures: bytes of a client's encrypted update, and the centre's CPU to add them all."""

from pathlib import Path
from typing import Any, Final

from loadtests.peers.children import Children, environment
from loadtests.peers.environments import python, version
from loadtests.peers.follow import follow
from loadtests.peers.settings import Report, Request, Tell

PROGRAM: Final = Path(__file__).parent / "measure.py"


def measure(request: Request, tell: Tell) -> Report:
    """All figures of NVFlare; the process is gone when this returns.

    Raises:
        FedmeshError: SERVICE_UNAVAILABLE if the process fails, DEADLINE_EXCEEDED when it takes too long.
    """
    settings: dict[str, Any] = {}
    params: dict[str, Any] = {}
    records = request.work / "sums.jsonl"
    with Children(request.work, environment(request.home, {}), request.timeout_s) as children:
        tell("NVFlare: encrypting")
        arguments = [str(records), str(request.hospitals), str(request.runs), ",".join(map(str, request.params))]
        children.start("nvflare", [request.home / "bin" / "python", PROGRAM, *arguments])
        for record in follow(records, children, request.timeout_s):
            if "settings" in record:
                settings = record["settings"]
                continue
            size = record.pop("params")
            params[str(size)] = record
            tell(f"NVFlare: {size:,} parameters: {record['centre_cpu_s']:.2f} s of the centre's CPU")
    return {
        "version": version(request.home, "nvflare"),
        "tenseal": version(request.home, "tenseal"),
        "python": python(request.home),
        "mode": "in one process, with NVFlare's own encryptor filter, serialiser and aggregator",
        "settings": settings,
        "params": params,
    }
