"""What a run found, and what of it misses the limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from loadtests.load.settings import FAILED_RATIO, GROWTH, STREAM_CORES, STREAM_MIB, Options, Sample
from loadtests.peers.percentiles import percentile

IDLE: Final = "idle"
CONTROL: Final = "calls"
AUDIT_STORM: Final = "audit-storm"
UPLOAD_STORM: Final = "upload-storm"
COORDINATOR: Final = "coordinator"


@dataclass(frozen=True)
class Usage:
    """What a process used in a scenario. cores: processors, on average. mib: resident memory at its end."""

    cores: float
    mib: float


@dataclass
class Scenario:
    """The calls of one scenario and what the services used meanwhile. streams: hospitals on the task stream."""

    name: str
    streams: int
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    usage: Mapping[str, Usage] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Its name without the number of hospitals or the size of the model."""
        return self.name.rstrip("0123456789").rstrip("-")

    @property
    def last(self) -> str:
        """What its name ends with: the number of hospitals or the size of the model."""
        return self.name.rsplit("-", 1)[-1]

    @property
    def cores(self) -> float:
        """Of all parts together."""
        return sum(used.cores for used in self.usage.values())

    @property
    def mib(self) -> float:
        """Bytes that the calls carried, in MiB."""
        return sum(sample.size for sample in self.samples) / 2**20

    @property
    def failed(self) -> int:
        return sum(sample.failed for sample in self.samples)

    @property
    def failed_ratio(self) -> float:
        return self.failed / max(1, len(self.samples))

    def ms(self, share: float) -> float:
        """A percentile of the latencies, failed calls included; 0 without calls."""
        return percentile([sample.ms for sample in self.samples], share) if self.samples else 0.0

    def document(self) -> dict[str, Any]:
        statuses = sorted({sample.status for sample in self.samples})
        return {
            "name": self.name,
            "streams": self.streams,
            "seconds": round(self.seconds, 1),
            "calls": len(self.samples),
            "failed": self.failed,
            "failed_ratio": self.failed_ratio,
            "p50_ms": round(self.ms(0.5), 1),
            "p99_ms": round(self.ms(0.99), 1),
            "cores": round(self.cores, 3),
            "bytes": sum(sample.size for sample in self.samples),
            "statuses": {status: sum(item.status == status for item in self.samples) for status in statuses},
            "usage": {
                name: {"cores": round(used.cores, 3), "mib": round(used.mib)} for name, used in self.usage.items()
            },
        }


@dataclass(frozen=True)
class Costs:
    """What things cost, from differences between scenarios; processor time of services and stores together.

    stream_cores, stream_mib: of one hospital that waits; memory is the coordinator's. call_cpu_s: of one call of the
    control-plane mix, by hospitals beside it; audit_cpu_s: of one of the audit storm. upload_cpu_s, upload_mib: of one
    upload with its part of a sum's opening and discarding, by integers of the model.
    """

    stream_cores: float
    stream_mib: float
    call_cpu_s: Mapping[str, float]
    audit_cpu_s: float
    upload_cpu_s: Mapping[str, float]
    upload_mib: Mapping[str, float]

    @property
    def upload_cpu_s_per_mib(self) -> dict[str, float]:
        return {params: seconds / self.upload_mib[params] for params, seconds in self.upload_cpu_s.items()}


def costs(scenarios: Sequence[Scenario]) -> Costs:
    """Raises: ValueError without an idle scenario, ZeroDivisionError without calls."""
    idle = [item for item in scenarios if item.kind == IDLE]
    few, many = min(idle, key=lambda item: item.streams), max(idle, key=lambda item: item.streams)
    more = max(1, many.streams - few.streams)
    stream_cores = max(0.0, many.cores - few.cores) / more

    def of_one(item: Scenario) -> float:
        """Beyond what as many hospitals that only wait cost, on the line between the fewest and the most."""
        waiting = few.cores + stream_cores * (item.streams - few.streams)
        return max(0.0, item.cores - waiting) * item.seconds / len(item.samples)

    calls, audits, uploads = (of_kind(scenarios, kind) for kind in (CONTROL, AUDIT_STORM, UPLOAD_STORM))
    return Costs(
        stream_cores=stream_cores,
        stream_mib=(many.usage[COORDINATOR].mib - few.usage[COORDINATOR].mib) / more,
        call_cpu_s={item.last: of_one(item) for item in calls},
        audit_cpu_s=of_one(audits[0]),
        upload_cpu_s={item.last: of_one(item) for item in uploads},
        upload_mib={item.last: item.mib / len(item.samples) for item in uploads},
    )


