"""Strict configuration."""

from pathlib import Path

import pytest

from services.common.config import PostgresConfig, Section, ServerConfig, load_config, read_secret
from services.common.errors import Code, FedmeshError
from services.common.process import EXIT_CONFIG, run_process


class Example(Section):
    name: str
    postgres: PostgresConfig


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_good_file_loads(tmp_path: Path) -> None:
    config = load_config(Example, write(tmp_path / "c.yaml", "name: x\npostgres: {dsn: host=/run}\n"))
    assert config.postgres.pool_max == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\npostgres: {dsn: a, pool_maximum: 3}\n", "postgres.pool_maximum"),
        ("name: x\npostgres: {dsn: a, pool_max: 0}\n", "postgres.pool_max"),
        ("name: x\n", "postgres"),
        ("[1, 2]\n", "mapping"),
        ("name: [unclosed\n", "not valid YAML"),
    ],
)
def test_a_bad_file_names_what_is_wrong(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(FedmeshError, match=expected) as caught:
        load_config(Example, write(tmp_path / "c.yaml", text))
    assert caught.value.code is Code.CONFIG_INVALID


@pytest.mark.parametrize("address", ["7000", "host", "host:port", "a b:1"])
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(ValueError, match="listen"):
        ServerConfig.model_validate({"listen": address, "tls": {"ca": "a", "certificate": "b", "key": "c"}})


def test_a_secret_open_to_others_is_refused(tmp_path: Path) -> None:
    secret = write(tmp_path / "s", "hunter2\n")
    secret.chmod(0o644)
    with pytest.raises(FedmeshError, match="chmod 600"):
        read_secret(secret)
    secret.chmod(0o600)
    assert read_secret(secret) == "hunter2"


def test_a_group_may_read_a_secret_that_root_put_there_for_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So Kubernetes mounts a Secret: root's, readable by the group of the pod."""
    secret = write(tmp_path / "s", "hunter2\n")
    owner = secret.stat().st_uid
    secret.chmod(0o440)
    monkeypatch.setattr("services.common.config.os.geteuid", lambda: owner + 65532)
    if owner == 0:
        assert read_secret(secret) == "hunter2"
    for mode in (0o444, 0o460, 0o441):
        secret.chmod(mode)
        with pytest.raises(FedmeshError, match="open to other users"):
            read_secret(secret)
    monkeypatch.undo()
    secret.chmod(0o440)
    with pytest.raises(FedmeshError, match="open to other users"):
        read_secret(secret)


async def _never(_config: Example) -> None:
    raise AssertionError("must not run")


def test_check_config_says_ok_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "c.yaml", "name: x\npostgres: {dsn: a}\n")
    assert run_process("example", Example, _never, ["--config", str(good), "--check-config"]) == 0
    assert "OK" in capsys.readouterr().out
    bad = write(tmp_path / "d.yaml", "name: x\n")
    assert run_process("example", Example, _never, ["--config", str(bad), "--check-config"]) == EXIT_CONFIG
    assert "postgres" in capsys.readouterr().err
