"""The capacity model: its arithmetic on round numbers, what it refuses, and that the document has what it prints."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.capacity import measure
from loadtests.capacity.model import NODES, YEAR_S, Assumed, Round, Waiting, Year, round_at
from loadtests.capacity.reports import MEASURED, Reports
from loadtests.capacity.text import DOCUMENT, text, write
from loadtests.capacity.wire import checked, statements
from services.common.errors import FedmeshError
from services.secure_sum.wire import layout_of

ROOT = Path(__file__).parents[3]
ONE = Round(
    cohort=10,
    cpu_s={"registry": 1.0, "coordinator": 0.5, "aggregator": 2.0, "audit": 0.2, "PostgreSQL": 1.0, "Redis": 0.1},
    hospital_cpu_s=3.0,
    upload=1e6,
    sent=1.5e6,
    fetched=5e5,
    seconds=2.0,
)
# A round a second.
ASSUMED = Assumed(hospitals=100, models=YEAR_S / 10, rounds=10, params=1000, peak=3.0, filled=0.5, core_hour=1.0)
YEAR = Year(ASSUMED, ONE, Waiting(0.001, 0.1))


def report(params: int, cpu_s: float, **changed: Any) -> dict[str, Any]:
    return {
        "params": params,
        "hospitals": 10,
        "centre_cpu_by_service_s": {"registry": cpu_s},
        "stores_cpu_s": {"PostgreSQL": 1.0},
        "hospital_cpu_s": 2 * cpu_s,
        "upload_bytes_per_parameter": 4.0,
        "download_bytes_per_parameter": 8.0,
        "round_s": {"p50": 1.0},
        **changed,
    }


def test_work_follows_from_rounds() -> None:
    assert YEAR.per_second == pytest.approx(1.0)
    assert YEAR.turns == pytest.approx(8640)
    assert YEAR.cores("aggregator") == pytest.approx(6.0)
    assert YEAR.cores("coordinator") == pytest.approx(1.5 + 0.1)
    assert (YEAR.replicas("aggregator"), YEAR.replicas("audit")) == (12, 3)
    assert YEAR.shards == 2
    assert YEAR.in_flight == pytest.approx(6.0)
    assert YEAR.uploads_gb == pytest.approx(0.06)
    assert YEAR.private_models == pytest.approx(10)
    # Half of a core, and a turn every ten seconds, thrice as often in the busiest hour; three are cryptography.
    spare = replace(YEAR, assumed=replace(ASSUMED, node_cores=4.0))
    assert spare.training_room_s == pytest.approx(4 * 0.5 / 0.3 - 3)


def test_bytes_and_money_follow_from_rounds() -> None:
    assert YEAR.hospital_out_tb == pytest.approx(YEAR_S * (10 * 1.5e6 + 4000) / 1e12)
    assert YEAR.centre_out_tb == pytest.approx(YEAR_S * 10 * (5e5 + 4000) / 1e12)
    federated = YEAR.federated()
    # 6 registries, 4 coordinators, 12 aggregators, 3 audit services; 3 x 6 of PostgreSQL and 3 x 1 of Redis.
    assert federated["cores of the services"] == pytest.approx(25 * 8760)
    assert federated["cores of the stores"] == pytest.approx(21 * 8760)
    # A node's turn comes every ten seconds and takes three, thrice as often in the busiest hour, of half a core.
    assert federated[NODES] == pytest.approx(100 * 1.8 * 8760)
    spare = replace(YEAR, assumed=replace(ASSUMED, node_cores=4.0))
    assert spare.federated()[NODES] == pytest.approx(400 * 8760)
    assert YEAR.centralised()["data kept"] == pytest.approx(100 * 10 * 0.023 * 12)
    # On average half of the versions that the year ends with.
    assert federated["versions kept"] == pytest.approx(YEAR_S * 4000 / 1e9 / 2 * 0.24 * 12)


def test_the_break_even_is_where_the_federation_is_so_much_cheaper() -> None:
    extra = YEAR.break_even(0.4) * ASSUMED.hospitals
    both = sum(YEAR.centralised().values()) + extra
    assert sum(YEAR.federated().values()) == pytest.approx(0.6 * both)
    cheap = replace(YEAR, assumed=replace(ASSUMED, models=1.0, gb_hospital=1e6))
    assert cheap.break_even(0.4) == 0.0
    both = sum(YEAR.centralised(YEAR.even_at_gb(0.4)).values())
    assert sum(YEAR.federated().values()) == pytest.approx(0.6 * both)


def beside(_report: Any) -> tuple[float, float]:
    return 500.0, 700.0


def test_a_size_between_two_reports_costs_what_is_between() -> None:
    reports = [report(1000, 1.0), report(2000, 3.0), report(4000, 3.0)]
    found = round_at(reports, 1500, beside)
    assert found.cpu_s == {"registry": 2.0, "PostgreSQL": 1.0}
    assert (found.hospital_cpu_s, found.upload, found.sent, found.fetched) == (4.0, 6000.0, 6500.0, 12700.0)
    assert round_at(reports, 3000, beside).cpu_s["registry"] == 3.0
    # Beyond all of them the last line goes on.
    assert round_at([*reports[:2], report(4000, 4.0)], 8000, beside).cpu_s["registry"] == 6.0


@pytest.mark.parametrize(
    ("reports", "params"),
    [
        ([report(1000, 1.0)], 1000),
        ([report(1000, 1.0), report(2000, 1.0, hospitals=11)], 1500),
        ([report(1000, 1.0), report(2000, 1.0)], 900),
        ([report(1000, 1.0), report(2000, 1.0)], 20_001),
    ],
)
def test_reports_that_do_not_fit_are_refused(reports: list[dict[str, Any]], params: int) -> None:
    with pytest.raises(FedmeshError):
        round_at(reports, params, beside)


def test_a_check_fetches_a_segment_of_everybody_elses_upload() -> None:
    form = {"parameter_set": "bfv-n4096-q60-t48-v2", "lanes": 2, "hospitals": 15}
    small, large = ({**form, "params": params} for params in (10_000, 1_000_000))
    layout = layout_of("bfv-n4096-q60-t48-v2", 1_000_000, 2)
    # A small upload is one segment.
    assert checked(small) == 14 * layout_of("bfv-n4096-q60-t48-v2", 10_000, 2).upload_bytes
    assert checked(large) == pytest.approx(14 * layout.upload_bytes / layout.segments)


def test_statements_grow_with_the_cohort() -> None:
    (sent, fetched), (less_sent, less_fetched) = statements(15), statements(4)
    assert sent > less_sent > 0
    assert fetched > sent > less_fetched / 4


def test_a_folder_without_reports_is_refused(tmp_path: Path) -> None:
    for name in ("load", "machine"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"costs": []}))
    with pytest.raises(FedmeshError, match="not the reports that are needed"):
        Reports.read(tmp_path)


def test_the_document_has_what_the_command_prints() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    found = re.search(r"<!-- printed -->\n\n(.*)\n\n<!-- end -->", written, re.DOTALL)
    assert found is not None
    assert found[1] == text(Reports.read(MEASURED), Assumed())


def test_the_tables_are_written_between_the_marks_of_the_document(tmp_path: Path) -> None:
    document = tmp_path / "capacity.md"
    document.write_text("before\n<!-- printed -->\n\nold\n\n<!-- end -->\nafter\n")
    write("new", document)
    assert document.read_text() == "before\n<!-- printed -->\n\nnew\n\n<!-- end -->\nafter\n"


def test_beside_a_report_is_noted_how_busy_the_machine_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED", tmp_path)
    monkeypatch.setattr(measure, "LOOK_S", 0.05)
    program = "import sys, pathlib; pathlib.Path(sys.argv[2]).write_text('{}'); sys.exit(%d)"
    assert measure.measured("rounds-1", [sys.executable, "-c", program % 0])
    assert not measure.measured("load", [sys.executable, "-c", program % 1])
    found = json.loads((tmp_path / "machine.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load.json", "machine.json", "rounds-1.json"]
    assert list(found) == ["load", "rounds-1"]
    assert all(0 <= machine["others_cores"] <= machine["cores"] for machine in found.values())


def test_bad_figures_are_refused_by_name() -> None:
    argv = [sys.executable, "-m", "loadtests.capacity", "--filled", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert "--filled is at most 1" in done.stderr
