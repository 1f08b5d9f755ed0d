"""Debian's Prometheus, as `scripts/fetch_prometheus.sh` brings it along, or as it stands on PATH."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.embedded.processes import free_port

_FETCHED = Path(__file__).parents[2] / ".tools" / "prometheus" / "usr" / "bin"


def program(name: str) -> str:
    """A program of Prometheus; the test is skipped where there is none, and says what would bring it."""
    found = shutil.which(name) or (str(_FETCHED / name) if (_FETCHED / name).exists() else None)
    if found is None:
        pytest.skip(f"no {name}: run scripts/fetch_prometheus.sh, or install Debian's prometheus")
    return found


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    address: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, query: str, at: float) -> list[float]:
        """The values of a query at a moment (Unix seconds), by series."""
        return [float(item["value"][1]) for item in self.ask("query", query=query, time=str(at))["result"]]

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def scraping(folder: Path, targets: Mapping[str, str], rules: list[Path]) -> Iterator[Prometheus]:
    """A server that reads every process's metrics once a second, and evaluates rules as often."""
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {
                "job_name": "fedmesh",
                "static_configs": [
                    {"targets": [target], "labels": {"namespace": "mesh", "pod": name}}
                    for name, target in targets.items()
                ],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={folder}/data", "--enable-feature=exemplar-storage"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            server = Prometheus(address)
            while not server.healthy():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait(30)
