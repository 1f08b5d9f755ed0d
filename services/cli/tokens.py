"""Tokens of invitations: `fedmesh-enrol.<hospital>.<43 characters>`. The registry has their SHA-256 only."""

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.common.config import read_secret
from services.common.errors import Code, FedmeshError

_TOKEN: Final = re.compile(r"fedmesh-enrol\.(?P<hospital>[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)\.[A-Za-z0-9_-]{43}")
# 256 bits: 43 characters.
_RANDOM_BYTES: Final = 32


@dataclass(frozen=True)
class Token:
    """The text of a token and the hospital that it is for."""

    text: str
    hospital_id: str

    @property
    def sha256(self) -> str:
        """Hex, what the registry stores."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @staticmethod
    def generate(hospital_id: str) -> "Token":
        """A new random token."""
        return Token(f"fedmesh-enrol.{hospital_id}.{secrets.token_urlsafe(_RANDOM_BYTES)}", hospital_id)


def read_token(path: Path) -> Token:
    """The token in a file.

    Raises: FedmeshError(CONFIG_INVALID) for a file that is missing, open to other users, or holds no token.
    """
    text = read_secret(path)
    match = _TOKEN.fullmatch(text)
    if match is None:
        raise FedmeshError(
            Code.CONFIG_INVALID, f"{path} holds no token: it is one line, fedmesh-enrol.<hospital>.<43 characters>"
        )
    return Token(text, match["hospital"])
