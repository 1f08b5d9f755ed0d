"""What follows from a reported privacy ledger for a population's budget, in the same terms as the hospital's own."""

from dataclasses import dataclass, replace
from datetime import datetime

from services.privacy.budget import Charge, Limit, Remaining, remaining
from services.privacy.chain import CHARGED, RECOVERED, RESERVED, Entry


@dataclass(frozen=True)
class _Job:
    """One job's promise. at: when it was charged last; None while nothing was sent, and it may still begin."""

    population: str
    epsilon: float
    delta: float
    counts: bool
    at: datetime | None = None


class ReportedSpending:
    """The jobs that a hospital's entries speak of; entries are added in order."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        # What a lost ledger may have held beyond what was reported: of whichever population.
        self._unknown: list[tuple[float, float, datetime]] = []
        self.seq = 0
        """Number of the newest entry that was added."""

    def add(self, entry: Entry) -> None:
        """Take an entry in. A charge or release of a job that was never reserved changes nothing."""
        said = entry.read()
        self.seq = entry.seq
        if said["kind"] == RECOVERED:
            at = datetime.fromisoformat(said["at"])
            self._unknown.append((said["epsilon"], said["delta"], at))
            self._jobs = {job_id: replace(job, at=at) for job_id, job in self._jobs.items()}
            return
        job_id = said["job_id"]
        if said["kind"] == RESERVED:
            private = bool(said["private"])
            self._jobs[job_id] = _Job(said["population"], said["epsilon"], said["delta"], private)
        elif job_id in self._jobs and said["kind"] == CHARGED:
            self._jobs[job_id] = replace(self._jobs[job_id], at=datetime.fromisoformat(said["at"]))
        elif job_id in self._jobs:
            self._jobs[job_id] = replace(self._jobs[job_id], counts=False)

    def left(self, now: datetime, limit: Limit) -> Remaining:
        """What the hospital's population may still lose; of several, the one that has least epsilon left."""
        by_population: dict[str, list[Charge]] = {}
        for job_id, job in self._jobs.items():
            if job.counts:
                charge = Charge(job_id, job.population, job.epsilon, job.delta, job.at or now)
                by_population.setdefault(job.population, []).append(charge)
        by_population.setdefault("", [])
        for name, charges in by_population.items():
            charges += [Charge("", name, epsilon, delta, at) for epsilon, delta, at in self._unknown]
        return min(
            [remaining(charges, name, now, limit) for name, charges in by_population.items()],
            key=lambda left: left.epsilon,
        )
