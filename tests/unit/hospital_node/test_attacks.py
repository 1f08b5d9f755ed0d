"""Reports of attacks on a hospital's own rows: files, and the command that shows them."""

import json
import stat
import sys
from pathlib import Path

import pytest
import yaml

from services.cli.entry import main
from services.hospital_node.domain.attacks import Attacked, AttackReport
from services.hospital_node.store.attacks import ATTACKS_FOLDER, AttackFiles, load_reports

FOUND = (
    Attacked("threshold", "all", 1200, 300, 0.51234, 0.04),
    Attacked("logistic-regression", "positives", 120, 30, 0.6, 0.25),
)
FIRST = AttackReport("a" * 36, 12, "2026-03-01T10:00:00+00:00", FOUND)
SECOND = AttackReport("b" * 36, 5, "2026-04-01T10:00:00+00:00", ())


def test_one_report_a_job_is_kept_for_its_owner(tmp_path: Path) -> None:
    files = AttackFiles(tmp_path)
    assert not files.has(FIRST.job_id, 12)
    files.save(SECOND)
    files.save(FIRST)
    assert (files.has(FIRST.job_id, 12), files.has(FIRST.job_id, 11)) == (True, False)
    folder = tmp_path / ATTACKS_FOLDER
    assert load_reports(folder) == [FIRST, SECOND]
    files.save(AttackReport(FIRST.job_id, 13, FIRST.made_at, ()))
    assert [report.version for report in load_reports(folder)] == [13, 5]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    next(folder.iterdir()).write_text("{")
    assert len(load_reports(folder)) == 1


@pytest.mark.parametrize("job_id", ["../../escaped", "/escaped", "."])
def test_a_job_cannot_name_a_path(tmp_path: Path, job_id: str) -> None:
    (tmp_path / "node").mkdir()
    files = AttackFiles(tmp_path / "node")
    files.save(AttackReport(job_id, 1, FIRST.made_at, ()))
    assert files.has(job_id, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["node"]


def test_the_command_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = tmp_path / "node"
    node.mkdir()
    config = {
        "hospital_id": "hospital-01",
        "tls": {"ca": "ca.pem", "certificate": "tls.pem", "key": "tls.key"},
        **{name: {"target": "127.0.0.1:1"} for name in ("registry", "coordinator", "aggregator")},
        "population": "ward",
        **dict.fromkeys(("member_keys", "roster"), "absent"),
        "data_dir": str(node),
        "data": {"file": "data.csv"},
    }
    (tmp_path / "hospital.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("COLUMNS", "200")

    def shown(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedmesh", "hospital", "attacks", "--config", f"{config_path}", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    config_path = tmp_path / "hospital.yaml"
    assert "No attack was made yet" in shown()
    for report in (FIRST, SECOND):
        AttackFiles(node).save(report)
    table = shown()
    for text in ("aaaaaaaa/12", "1,200", "0.5123", "0.2500", "bbbbbbbb/5", "too few rows"):
        assert text in table
    (first, second) = json.loads(shown("--json"))
    assert (first["attacks"][0]["auc"], second["attacks"]) == (0.51234, [])
