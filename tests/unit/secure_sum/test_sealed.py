import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Code, FedmeshError
from services.secure_sum.sealed import OVERHEAD_BYTES, open_state, seal_state, sealed_epoch
from tests.support.secure_sum import JOB

KEY = bytes(range(32))
STATE = b"the state of a model"


def refused(code: Code, call: Callable[..., object], *args: Any) -> None:
    with pytest.raises(FedmeshError) as caught:
        call(*args)
    assert caught.value.code is code


@given(st.binary(min_size=1, max_size=5000), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_state_comes_back_and_hospitals_make_the_same_bytes(state: bytes, epoch: int, version: int) -> None:
    blob = seal_state(KEY, epoch, JOB, version, state)
    assert blob == seal_state(bytes(KEY), epoch, JOB, version, bytes(state))
    assert len(blob) == len(state) + OVERHEAD_BYTES
    assert sealed_epoch(blob) == epoch
    assert open_state(KEY, JOB, version, blob) == state


def test_a_state_opens_as_what_it_was_sealed_only() -> None:
    blob = seal_state(KEY, 3, JOB, 7, STATE)
    other_epoch = seal_state(KEY, 4, JOB, 7, STATE)
    for bad in (
        (os.urandom(32), JOB, 7, blob),
        (KEY, "another", 7, blob),
        (KEY, JOB, 8, blob),
        (KEY, JOB, 7, other_epoch[:16] + blob[16:]),
    ):
        refused(Code.CIPHERTEXT_INVALID, open_state, *bad)


def test_every_byte_is_authenticated() -> None:
    blob = seal_state(KEY, 3, JOB, 7, STATE)
    for i in range(len(blob)):
        for bit in (1, 128):
            refused(Code.CIPHERTEXT_INVALID, open_state, KEY, JOB, 7, blob[:i] + bytes([blob[i] ^ bit]) + blob[i + 1 :])
    for bad in (b"", blob[:-1], blob + b"\0", blob[:OVERHEAD_BYTES], blob[1:]):
        refused(Code.CIPHERTEXT_INVALID, open_state, KEY, JOB, 7, bad)


def test_nonces_differ_whenever_anything_does() -> None:
    blobs = [
        seal_state(KEY, 3, JOB, 7, STATE),
        seal_state(KEY, 3, JOB, 7, STATE + b"."),
        seal_state(KEY, 3, JOB, 8, STATE),
        seal_state(KEY, 4, JOB, 7, STATE),
        seal_state(KEY, 3, "another", 7, STATE),
        seal_state(KEY[::-1], 3, JOB, 7, STATE),
    ]
    assert len({blob[16:28] for blob in blobs}) == len(blobs)
    assert len({blob[28:44] for blob in blobs}) == len(blobs)


def test_what_cannot_be_sealed_is_refused() -> None:
    refused(Code.INVALID_ARGUMENT, seal_state, KEY, 1, JOB, 1, b"")
    refused(Code.INVALID_ARGUMENT, seal_state, KEY[1:], 1, JOB, 1, STATE)
    refused(Code.INVALID_ARGUMENT, seal_state, KEY, -1, JOB, 1, STATE)
    refused(Code.INVALID_ARGUMENT, seal_state, KEY, 1, JOB, -1, STATE)
    refused(Code.INVALID_ARGUMENT, open_state, KEY[1:], JOB, 1, seal_state(KEY, 1, JOB, 1, STATE))


def test_sealing_does_not_change_between_versions() -> None:
    assert seal_state(KEY, 1, JOB, 1, b"state").hex() == (
        "464d5354000100000000000000000001358bee3898532fa3b6145eecdc658f0a54bc3825b52ed1ee2da49485fa53eb2bb7"
    )
