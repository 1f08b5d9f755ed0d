"""What is left of a budget by a reported ledger: as much as the hospital's own rules leave."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.privacy.budget import Limit
from services.privacy.chain import CHARGED, RECOVERED, RELEASED, RESERVED, Head, next_entry
from services.privacy.reported import ReportedSpending

NOW = datetime(2026, 6, 1, tzinfo=UTC)
LIMIT = Limit(0.5, 1e-5)


class Ledger:
    """A hospital's chain as it is reported."""

    def __init__(self) -> None:
        self.spending = ReportedSpending()
        self._head = Head()

    def write(self, kind: str, at: datetime = NOW, **facts: Any) -> None:
        entry = next_entry(self._head, kind, at.isoformat(), **facts)
        self._head = entry.head
        self.spending.add(entry)

    def reserve(self, job_id: str, epsilon: float, population: str = "p", *, private: int = 1) -> None:
        terms: dict[str, Any] = {
            "plan_id": "plan",
            "delta": 1e-6,
            "colluders": 1,
            "compositions": 2,
            "metrics_compositions": 0,
        }
        self.write(RESERVED, job_id=job_id, population=population, private=private, epsilon=epsilon, **terms)

    def charge(self, job_id: str, at: datetime = NOW) -> None:
        self.write(CHARGED, at, job_id=job_id, round=1, attempt=1, measured=0)

    def left(self, now: datetime = NOW) -> float:
        return self.spending.left(now, LIMIT).epsilon


def test_a_new_hospital_has_all_of_it() -> None:
    assert Ledger().left() == 0.5


def test_a_reservation_counts_until_it_is_released_and_a_plan_without_privacy_never() -> None:
    ledger = Ledger()
    ledger.reserve("a", 0.2)
    ledger.reserve("open", 0.3, private=0)
    assert ledger.left() == pytest.approx(0.3)
    ledger.write(RELEASED, job_id="a")
    assert ledger.left() == 0.5
    assert ledger.spending.seq == 3


def test_a_charge_counts_for_a_year_from_its_time_whatever_its_job_was_promised() -> None:
    ledger = Ledger()
    ledger.reserve("a", 0.4)
    ledger.charge("a", NOW - timedelta(days=10))
    assert ledger.left() == pytest.approx(0.1)
    assert ledger.left(NOW + timedelta(days=354)) == pytest.approx(0.1)
    assert ledger.left(NOW + timedelta(days=356)) == 0.5


def test_of_several_populations_the_poorest_counts() -> None:
    ledger = Ledger()
    ledger.reserve("a", 0.1, "p")
    ledger.reserve("b", 0.5, "q")
    assert ledger.left() == 0.0


def test_entries_of_jobs_that_nobody_reserved_change_nothing() -> None:
    ledger = Ledger()
    ledger.charge("unknown")
    ledger.write(RELEASED, job_id="unknown")
    assert ledger.left() == 0.5


def test_a_recovery_counts_against_whichever_population_and_dates_what_was_before() -> None:
    ledger = Ledger()
    ledger.reserve("a", 0.1)
    ledger.charge("a", NOW - timedelta(days=300))
    ledger.write(RECOVERED, basis="approved", epsilon=0.2, delta=0.0)
    assert ledger.left() == pytest.approx(0.2)
    assert ledger.left(NOW + timedelta(days=364)) == pytest.approx(0.2)
    assert ledger.left(NOW + timedelta(days=366)) == 0.5
    empty = Ledger()
    empty.write(RECOVERED, basis="all-spent", epsilon=100.0, delta=1.0)
    assert empty.left() == 0.0
