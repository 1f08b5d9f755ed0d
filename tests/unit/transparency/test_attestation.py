"""DSSE envelopes and in-toto statements."""

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.errors import Code, FedmeshError
from services.transparency.attestation import (
    VERDICT_PREDICATE,
    VERSION_PREDICATE,
    Statement,
    open_statement,
    pre_authentication_encoding,
    readable,
    sign_statement,
)
from services.transparency.checkpoint import SigningKey, generate_key, load_signing_key
from services.transparency.findings import Finding, Findings, open_findings

SAID = Statement("model/job/1", "a" * 64, VERSION_PREDICATE, {"version": 1, "plan": {"plan_id": "b" * 64}})


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    generate_key(tmp_path / "key", "consortium.test/registry")
    return load_signing_key(tmp_path / "key")


def test_the_encoding_is_that_of_the_specification() -> None:
    # The example of the DSSE protocol, v1.0.2.
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_statement_comes_back_as_it_was_signed(key: SigningKey) -> None:
    envelope = sign_statement(SAID, key)
    assert sign_statement(SAID, key) == envelope
    assert open_statement(envelope, key.verifier, VERSION_PREDICATE) == SAID
    shown = json.loads(readable(envelope))
    assert shown["_type"] == "https://in-toto.io/Statement/v1"
    assert shown["subject"] == [{"digest": {"sha256": "a" * 64}, "name": "model/job/1"}]


def test_what_was_not_signed_is_refused(key: SigningKey, tmp_path: Path) -> None:
    envelope = sign_statement(SAID, key)
    value = json.loads(envelope)
    generate_key(tmp_path / "other", "consortium.test/registry")
    other = load_signing_key(tmp_path / "other")
    forged = Statement(SAID.subject, "c" * 64, SAID.predicate_type, SAID.predicate).to_bytes()
    for bad in (
        sign_statement(SAID, other),
        json.dumps({**value, "payload": base64.b64encode(forged).decode()}).encode(),
        json.dumps({**value, "signatures": []}).encode(),
        json.dumps({**value, "payloadType": "text/plain"}).encode(),
        b"{}",
        b"",
        b"\xff",
        b"x" * (1 << 20),
        envelope.replace(value["payload"][:8].encode(), b"!!!!!!!!"),
    ):
        with pytest.raises(FedmeshError) as refused:
            open_statement(bad, key.verifier, VERSION_PREDICATE)
        assert refused.value.code is Code.PROOF_INVALID
    with pytest.raises(FedmeshError, match="the statement is of type"):
        open_statement(envelope, key.verifier, VERDICT_PREDICATE)


def test_a_hospitals_report_is_bound_to_its_key_and_its_words() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    said = Findings("north", "job", 3, "a" * 64, (Finding("subgroups", True, "all alike", {"gap": 0.02}),))
    statement, signature = said.to_bytes(), said.sign(key)
    assert open_findings(statement, signature, public) == said
    value = json.loads(statement)
    for bad, by in (
        (statement, said.sign(other)),
        (statement.replace(b"true", b"false"), signature),
        (json.dumps(value).encode(), signature),
        (json.dumps({**value, "results": {"other": {}}}, sort_keys=True, separators=(",", ":")).encode(), signature),
        (b"", signature),
    ):
        with pytest.raises(FedmeshError) as refused:
            open_findings(bad, by, public)
        assert refused.value.code is Code.STATEMENT_INVALID
    with pytest.raises(ValueError, match=r"finite|float"):
        Findings("north", "job", 3, "a" * 64, (Finding("subgroups", True, "", {"gap": float("nan")}),)).to_bytes()
