"""The model: what a round costs, measured, times how many there are, assumed. Pure arithmetic.

A year has 365 days. GB and TB are powers of ten, as networks and stores are paid for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.common.errors import Code, FedmeshError

YEAR_S: Final = 365 * 86_400
YEAR_H: Final = 365 * 24
STORES: Final = ("PostgreSQL", "Redis")
NODES: Final = "cores of the hospitals' nodes"
Wire = Callable[[Mapping[str, Any]], tuple[float, float]]
"""Bytes that a hospital sends and fetches in a round beside its upload and the sum."""
# A state is one float32 a parameter, sealed; the seal's some hundred bytes are left out.
STATE_BYTES: Final = 4


@dataclass(frozen=True)
class Assumed:
    """What nobody measured, money in US$.

    hospitals, models: of a year. rounds, params: of a model, which a cohort of the reports' size trains. peak: the
    busiest hour over the mean. filled: part of a core that may be used, so that a lost replica is made up for. epsilon,
    budget: of a model, and of a population in a year. core_hour: price of a processor core. gb_out: of a GB that leaves
    a cloud or a hospital. gb_month: of a GB of a database for a month, its three copies together. gb_month_data: of a
    GB of an object store, for a central copy. node_cores: cores that a hospital's node keeps for itself all year.
    gb_hospital: training data of a hospital; refreshes: how often a year a central copy of it is made anew.
    """

    hospitals: int = 1000
    models: float = 5e6
    rounds: int = 10
    params: int = 10_000
    peak: float = 3.0
    filled: float = 0.6
    epsilon: float = 0.5
    budget: float = 0.5
    core_hour: float = 0.048
    gb_out: float = 0.085
    gb_month: float = 0.24
    gb_month_data: float = 0.023
    node_cores: float = 1.0
    gb_hospital: float = 10.0
    refreshes: float = 12.0


@dataclass(frozen=True)
class Round:
    """One round of a cohort, measured. cpu_s: of the centre, by service and store. hospital_cpu_s: of one hospital.
    upload: bytes of one ciphertext. sent, fetched: bytes of one hospital, states left out.
    """

    cohort: int
    cpu_s: Mapping[str, float]
    hospital_cpu_s: float
    upload: float
    sent: float
    fetched: float
    seconds: float


@dataclass(frozen=True)
class Waiting:
    """A hospital that waits, measured: cores of the centre, MiB of the coordinator."""

    cores: float
    mib: float


def round_at(reports: Sequence[Mapping[str, Any]], params: int, wire: Wire) -> Round:
    """A round of models of some size, on the line through the measured sizes of `fedmesh bench secure-sum` around it.

    reports: by size. wire: bytes of a hospital beside the sum and its upload, from a report. Raises:
    FedmeshError(INVALID_ARGUMENT) for fewer than two sizes, different cohorts, or a size far from them.
    """
    sizes = [int(report["params"]) for report in reports]
    if len(set(sizes)) < 2 or len({report["hospitals"] for report in reports}) != 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, "reports of one number of hospitals and two sizes are needed")
    if not sizes[0] <= params <= 10 * sizes[-1]:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"params: measured are {sizes[0]} to {sizes[-1]}, ten times is the most"
        )
    # The first size that is not smaller, or beyond all of them the last.
    after = max(1, next((index for index, size in enumerate(sizes) if size >= params), len(sizes) - 1))
    small, large = reports[after - 1], reports[after]
    share = (params - small["params"]) / (large["params"] - small["params"])

    def between(of: Callable[[Mapping[str, Any]], float]) -> float:
        return float(max(0.0, of(small) + share * (of(large) - of(small))))

    return Round(
        cohort=int(small["hospitals"]),
        cpu_s={name: between(lambda report, name=name: _parts(report)[name]) for name in _parts(small)},  # type: ignore[misc]
        hospital_cpu_s=between(lambda report: report["hospital_cpu_s"]),
        upload=between(_upload),
        sent=between(lambda report: _upload(report) + wire(report)[0]),
        fetched=between(lambda r: r["download_bytes_per_parameter"] * r["params"] + wire(r)[1]),
        seconds=between(lambda report: report["round_s"]["p50"]),
    )


def _upload(report: Mapping[str, Any]) -> float:
    return float(report["upload_bytes_per_parameter"] * report["params"])


def _parts(report: Mapping[str, Any]) -> dict[str, float]:
    return {**report["centre_cpu_by_service_s"], **report["stores_cpu_s"]}


@dataclass(frozen=True)
class Year:
    """What follows. Of several years that differ in `Assumed` each is made anew."""

    assumed: Assumed
    one: Round
    waiting: Waiting

    # ---- work

    @property
    def per_second(self) -> float:
        """Rounds, on average."""
        return self.assumed.models * self.assumed.rounds / YEAR_S

    @property
    def turns(self) -> float:
        """Rounds of one hospital a day."""
        return self.per_second * 86_400 * self.one.cohort / self.assumed.hospitals

    def cores(self, part: str) -> float:
        """Of a part in the busiest hour; those of waiting hospitals are the coordinator's."""
        waiting = self.waiting.cores * self.assumed.hospitals if part == "coordinator" else 0.0
        return self.per_second * self.assumed.peak * self.one.cpu_s[part] + waiting

    def replicas(self, part: str) -> int:
        """Processes of one core; three at least, so that one may be away while another is replaced."""
        return max(3, math.ceil(self.cores(part) / self.assumed.filled))

    @property
    def shards(self) -> int:
        """Installations side by side: a log has one sequencer at a time, and Redis one thread, of a core each."""
        return max(math.ceil(self.cores(part) / self.assumed.filled) for part in ("audit", "Redis"))

    @property
    def in_flight(self) -> float:
        """Rounds at once in the busiest hour (Little's law)."""
        return self.per_second * self.assumed.peak * self.one.seconds

    @property
    def uploads_gb(self) -> float:
        """Memory of Redis for the uploads of rounds in flight."""
        return self.in_flight * self.one.cohort * self.one.upload / 1e9

    @property
    def private_models(self) -> float:
        """Models a year for which every hospital's privacy budget lasts."""
        return self.assumed.hospitals * self.assumed.budget / self.assumed.epsilon / self.one.cohort

    # ---- bytes a year

    @property
    def _contributions(self) -> float:
        return self.assumed.models * self.assumed.rounds * self.one.cohort

    @property
    def hospital_out_tb(self) -> float:
        """Of all hospitals: uploads and statements, and a state for each round."""
        states = self.assumed.models * self.assumed.rounds * self.assumed.params * STATE_BYTES
        return (self._contributions * self.one.sent + states) / 1e12

    @property
    def centre_out_tb(self) -> float:
        """Sums, parts of others' uploads, statements and states that hospitals fetch."""
        return self._contributions * (self.one.fetched + self.assumed.params * STATE_BYTES) / 1e12

    @property
    def kept_tb(self) -> float:
        """States of all versions, at the end of the year."""
        return self.assumed.models * self.assumed.rounds * self.assumed.params * STATE_BYTES / 1e12

    # ---- money, US$ a year

    def federated(self) -> dict[str, float]:
        """By what it is paid for."""
        a = self.assumed
        services = sum(self.replicas(name) for name in self.one.cpu_s if name not in STORES)
        # Three copies of each store, each as large as what it does in the busiest hour.
        stores = sum(3 * max(1, math.ceil(self.cores(name) / a.filled)) for name in STORES)
        return {
            "cores of the services": services * a.core_hour * YEAR_H,
            "cores of the stores": stores * a.core_hour * YEAR_H,
            NODES: a.hospitals * self.node_cores * a.core_hour * YEAR_H,
            "bytes out of hospitals": self.hospital_out_tb * 1000 * a.gb_out,
            "bytes out of the centre": self.centre_out_tb * 1000 * a.gb_out,
            "versions kept": self.kept_tb * 1000 / 2 * a.gb_month * 12,
        }

    @property
    def node_cores(self) -> float:
        """Of one hospital: kept for its node, or what cryptography needs in the busiest hour if that is more."""
        busy = self.turns / 86_400 * self.assumed.peak * self.one.hospital_cpu_s
        return max(self.assumed.node_cores, busy / self.assumed.filled)

    @property
    def training_room_s(self) -> float:
        """Processor time for training that the cores kept for a node leave to each round in the busiest hour."""
        return self.assumed.node_cores * self.assumed.filled / (self.turns / 86_400 * self.assumed.peak) - (
            self.one.hospital_cpu_s
        )

    def centralised(self, gb_hospital: float | None = None) -> dict[str, float]:
        """The same models from one copy of all data, without what trains them. gb_hospital: another size of it."""
        a = self.assumed
        gb = a.hospitals * (a.gb_hospital if gb_hospital is None else gb_hospital)
        return {"bytes out of hospitals": gb * a.refreshes * a.gb_out, "data kept": gb * a.gb_month_data * 12}

    def break_even(self, cheaper: float) -> float:
        """US$ a year and hospital that a central copy must cost besides, so that the federation is so much cheaper."""
        federated, centralised = sum(self.federated().values()), sum(self.centralised().values())
        return max(0.0, (federated / (1 - cheaper) - centralised) / self.assumed.hospitals)

    def even_at_gb(self, cheaper: float) -> float:
        """GB of data of a hospital from which on bytes alone make the federation so much cheaper."""
        return sum(self.federated().values()) / (1 - cheaper) / sum(self.centralised(1.0).values())
