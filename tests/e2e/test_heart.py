"""The demonstration on files in the form of UCI Heart Disease, twice over: what the report and the folder have then."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from services.embedded.stack import Stack
from services.hospital_node.store.personal import PERSONAL_FOLDER, load_personal
from services.hospital_node.training.state import read_state
from services.plans.library import shipped_plan
from services.secure_sum.roster import MemberKeys
from tests.support.command import FEDMESH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Shift of the log-odds at each hospital: what a shared intercept cannot say.
SHIFTS = {"cleveland": 0.0, "hungarian": -2.0, "switzerland": 2.5, "va": 1.0}


def write_files(folder: Path) -> None:
    rng = np.random.default_rng(7)
    for hospital, shift in SHIFTS.items():
        lines = []
        for _ in range(150):
            age, pain, depression = rng.integers(35, 75), rng.integers(1, 5), rng.integers(0, 30) / 10
            ill = rng.random() < 1 / (1 + np.exp(-(1.5 * (depression - 1.5) + shift)))
            cells: list[object] = [age, rng.integers(0, 2), pain, rng.integers(100, 180), rng.integers(150, 400), 0, 0]
            cells += [rng.integers(90, 180), 0, f"{depression:g}", "?", "?", "?", int(ill)]
            lines.append(",".join(map(str, cells)))
        (folder / f"processed.{hospital}.data").write_text("\n".join(lines) + "\n")


def test_two_runs_at_four_hospitals_with_models_of_their_own(tmp_path: Path) -> None:
    write_files(tmp_path)
    command: list[object] = [
        *FEDMESH,
        "demo",
        "--data",
        tmp_path,
        "--seeds",
        "2",
        "--rounds",
        "3",
        "--dir",
        tmp_path / "demo",
    ]
    command += ["--report", tmp_path / "r.json", "--predictions", tmp_path / "p.csv"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "one release, imagined 2 times" in " ".join(done.stdout.split())
    report = json.loads((tmp_path / "r.json").read_text())
    test = report["test"]
    assert (report["dataset"], report["hospitals"], report["rounds"], report["seeds"]) == ("heart", 4, 3, 2)
    assert set(report["test_sd"]) == set(test)
    assert test["accuracy_client_mean_personalised"] > test["accuracy_client_mean"] > 0.5
    assert report["test_sd"]["n_patients"] == 0
    assert report["personal_models"] >= 1
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + test["n_encounters"]

    stack, plan = Stack(tmp_path / "demo" / "stack"), shipped_plan("heart-logistic")
    names = [f"hospital-{name}" for name in SHIFTS]
    for name in names:
        folder = stack.hospital_data(name) / PERSONAL_FOLDER
        for reader in names:
            keys = MemberKeys.load(stack.member_keys(reader))
            if reader == name:
                model = load_personal(folder, keys, report["job_id"], 3)
                assert model is not None
                assert read_state(model, plan).updates == 3
            else:
                with pytest.raises(Exception, match="damaged"):
                    load_personal(folder, keys, report["job_id"], 3)
