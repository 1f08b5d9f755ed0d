"""Signed statements about a model version: in-toto Statement v1 in a DSSE envelope (secure-systems-lab/dsse, v1.0.2).

The signature is Ed25519 over the pre-authentication encoding of the payload, so a verifier never has to guess which
bytes were meant. `keyid` is the name and id of the key as in a signed note; it is a hint, and proves nothing.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.common.errors import Code, FedmeshError
from services.transparency.canonical import canonical_json, parse_json
from services.transparency.checkpoint import SigningKey, VerifierKey

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
VERSION_PREDICATE: Final = "urn:fedmesh:predicate:model-version:v1"
"""How a version came to be: made by the registry in the transaction that commits the round."""
VERDICT_PREDICATE: Final = "urn:fedmesh:predicate:promotion-checks:v1"
"""The checks of a version as they stood when somebody proposed or approved its promotion."""
WAIVABLE: Final = frozenset({"divergence"})
"""Checks whose failure two people may set aside, for a reason that the verdict states under `waived`."""
MAX_BYTES: Final = 256 * 1024


@dataclass(frozen=True)
class Statement:
    """An in-toto statement about one artefact. sha256: its digest in hex. predicate: values of canonical JSON."""

    subject: str
    sha256: str
    predicate_type: str
    predicate: dict[str, Any]

    def to_bytes(self) -> bytes:
        return canonical_json(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": self.subject, "digest": {"sha256": self.sha256}}],
                "predicateType": self.predicate_type,
                "predicate": self.predicate,
            }
        )


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """PAE of DSSE: what is signed."""
    kind = payload_type.encode()
    return b" ".join((b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload))


def sign_statement(statement: Statement, key: SigningKey) -> bytes:
    """The envelope (canonical JSON) of a statement; the same statement and key give the same bytes.

    Raises: ValueError when the predicate has no canonical spelling.
    """
    payload = statement.to_bytes()
    signature = key.private.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": key_id(key.verifier), "sig": base64.b64encode(signature).decode()}],
        }
    )


def claimed_predicate(envelope: bytes) -> dict[str, Any]:
    """The predicate of an envelope as it stands there, no signature checked: for whoever made it or checked it before.
    Empty when there is none.
    """
    try:
        value = parse_json(envelope) if envelope else {}
        predicate = parse_json(base64.b64decode(value["payload"], validate=True))["predicate"]
    except (ValueError, KeyError, TypeError):
        return {}
    return predicate if isinstance(predicate, dict) else {}


def open_statement(envelope: bytes, verifier: VerifierKey, predicate_type: str) -> Statement:
    """The statement of an envelope, once the signature of `verifier` over it is checked.

    Raises: FedmeshError(PROOF_INVALID) when the envelope is malformed, not signed by this key, or says another kind of
        thing.
    """
    try:
        value = parse_json(envelope) if len(envelope) <= MAX_BYTES else {}
        payload = base64.b64decode(value["payload"], validate=True)
        signatures = [base64.b64decode(item["sig"], validate=True) for item in value["signatures"]]
        kind = value["payloadType"]
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise _invalid("the attestation is no DSSE envelope") from error
    if kind != PAYLOAD_TYPE:
        raise _invalid(f"the envelope holds {str(kind)[:80]!r}, not {PAYLOAD_TYPE}")
    # Every signature is tried, whatever its hint says.
    if not any(_verifies(verifier, one, pre_authentication_encoding(kind, payload)) for one in signatures[:16]):
        raise _invalid(f"the attestation is not signed by {key_id(verifier)}")
    return _read(payload, predicate_type)


def key_id(verifier: VerifierKey) -> str:
    return f"{verifier.name}+{verifier.key_id.hex()}"


def readable(envelope: bytes) -> str:
    """The statement in an envelope as indented JSON, for people; nothing is verified."""
    return json.dumps(json.loads(base64.b64decode(json.loads(envelope)["payload"])), indent=2)


def _read(payload: bytes, predicate_type: str) -> Statement:
    try:
        value = parse_json(payload)
        [subject] = value["subject"]
        statement = Statement(
            str(subject["name"]), str(subject["digest"]["sha256"]), str(value["predicateType"]), value["predicate"]
        )
        if value["_type"] != STATEMENT_TYPE or not isinstance(statement.predicate, dict):
            raise ValueError("another type")
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid("the envelope holds no in-toto statement v1 of one subject") from error
    if statement.predicate_type != predicate_type:
        raise _invalid(f"the statement is of type {statement.predicate_type[:80]!r}, not {predicate_type}")
    return statement


def _verifies(verifier: VerifierKey, signature: bytes, signed: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(verifier.public).verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _invalid(message: str) -> FedmeshError:
    return FedmeshError(Code.PROOF_INVALID, message)
