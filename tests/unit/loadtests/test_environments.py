"""Making a peer's environment: once, and with an error that says what to do when packages cannot be had."""

import shutil
from pathlib import Path

import pytest

from loadtests.peers import environments
from services.common.errors import Code, FedmeshError

FAKE_UV = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
[ "$1" = venv ] && mkdir -p "$6"
[ "$1" = pip ] && [ -e "$(dirname "$0")/offline" ] && { echo "error: Failed to fetch" >&2; exit 2; }
exit 0
"""


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for uv in a repository of its own; it writes down its calls."""
    tools = tmp_path / ".tools" / "bin"
    tools.mkdir(parents=True)
    (tools / "uv").write_text(FAKE_UV)
    (tools / "uv").chmod(0o755)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "CACHE", tmp_path / ".cache" / "peers")
    return tools


def test_an_environment_is_made_once(uv: Path) -> None:
    told: list[str] = []

    home = environments.prepare("flower", told.append)
    again = environments.prepare("flower", told.append)

    assert home == again
    assert len(told) == 1
    assert [line.split()[0] for line in (uv / "calls").read_text().splitlines()] == ["venv", "pip"]


def test_without_network_the_error_says_what_to_do_and_the_next_try_starts_over(uv: Path) -> None:
    (uv / "offline").touch()
    with pytest.raises(
        FedmeshError, match=r"PyPI: connect to it, or point UV_DEFAULT_INDEX.*Failed to fetch"
    ) as caught:
        environments.prepare("nvflare", lambda _line: None)
    assert caught.value.code is Code.SERVICE_UNAVAILABLE

    (uv / "offline").unlink()
    environments.prepare("nvflare", lambda _line: None)
    assert len((uv / "calls").read_text().splitlines()) == 4


def test_without_uv_the_error_names_the_target_that_brings_it(uv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(uv)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FedmeshError, match="make setup"):
        environments.prepare("flower", lambda _line: None)
