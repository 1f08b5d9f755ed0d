"""The node as a process: settings, signals, health."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.process import run_process
from services.embedded.ca import create_ca
from services.embedded.processes import free_port
from services.hospital_node.config import HospitalConfig, check_config
from services.hospital_node.main import main
from services.hospital_node.probe import CONNECTED_SERVICE
from services.hospital_node.store.state import open_data_dir
from services.secure_sum.roster import MemberKeys
from tests.support.hospital import found_roster, hospital_config

ROOT = Path(__file__).parents[3]


class Home:
    def __init__(self, folder: Path) -> None:
        self.ca = create_ca(folder / "ca", "consortium")
        target = f"127.0.0.1:{free_port()}"
        self.keys = [MemberKeys.generate(name) for name in ("north", "south", "west", "east")]
        found_roster(folder / "roster.json", "consortium", self.keys)
        self.config = hospital_config(
            folder, self.keys[0], target, self.ca.issue_hospital("north"), folder / "roster.json", folder
        )
        self.file = folder / "north" / "hospital.yaml"

    def change(self, **settings: Any) -> None:
        document = yaml.safe_load(self.file.read_text())
        self.file.write_text(yaml.safe_dump({**document, **settings}))

    def run(self, *arguments: str) -> int:
        """The command line, in this process; its exit code."""
        return run_process(
            "hospital_node", HospitalConfig, main, ["--config", str(self.file), *arguments], check=check_config
        )

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "services.hospital_node", "--config", str(self.file)]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_check_config(home: Home) -> None:
    command = [sys.executable, "-m", "services.hospital_node", "--config", str(home.file), "--check-config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not home.config.data_dir.exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"hospital_id": "south"}, "belongs to spiffe://consortium/hospital/north"),
        ({"data": {"file": "missing.parquet"}}, "missing.parquet"),
        ({"privacy": {"epsilon_limit": -1}}, "epsilon_limit"),
        ({"privacy": {"epsilon": 1}}, "privacy.epsilon"),
        ({"privacy": {"epsilon_limit": 0.6}}, "it needs privacy.approval"),
        ({"population": "North Ward"}, "population"),
    ],
)
def test_wrong_settings(home: Home, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], word: str) -> None:
    home.change(**settings)
    assert home.run("--check-config") == 78
    assert word in capsys.readouterr().err


def test_keys_that_others_can_read_or_that_are_not_its_own(
    home: Home, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def complaint() -> str:
        assert home.run("--check-config") == 78
        return capsys.readouterr().err

    home.config.member_keys.chmod(0o640)
    assert "chmod 600" in complaint()
    home.config.member_keys.chmod(0o600)
    home.keys[1].save(tmp_path / "south.keys")
    home.change(member_keys=str(tmp_path / "south.keys"))
    assert "are south's" in complaint()
    home.change(member_keys=str(home.config.member_keys))
    home.config.tls.key.chmod(0o644)
    assert "the private key" in complaint()


def test_a_founding_roster_that_one_did_not_sign(
    home: Home, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = json.loads(home.config.roster.read_text())
    document["signatures"].pop()
    (tmp_path / "odd.json").write_text(json.dumps(document))
    home.change(roster=str(tmp_path / "odd.json"))
    assert home.run("--check-config") == 78
    assert "did not sign" in capsys.readouterr().err


def test_a_service_certificate_is_not_a_hospitals(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    tls = home.ca.issue_service("north")
    home.change(tls={name: str(path) for name, path in tls.model_dump().items()})
    assert home.run("--check-config") == 78
    assert "spiffe://consortium/service/north" in capsys.readouterr().err


def test_second_node_on_the_same_folder(home: Home) -> None:
    descriptor = open_data_dir(home.config.data_dir)
    command = [sys.executable, "-m", "services.hospital_node", "--config", str(home.file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    os.close(descriptor)
    assert done.returncode == 1
    assert "another hospital node" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_an_unconnected_node(home: Home, number: int) -> None:
    port = free_port()
    home.change(health_listen=f"127.0.0.1:{port}", metrics_listen=f"127.0.0.1:{free_port()}")
    process = home.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            alive = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30)
            assert alive.status == health_pb2.HealthCheckResponse.SERVING
            time.sleep(0.1)
            request = health_pb2.HealthCheckRequest(service=CONNECTED_SERVICE)
            assert stub.Check(request, timeout=5).status == health_pb2.HealthCheckResponse.NOT_SERVING
        process.send_signal(number)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_an_idle_node_has_not_loaded_training(home: Home) -> None:
    script = (
        "import sys, services.hospital_node.main\n"
        "heavy = {'tensorflow', 'tensorflow_federated', 'duckdb', 'scipy', 'dp_accounting', 'opendp', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
