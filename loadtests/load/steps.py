"""What a run does, one step after another."""

import math
from dataclasses import dataclass

from loadtests.load.figures import AUDIT_STORM, CONTROL, IDLE, UPLOAD_STORM
from loadtests.load.settings import MEMBERS, Options


@dataclass(frozen=True)
class Step:
    """One scenario. name: the scenario's. waiting: hospitals on the task stream. user: Locust's class that makes calls
    beside them, "" for none. rate: calls a second of all its users. seconds: how long. params: integers of an upload, 0
    without uploads. sums: how many sums of fifteen uploads it opens.
    """

    name: str
    waiting: int
    seconds: float
    user: str = ""
    rate: float = 0.0
    params: int = 0
    sums: int = 0


def steps(options: Options) -> list[Step]:
    """Waiting hospitals step by step, with the control plane's calls beside them; then the storms beside them all."""
    seconds, counts, sizes = options.seconds, sorted(options.hospitals), sorted(options.params)
    found = []
    for count in counts:
        if count in (counts[0], counts[-1]):
            found.append(Step(f"{IDLE}-{count}", count, seconds))
        found.append(Step(f"{CONTROL}-{count}", count, seconds, "ControlPlane", options.rate))
    found.append(Step(AUDIT_STORM, counts[-1], seconds, "AuditStorm", options.events))
    for params in sizes:
        rate = upload_rate(options, params)
        # A quarter more than are due on average, for calls come at random.
        sums = math.ceil(1.25 * rate * seconds / MEMBERS) + 1
        found.append(Step(f"{UPLOAD_STORM}-{params}", counts[-1], seconds, "UploadStorm", rate, params, sums))
    return found


def upload_rate(options: Options, params: int) -> float:
    """Uploads a second: fewer of a larger model, though more bytes."""
    return max(1.0, options.uploads * math.sqrt(min(options.params) / params))
