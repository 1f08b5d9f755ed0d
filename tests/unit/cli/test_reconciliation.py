"""The verdicts of `fedmesh privacy reconcile`, over real ledgers."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.cli.reconciliation import Reported, ReportedLedgers, Verdict, check_copies, compare_ledgers, rows_of
from services.common.clock import FakeClock
from services.hospital_node.domain.ports import Reservation
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger import SqliteLedger, read_entries, read_ledger
from services.privacy.budget import Limit
from services.privacy.chain import Entry


def spent(folder: Path, charges: int = 2) -> list[Entry]:
    """A ledger with a released job and a charged one; its chain."""
    folder.mkdir(exist_ok=True)
    ledger = SqliteLedger(folder, FakeClock(), Limit())
    for job in ("unused", "used"):
        ledger.reserve(Reservation(job, "a" * 64, "north", True, 0.2, 1e-6, 4, 3, 2, ("h1", "h2"), "d" * 64))
    ledger.release("unused")
    for number in range(1, charges + 1):
        ledger.charge(AttemptId("used", 1, number), measured=False)
    return read_entries(folder)


def verdict(folder: Path, entries: list[Entry], *, signed: bool = True, uncharged: int = 0) -> Verdict:
    reported = ReportedLedgers((Reported("north", tuple(entries), signed, uncharged),))
    (found,) = compare_ledgers({"north": folder}, reported)
    return found


def test_the_registrys_entries_say_what_the_ledger_says(tmp_path: Path) -> None:
    entries = spent(tmp_path)
    assert rows_of(entries) == read_ledger(tmp_path)
    assert [(row.charged, row.released) for row in rows_of(entries)] == [(0, True), (2, False)]


def test_equal_and_not_reported_yet(tmp_path: Path) -> None:
    entries = spent(tmp_path)
    assert verdict(tmp_path, entries) == Verdict("north", 5, 5, True, 0, True, "equal")
    assert verdict(tmp_path, entries[:3]).text == "2 not reported yet"
    assert verdict(tmp_path, entries[:3]).agrees
    assert verdict(tmp_path, [], signed=False).agrees
    # Both charges are on their way: three contributions would be one too many.
    assert verdict(tmp_path, entries[:3], uncharged=2).agrees
    assert not verdict(tmp_path, entries[:3], uncharged=3).agrees


def test_differences(tmp_path: Path) -> None:
    entries = spent(tmp_path)
    older, other = tmp_path / "older", tmp_path / "other"
    spent(older, charges=1)
    another = spent(other, charges=1)
    SqliteLedger(other, FakeClock(), Limit()).charge(AttemptId("used", 9, 1), measured=False)
    altered = [*entries[:-1], replace(entries[-1], body=another[-1].body)]
    for found, text in (
        (verdict(older, entries), "older"),
        (verdict(other, entries), "another history"),
        (verdict(tmp_path / "none", entries), "older"),
        (verdict(tmp_path, entries, signed=False), "not what the hospital signed"),
        (verdict(tmp_path, altered), "not what the hospital signed"),
        (verdict(tmp_path, entries[1:]), "not what the hospital signed"),
        (verdict(tmp_path, entries, uncharged=1), "without a charge"),
    ):
        assert not found.agrees
        assert text in found.text


@pytest.mark.parametrize("known", [True, False])
def test_a_hospital_on_one_side_only(tmp_path: Path, known: bool) -> None:
    entries = spent(tmp_path)
    if known:
        (found,) = compare_ledgers({}, ReportedLedgers((Reported("north", tuple(entries), True, 0),)))
        assert (found.own, found.agrees) == (0, False)
    else:
        (found,) = compare_ledgers({"north": tmp_path}, ReportedLedgers(()))
        assert (found.text, found.agrees) == ("5 not reported yet", True)


def test_copies_are_checked_by_themselves(tmp_path: Path) -> None:
    entries = tuple(spent(tmp_path))
    for copy, signed, uncharged, agrees, text in (
        (entries, True, 0, True, "whole and signed"),
        ((), False, 0, True, "whole and signed"),
        (entries, False, 0, False, "not what the hospital signed"),
        (entries[1:], True, 0, False, "not what the hospital signed"),
        (entries, True, 1, False, "without a reported charge"),
    ):
        (found,) = check_copies(ReportedLedgers((Reported("north", copy, signed, uncharged),)))
        assert (found.agrees, found.own) == (agrees, None)
        assert text in found.text
