"""Public keys of a log, from files."""

from pathlib import Path

from services.common.errors import Code, FedmeshError
from services.transparency.checkpoint import VerifierKey, parse_verifier_key


def trusted_key(path: Path) -> VerifierKey:
    """The key in a file. Raises: FedmeshError(INVALID_ARGUMENT) when there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"cannot read the key file {path}: {error.strerror}; --key takes a file with the log's public key",
        ) from error
    try:
        return parse_verifier_key(text.strip())
    except FedmeshError as error:
        raise FedmeshError(error.code, f"{path} holds no public key of a log: {error.message}") from None
