"""The tokens of the person at this terminal, in a file that only they can read."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from services.common.config import require_private
from services.common.errors import Code, FedmeshError
from services.common.people.device import Client, Device, Tokens

# A token is renewed when it has less time than this left, in seconds.
_EARLY_S: Final = 30.0


def session_file() -> Path:
    """Where the session is kept: `FEDMESH_SESSION`, else below the user's configuration folder."""
    named = os.environ.get("FEDMESH_SESSION")
    return Path(named) if named else config_folder() / "session.json"


def config_folder() -> Path:
    """The user's own folder of this command's files."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fedmesh"


def save(client: Client, tokens: Tokens) -> Path:
    """Keep a session; the file is never readable by others, not even for a moment."""
    path = session_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    kept = {"client": {**asdict(client), "ca": str(client.ca) if client.ca else None}, "tokens": asdict(tokens)}
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(kept, file)
    fresh.replace(path)
    return path


def load() -> tuple[Client, Tokens] | None:
    """The session, or None when nobody has signed in.

    Raises: FedmeshError(CONFIG_INVALID) when its file is open to others or not a session.
    """
    path = session_file()
    if not path.exists():
        return None
    require_private(path, "the session")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        client, tokens = Client(**kept["client"]), Tokens(**kept["tokens"])
        return replace(client, ca=Path(client.ca) if client.ca else None), tokens
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} is not a session: run `fedmesh login`") from error


def bearer(issuer: str | None = None) -> str | None:
    """The token to send with a call, renewed if it is about to end; None when nobody has signed in.

    issuer: of this one only, so that the token of one consortium is never shown to another.

    Raises: FedmeshError(UNAUTHENTICATED) when it is over and cannot be renewed, as `load` and `Device` otherwise.
    """
    session = load()
    if session is None:
        return None
    client, tokens = session
    if issuer not in (None, client.issuer):
        return None
    if tokens.ends_at - time.time() > _EARLY_S:
        return tokens.bearer
    if tokens.refresh is None:
        raise FedmeshError(Code.UNAUTHENTICATED, "the sign-in is over: run `fedmesh login`")
    renewed = Device(client).refresh(tokens.refresh)
    save(client, renewed)
    return renewed.bearer


def bearer_if_any(issuer: str | None = None) -> str | None:
    """The token to send with a call, or None: a stack may need none, and one that does says so when it refuses."""
    try:
        return bearer(issuer)
    except FedmeshError as error:
        if error.code in (Code.UNAUTHENTICATED, Code.SERVICE_UNAVAILABLE):
            return None
        raise
