"""Rounds under the parameter set with a public key, on the stack of real services and real nodes."""

import json
import subprocess
from pathlib import Path

import pytest

from services.secure_sum.parameters import BFV_N4096_Q60_T44_PK_V1
from tests.support.command import FEDMESH

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("lanes", [1, 2])
def test_every_sum_under_a_public_key_is_exact(tmp_path: Path, lanes: int) -> None:
    report = tmp_path / "report.json"
    command = [*FEDMESH, "bench", "secure-sum", "--parameters", BFV_N4096_Q60_T44_PK_V1.name, "--rounds", "1"]
    command += ["--hospitals", "4", "--params", "8192", "--lanes", str(lanes)]
    command += ["--dir", str(tmp_path / "bench"), "--report", str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    assert (found["exact"], found["parameter_set"]) == (True, BFV_N4096_Q60_T44_PK_V1.name)
    # c0 and c1, 7.5 bytes a coefficient each.
    assert found["upload_bytes_per_parameter"] == found["download_bytes_per_parameter"] == 15 / lanes
