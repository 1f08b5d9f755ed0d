"""What the registry keeps of an attempt whose survivors are stored, so that it can go on after Redis was lost."""

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.coordinator.domain.attempt import Attempt
from services.coordinator.domain.stored import attempt_json, parse_attempt, sealed_statement
from services.coordinator.shelf import advert_field, share_field, upload_field
from services.secure_sum.statements import Share, Signed, parse

MAX_BYTES: Final = 4 << 20
"""As much as the registry keeps."""

_VERSION: Final = 1
_MAX_PLAIN_BYTES: Final = 64 * 1024 * 1024


def pack(attempt: Attempt, adverts: Sequence[Signed], shares: Sequence[Signed], uploads: Sequence[Signed]) -> bytes:
    """gzip JSON of all of it; empty when it is larger than the registry takes, and then a loss burns the version."""
    content = {
        "version": _VERSION,
        "attempt": json.loads(attempt_json(attempt)),
        "adverts": [_plain(signed) for signed in adverts],
        "shares": [_plain(signed) for signed in shares],
        "uploads": [_plain(signed) for signed in uploads],
    }
    packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), compresslevel=1, mtime=0)
    return packed if len(packed) <= MAX_BYTES else b""


def unpack(content: bytes) -> tuple[Attempt, dict[str, bytes]]:
    """The attempt as it was when its survivors were listed, and its statements by field.

    Raises: FedmeshError(DATA_INVALID) when it cannot be read.
    """
    try:
        plain = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(content, _MAX_PLAIN_BYTES)
        value: dict[str, Any] = json.loads(plain)
        if value["version"] != _VERSION:
            raise ValueError("unknown version")
        attempt = parse_attempt(json.dumps(value["attempt"]).encode())
        statements: dict[str, bytes] = {}
        for signed in map(_signed, value["adverts"]):
            statements[advert_field(signed.hospital_id)] = sealed_statement(signed)
        for signed in map(_signed, value["shares"]):
            recipient = parse(Share, signed.statement).recipient
            statements[share_field(signed.hospital_id, recipient)] = sealed_statement(signed)
        # The survivors send these again; the list of them is checked against what is stored here.
        for signed in map(_signed, value["uploads"]):
            statements[upload_field(signed.hospital_id)] = sealed_statement(signed)
    except (zlib.error, ValueError, KeyError, TypeError, FedmeshError) as error:
        raise FedmeshError(Code.DATA_INVALID, "the stored record of the attempt cannot be read") from error
    return attempt, statements


def _plain(signed: Signed) -> list[str]:
    return [signed.hospital_id, signed.statement.decode("ascii"), signed.signature.hex()]


def _signed(value: list[str]) -> Signed:
    hospital_id, statement, signature = value
    return Signed(hospital_id, statement.encode("ascii"), bytes.fromhex(signature))
