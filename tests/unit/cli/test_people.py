"""Signing in again."""

from pathlib import Path

import pytest

from services.cli import people, session
from services.common.people.device import Client, Tokens


def test_login_without_options_goes_where_the_session_before_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    client = Client("https://idp.example/realms/consortium", "fedmesh-cli", "openid", "id", tmp_path / "ca.pem")
    # Over, and never renewed: who signs in anew does so because of that.
    session.save(client, Tokens(bearer="a", refresh=None, ends_at=0.0))
    assert people._client_before() == client
