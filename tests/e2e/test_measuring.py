"""The commands that simulate and measure, from outside, on little data with the shipped plans."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from services.cli.main import app
from services.demo.synthetic import generate

pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    generate(folder, (600, 400, 300, 200))
    (folder / "source.txt").write_text("synthetic\n")
    return folder


def test_a_curve_is_drawn_reported_and_explained(tmp_path: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run(
        *("plan", "tradeoff", "readmission-logistic-private", "--data", str(cohort)),
        *("--epsilon", "0.5,5", "--seeds", "2", "--out", "curve.png", "--report", "curve.json"),
    )
    assert "SYNTHETIC" in shown
    assert "Recommended: epsilon" in shown
    report = json.loads(Path("curve.json").read_text())
    assert [len(point["auroc"]["values"]) for point in report["points"]] == [2, 2]
    assert (report["hospitals"], report["synthetic"], report["colluders"]) == (4, True, 1)
    with Image.open("curve.png") as image:
        assert image.size == (1600, 800)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_a_hospital_is_measured_and_its_data_removed(tmp_path: Path) -> None:
    run("bench", "hospital", "--patients", "3000", "--dir", str(tmp_path), "--report", str(tmp_path / "hospital.json"))
    report = json.loads((tmp_path / "hospital.json").read_text())
    assert report["patients"] == 3000 < report["encounters"]
    assert set(report["phase_s"]) == {"read", "features", "train_clip_sum", "noise", "encrypt"}
    # Python with DuckDB and TensorFlow's library; the kernel's pages, not an empty sample.
    assert 100 < report["peak_rss_mb"] < report["memory_limit_mb"] == 2048
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiled", "hospital.json"]


def test_training_is_compared_with_the_pooled_data(tmp_path: Path, cohort: Path) -> None:
    shown = run(
        "bench", "training", "--data", str(cohort), "--dir", str(tmp_path), "--report", str(tmp_path / "t.json")
    )
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["ratio"] == pytest.approx(report["pooled_s"] / report["critical_path_s"])
    assert report["hospital_mean_s"] <= report["critical_path_s"]
    assert f"{report['ratio']:.2f} x" in shown
