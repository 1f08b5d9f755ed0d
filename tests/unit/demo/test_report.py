"""Several runs in one report: means, deviations, and what is not averaged."""

import io
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from services.demo.datasets import DemoData
from services.demo.evaluation import Accuracy, LocalOnly, TestScores, accuracy, score, with_personal
from services.demo.promotion import Checked, Promotion
from services.demo.report import PrivacyFacts, Report, Results, write_report
from services.demo.summary import print_summary
from services.hospital_node.sources.dataset import Rows
from services.privacy.noise import Guarantee

AUROCS = (0.61, 0.64, 0.70)
DATA = DemoData("synthetic", Path("rows"), Path("partition"), ("0", "1", "2", "3"), synthetic=True)


def report(auroc: float, wall_s: float, memory: float) -> Report:
    return Report(
        dataset="synthetic",
        hospitals=4,
        plan="readmission-logistic-private",
        job_id=f"job-{auroc}",
        rounds=3,
        burnt_rounds=0,
        model_version=3,
        test=TestScores(auroc, 0.2, 0.1, 0.15, 1200, 800),
        local_only=LocalOnly(auroc - 0.1, 0.5, 0.1, 0.1),
        privacy=PrivacyFacts(Guarantee(0.5, 1e-6, 1), Guarantee(0.4, 1e-6, 1), 3),
        wall_s=wall_s,
        startup_s=10.0,
        round_overhead_s=(1.0, 2.0),
        peak_memory_mb=memory,
        upload_bytes=100,
        parameters=10,
        processes=10,
        audit_entries=99,
    )


RUNS = tuple(
    report(auroc, wall_s, memory) for auroc, wall_s, memory in zip(AUROCS, (50, 60, 40), (9, 8, 7), strict=True)
)


