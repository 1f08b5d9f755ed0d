"""Published vectors for the primitives as the secure sum uses them, and values that pin its own derivations."""

import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive, masks
from services.secure_sum.roster import MemberKeys
from services.secure_sum.statements import SIGNATURE_DOMAIN, sign_bytes
from tests.support.secure_sum import ATTEMPT

raw = bytes.fromhex

LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
]
NOT_CANONICAL = ["ed" + "ff" * 30 + "7f", "ee" + "ff" * 30 + "7f", "09" + "00" * 30 + "80", "ff" * 32]


def test_ed25519_rfc_8032_section_7_1_test_2() -> None:
    key = Ed25519PrivateKey.from_private_bytes(raw("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.sign(raw("72")) == raw(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_a_signature_covers_the_domain_and_the_exact_statement() -> None:
    keys = MemberKeys.generate("a")
    signature = sign_bytes(b"statement", keys)
    keys.signing.public_key().verify(signature, b"fedmesh secure-sum v1\nstatement")
    assert SIGNATURE_DOMAIN == b"fedmesh secure-sum v1\n"


def test_x25519_rfc_7748_section_5_2() -> None:
    private = X25519PrivateKey.from_private_bytes(
        raw("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    )
    shared = derive.exchange(private, raw("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"))
    assert shared == raw("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")


@pytest.mark.parametrize("public", LOW_ORDER)
def test_x25519_keys_of_low_order_are_refused(public: str) -> None:
    for use in (
        lambda: derive.require_public_key(raw(public), "b"),
        lambda: derive.exchange(X25519PrivateKey.generate(), raw(public)),
    ):
        with pytest.raises(FedmeshError) as caught:
            use()
        assert caught.value.code is Code.STATEMENT_INVALID


@pytest.mark.parametrize("public", [*NOT_CANONICAL, "09" * 31])
def test_x25519_keys_have_one_spelling(public: str) -> None:
    with pytest.raises(FedmeshError) as caught:
        derive.require_public_key(raw(public), "b")
    assert caught.value.code is Code.STATEMENT_INVALID
    assert caught.value.detail["culprit"] == "b"


def test_chacha20_rfc_8439_appendix_a_1_with_seek() -> None:
    stream = raw(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    expected = np.frombuffer(stream, dtype="<u8") % (1 << 48)
    plan = ((bytes(32), 1),)
    np.testing.assert_array_equal(masks.coefficients(plan, 0, 16), expected)
    np.testing.assert_array_equal(masks.coefficients(plan, 8, 8), expected[8:])

    fourth = raw("00ff") + bytes(30)
    block_two = raw(
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"
    )
    expected = np.frombuffer(block_two, dtype="<u8") % (1 << 48)
    np.testing.assert_array_equal(masks.coefficients(((fourth, 1),), 16, 8), expected)


def test_hkdf_rfc_5869_test_case_3() -> None:
    okm = HKDF(SHA256(), length=42, salt=None, info=b"").derive(b"\x0b" * 22)
    assert okm == raw("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8")


def test_a_derived_key_is_hkdf_with_length_prefixed_parts() -> None:
    info = raw("00000003") + b"dom" + raw("00000001") + b"a" + raw("00000002") + b"bc"
    extracted = hmac.digest(bytes(32), b"secret", "sha256")
    assert derive.key(b"secret", b"dom", "a", b"bc") == hmac.digest(extracted, info + b"\x01", "sha256")
    assert derive.digest(b"dom", "a", b"bc") == hashlib.sha256(info).digest()
    assert derive.digest(b"dom", "ab", b"c") != derive.digest(b"dom", "a", b"bc")


def test_aes_gcm_siv_rfc_8452_appendix_c_2() -> None:
    cipher, nonce = AESGCMSIV(raw("01" + "00" * 31)), raw("03" + "00" * 11)
    assert cipher.encrypt(nonce, raw("0100000000000000"), b"") == raw(
        "c2ef328e5c71c83b843122130f7364b761e0b97427e3df28"
    )
    assert cipher.encrypt(nonce, raw("0200000000000000"), b"\x01") == raw(
        "1de22967237a813291213f267e3b452f02d01ae33e4ec854"
    )


def test_aes_256_gcm_test_case_14() -> None:
    """McGrew and Viega, The Galois/Counter Mode of Operation, appendix B."""
    sealed = AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), None)
    assert sealed == raw("cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919")


def test_a_pair_key_is_the_same_from_both_sides_and_bound_to_everything() -> None:
    a, b, c = (derive.mask_key_pair(bytes([i]) * 16) for i in range(3))
    public = {key: key.public_key().public_bytes_raw() for key in (a, b, c)}
    pair = derive.pair_key(a, public[b], ATTEMPT, "a", "b")
    assert derive.pair_key(b, public[a], ATTEMPT, "b", "a") == pair
    others = {
        derive.pair_key(a, public[c], ATTEMPT, "a", "b"),
        derive.pair_key(a, public[b], ATTEMPT, "a", "c"),
        derive.pair_key(a, public[b], ATTEMPT.model_copy(update={"attempt": 2}), "a", "b"),
    }
    assert len(others | {pair}) == 4


def test_peers_that_x25519_cannot_tell_apart_have_different_pair_keys() -> None:
    """P and its spelling with the unused bit set give one X25519 secret; adding a point of low order does the same."""
    private = derive.mask_key_pair(bytes(16))
    peer = derive.mask_key_pair(b"\x01" * 16).public_key().public_bytes_raw()
    other = peer[:31] + bytes([peer[31] | 0x80])
    assert private.exchange(X25519PublicKey.from_public_bytes(peer)) == derive.exchange(private, other)
    assert derive.pair_key(private, peer, ATTEMPT, "a", "b") != derive.pair_key(private, other, ATTEMPT, "a", "b")


@pytest.mark.parametrize("seed", [b"", bytes(15), bytes(17)])
def test_seeds_have_sixteen_bytes(seed: bytes) -> None:
    for use in (
        lambda: derive.mask_key_pair(seed),
        lambda: derive.self_key(seed, ATTEMPT, "a"),
        lambda: derive.seed_commitment(ATTEMPT, "a", seed),
        lambda: derive.share_commitment(ATTEMPT, "a", "b", "self", seed),
    ):
        with pytest.raises(FedmeshError):
            use()


PINNED = {
    "mask_key": "f5240b3ae1f8696e8cc6b90c5ab858f0a4adce04e418fd6c737768c1d4ab0e2c",
    "self_key": "b3bb6cf0da74403b9176c5bd3bc348b158a69696a152a325f31708485a278fd4",
    "pair_key": "de1ee431acf7ea3d4399b60175d9979a30a902a92d5e26f2e9bb0490f2b15489",
    "seed_commitment": "d5d5e4a91a3dc9dfb2f1921441642c7dcaaf4d494499bccadcb00e1361a7c68f",
    "share_commitment": "e69aeb3ce2cef5649506b9c81a87139e0b24250705fe2e9d2428087b943d5c1d",
    "box_context": "ee407bbbc2e677bfb2bed96ae973732b01be2a0d57787d281f991d88f7fe6944",
}


def test_derivations_do_not_change_between_versions() -> None:
    seed = bytes(range(16))
    private = derive.mask_key_pair(seed)
    peer = derive.mask_key_pair(bytes(16)).public_key().public_bytes_raw()
    assert {
        "mask_key": private.public_key().public_bytes_raw().hex(),
        "self_key": derive.self_key(seed, ATTEMPT, "a").hex(),
        "pair_key": derive.pair_key(private, peer, ATTEMPT, "a", "b").hex(),
        "seed_commitment": derive.seed_commitment(ATTEMPT, "a", seed),
        "share_commitment": derive.share_commitment(ATTEMPT, "a", "b", "mask", seed),
        "box_context": hashlib.sha256(derive.box_context(ATTEMPT, "ab" * 32, "a", "b")).hexdigest(),
    } == PINNED