def of_kind(scenarios: Sequence[Scenario], kind: str) -> list[Scenario]:
    """In the order in which they were made: by hospitals, or by size of the model."""
    return [item for item in scenarios if item.kind == kind]


def missed(scenarios: Sequence[Scenario], options: Options) -> list[str]:
    """What is over its limit, one line each; a storm without a call is."""
    found = []
    for item in scenarios:
        if item.kind == IDLE:
            continue
        if not item.samples:
            found.append(f"{item.name}: no call was made")
        if item.failed_ratio > FAILED_RATIO:
            found.append(f"{item.name}: {item.failed} of {len(item.samples)} calls failed")
        if item.kind != UPLOAD_STORM and item.ms(0.99) >= options.p99_ms:
            found.append(f"{item.name}: p99 is {item.ms(0.99):.0f} ms, the limit {options.p99_ms:.0f} ms")
    made = all(item.samples for item in scenarios if item.kind != IDLE)
    return found + (_grown(scenarios) if made else [])


def _grown(scenarios: Sequence[Scenario]) -> list[str]:
    """Costs that grow with what should not matter to them."""
    found, cost = [], costs(scenarios)
    few, *more = cost.call_cpu_s.items()
    for streams, seconds in more:
        if (dearer := seconds / max(1e-9, few[1])) > GROWTH:
            found.append(f"a call beside {streams} hospitals costs {dearer:.1f} times as much, limit {GROWTH:g}")
    if more:
        if cost.stream_mib > STREAM_MIB:
            found.append(f"a waiting hospital takes {cost.stream_mib:.2f} MiB, limit {STREAM_MIB:g}")
        if cost.stream_cores > STREAM_CORES:
            found.append(f"a waiting hospital takes {cost.stream_cores:.5f} cores, limit {STREAM_CORES:g}")
    # What an upload costs whatever its size makes a MiB of a small one dear: one of a larger must not be dearer yet.
    for (small, before), (large, after) in pairwise(cost.upload_cpu_s_per_mib.items()):
        if (dearer := after / max(1e-9, before)) > GROWTH:
            found.append(f"a MiB of {large} integers costs {dearer:.1f} times one of {small}, limit {GROWTH:g}")
    return found


def table(scenarios: Sequence[Scenario]) -> str:
    """For people: a line for each scenario, then what things cost."""
    lines = [
        f"{'scenario':<21}{'streams':>8}{'calls':>7}{'failed':>7}{'p50 ms':>8}{'p99 ms':>8}{'cores':>7}"
        f"{'coordinator':>13}{'largest part':>21}"
    ]
    for item in scenarios:
        name, most = max(item.usage.items(), key=lambda used: used[1].cores)
        calls = f"{len(item.samples):>7}{item.failed:>7}{item.ms(0.5):>8.0f}{item.ms(0.99):>8.0f}"
        lines.append(
            f"{item.name:<21}{item.streams:>8}{calls if item.kind != IDLE else ' ' * 30}{item.cores:>7.2f}"
            f"{item.usage[COORDINATOR].mib:>9.0f} MiB{name:>16} {most.cores:.2f}"
        )
    cost = costs(scenarios)
    beside = ", ".join(f"{seconds * 1000:.1f} ms beside {streams}" for streams, seconds in cost.call_cpu_s.items())
    lines += [
        "",
        "processor time of the services and the stores",
        f"a waiting hospital   {cost.stream_cores * 1000:.3f} thousandths of a core, {cost.stream_mib * 1024:.0f} KiB",
        f"a call               {beside} hospitals; to the audit log {cost.audit_cpu_s * 1000:.1f} ms",
        *(
            f"an upload            {seconds * 1000:.0f} ms, {cost.upload_cpu_s_per_mib[params] * 1000:.0f} ms a MiB, "
            f"of {int(params):,} integers ({cost.upload_mib[params]:.2f} MiB)"
            for params, seconds in cost.upload_cpu_s.items()
        ),
    ]
    return "\n".join(lines)
