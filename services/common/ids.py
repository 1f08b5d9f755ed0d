"""Identifiers: how they are made and what they may look like."""

import re
import uuid
from typing import Final

from services.common.errors import Code, FedmeshError

# Names appear in certificates, Redis keys, file names and log lines: one conservative alphabet fits all of them.
NAME: Final = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
SHA256_HEX: Final = re.compile(r"^[0-9a-f]{64}$")


def new_id() -> str:
    """A fresh random UUID (version 4), lower-case with dashes."""
    return str(uuid.uuid4())


def is_uuid(value: str) -> bool:
    """Whether text is a canonical UUID."""
    try:
        return str(uuid.UUID(value)) == value
    except ValueError:
        return False


def require_uuid(value: str, field: str) -> uuid.UUID:
    """Parse a canonical UUID.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the field.
    """
    try:
        parsed = uuid.UUID(value)
    except ValueError:
        parsed = None
    if parsed is None or str(parsed) != value:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} must be a lower-case UUID like {new_id()}", field=field)
    return parsed


def require_name(value: str, field: str) -> str:
    """Check a name: 1 to 63 lower-case letters, digits and inner dashes (RFC 1123 label).

    Raises: FedmeshError(INVALID_ARGUMENT) naming the field.
    """
    if not NAME.fullmatch(value):
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"{field} must be 1 to 63 lower-case letters, digits or inner dashes",
            field=field,
        )
    return value


def require_sha256(value: str, field: str) -> str:
    """Check a SHA-256 digest written as 64 lower-case hex digits.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the field.
    """
    if not SHA256_HEX.fullmatch(value):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} must be a SHA-256 digest in 64 hex digits", field=field)
    return value


_DERIVED: Final = uuid.UUID("6f3d7a0e-7c1b-5b0e-9a53-6f1f6b8f5a10")


def derived_id(*parts: object) -> str:
    """The UUID (version 5) of a tuple of facts: whoever repeats a step after a crash names it the same."""
    return str(uuid.uuid5(_DERIVED, "/".join(str(part) for part in parts)))