def test_several_runs_give_means_and_sample_deviations(tmp_path: Path) -> None:
    write_report(Results(RUNS), tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["seeds"] == 3
    assert written["test"]["auroc"] == pytest.approx(statistics.mean(AUROCS))
    assert written["test_sd"]["auroc"] == pytest.approx(statistics.stdev(AUROCS))
    assert set(written["test_sd"]) == set(written["test"])
    assert (written["test"]["brier"], written["test_sd"]["brier"]) == (0.1, 0.0), "the same everywhere"
    assert written["local_only"]["auroc_mean"] == pytest.approx(statistics.mean(AUROCS) - 0.1)
    assert (written["wall_s"], written["peak_memory_mb"], written["job_id"]) == (150.0, 9.0, "job-0.7")
    assert json.dumps(written["test"]["n_encounters"]) == "1200", "a count stays a whole number"


def test_one_run_is_reported_as_it_is(tmp_path: Path) -> None:
    write_report(Results(RUNS[:1]), tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["test"] == RUNS[0].test.as_dict()
    assert not {"seeds", "test_sd"} & set(written)


@pytest.mark.parametrize("private", [True, False])
def test_the_summary_says_what_the_deviation_is_of(private: bool) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    runs = RUNS if private else tuple(replace(run, privacy=None) for run in RUNS)
    print_summary(console, Results(runs), Path("demo"), DATA)
    text = console.export_text()
    assert f"{statistics.mean(AUROCS):.4f}" in text
    assert f"{statistics.stdev(AUROCS):.4f}" in text
    assert "one release, imagined 3 times" in text
    assert ("the noise, drawn afresh" in text) == private
    print_summary(console, Results(runs[:1]), Path("demo"), DATA)
    assert "imagined" not in console.export_text()


@pytest.mark.parametrize(("folder", "where"), [(".fedmesh/demo", ""), ("/tmp/else where", " --dir '/tmp/else where'")])
def test_what_to_look_at_next_is_found_where_the_demo_ran(folder: str, where: str) -> None:
    console = Console(width=40, record=True, file=io.StringIO())
    print_summary(console, Results(RUNS[:1]), Path(folder), DATA)
    lines = console.export_text().splitlines()
    for command in (f"rounds{where}", f"privacy ledger{where}", "audit verify LOG"):
        assert any(f"fedmesh {command}  " in line for line in lines), "one line each, ready to be copied"


@pytest.mark.parametrize(("f", "lowered"), [(0, True), (1, False)])
def test_the_summary_says_when_hospitals_agreed_to_fewer_colluders(f: int, lowered: bool) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    facts = PrivacyFacts(Guarantee(0.5, 1e-6, f), Guarantee(0.4, 1e-6, f), 3)
    print_summary(console, Results((replace(RUNS[0], privacy=facts),)), Path("demo"), DATA)
    text = console.export_text()
    assert f"(epsilon 0.5, delta 1e-06, f {f}), against the centre and {f} colluding hospitals" in text
    assert ("agreed to f = 0 (privacy.least_colluders); by default they demand 1" in text) == lowered


def test_accuracy_is_reported_where_it_says_something() -> None:
    y = np.array([1, 0, 1, 1, 0, 1], dtype=np.float32)
    probability = np.array([0.9, 0.2, 0.4, 0.7, 0.8, 0.51])
    figures = accuracy(y, probability, np.array([0, 0, 0, 0, 1, 1]))
    # Three of four right at the first hospital, one of two at the second.
    assert figures.client_mean == pytest.approx(0.625)
    assert figures.pooled == pytest.approx(4 / 6)
    judged = replace(RUNS[0], test=replace(RUNS[0].test, accuracy=Accuracy(0.625, 0.75)))
    assert judged.as_dict()["test"]["accuracy_client_mean"] == 0.625
    assert "accuracy_pooled" not in RUNS[0].as_dict()["test"]
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(console, Results((judged,)), Path("demo"), DATA)
    text = console.export_text()
    assert "0.6250" in text
    assert "own version" not in text


def test_personal_models_count_on_their_own_hospitals_rows() -> None:
    test = Rows(
        x=np.zeros((4, 1), dtype=np.float32),
        y=np.array([1, 1, 0, 0], dtype=np.float32),
        patient=np.arange(4),
        patients=4,
        encounter_ids=np.array(list("abcd"), dtype=np.object_),
        patient_ids=np.array(list("abcd"), dtype=np.object_),
    )
    owner = np.array([0, 0, 1, 1])
    shared = score(test.y, np.array([0.4, 0.6, 0.4, 0.6]), 4, owner)
    always, never = np.full(4, 0.9), np.array([0.1, 0.1, 0.1, 0.8])
    scores = with_personal(shared, test, owner, [always, never])
    # The first hospital says always 1, and is right twice; the second is right once in two.
    assert scores.as_dict()["accuracy_client_mean_personalised"] == pytest.approx(0.75)
    assert scores.as_dict()["accuracy_client_mean"] == pytest.approx(0.5)
    judged = replace(RUNS[0], test=scores, personal_models=1)
    assert judged.as_dict()["personal_models"] == 1
    assert "personal_models" not in RUNS[0].as_dict()
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(console, Results((judged, judged)), Path("demo"), DATA)
    text = console.export_text()
    assert "0.7500" in text
    assert "1 of 4 hospitals" in text


def test_the_summary_tells_what_was_checked_and_who_promoted_it() -> None:
    checked = (
        Checked("privacy", True, "", 0.46041, 0.5, at_least=False, signed_by=0),
        Checked("attestation", True, "", None, None, at_least=False, signed_by=0),
        Checked("subgroups", True, "", 0.031, 0.35, at_least=False, signed_by=4),
    )
    done = Promotion(3, checked, "alice", "bob", "hospital-00", "everything holds")
    blocked = replace(checked[2], passed=False, reason="a [group] is failed")
    shown = [
        " ".join(print_of(replace(RUNS[0], promotion=promotion)).replace("│", " ").split())
        for promotion in (
            done,
            Promotion(3, (*checked[:2], blocked)),
            replace(done, pulled_by="", pulled="9 entries are witnessed"),
        )
    ]
    assert "privacy 0.4605 most 0.5 passed registry" in shown[0], "what was spent is rounded up"
    assert "subgroups 0.031 most 0.35 passed 4 hospitals" in shown[0]
    assert "proposed by alice, approved by bob. hospital-00 pulled it and verified: everything holds." in shown[0]
    assert "Not promoted. subgroups: a [group] is failed" in shown[1]
    assert "proposed by" not in shown[1]
    assert "approved by bob. No hospital could pull it yet: 9 entries are witnessed." in shown[2]
    assert "Before promotion" not in print_of(replace(RUNS[0], promotion=None))


def print_of(run: Report) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    print_summary(console, Results((run,)), Path("demo"), DATA)
    return console.export_text()
