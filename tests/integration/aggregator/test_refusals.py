"""Uploads that no honest hospital sends: refused, a strike, and nothing has changed."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum.statements import Signed, parse, sign
from services.secure_sum.statements import Upload as Statement
from tests.support.aggregation import Attempt, Centre, Upload, running_centre, signed
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis

NAME = "hospital-01"
LONG = 131_072 + 11


@pytest.fixture
async def centre(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Centre]:
    async with running_centre(tmp_path, redis_server, uploads={"max_concurrent": 2, "idle_s": 600}) as running:
        yield running


def restated(attempt: Attempt, content: list[bytes], **changes: Any) -> Upload:
    """An upload of other segments with a statement that is right for them, but for `changes`."""
    told = parse(Statement, attempt.upload_of(NAME).signed.statement)
    update = {
        "ciphertext_sha256": hashlib.sha256(b"".join(content)).hexdigest(),
        "segments": tuple(hashlib.sha256(segment).hexdigest() for segment in content),
    } | changes
    return Upload(sign(told.model_copy(update=update), attempt.consortium.keys[NAME]), content)


async def refused(attempt: Attempt, sent: Upload, *, by: str = NAME, **changes: Any) -> Code:
    with pytest.raises(FedmeshError) as caught:
        await attempt.send(by, sent, **changes)
    return caught.value.code


def flipped(segment: bytes, at: int = -1) -> bytes:
    changed = bytearray(segment)
    changed[at] ^= 1
    return bytes(changed)


async def test_segments_that_are_not_the_signed_ones_are_strikes(centre: Centre) -> None:
    attempt = Attempt.of(centre, 4, LONG)
    await attempt.open()
    await attempt.send("hospital-02")
    good = attempt.upload_of(NAME)
    first, second = good.segments
    above_q = b"\xff" * 15 + first[15:]
    cases = [
        ([second, first], Code.CHUNK_STREAM_INVALID),
        ([first, second, first], Code.CHUNK_STREAM_INVALID),
        ([first, second[:-1]], Code.CHUNK_STREAM_INVALID),
        ([first, second + b"x"], Code.CHUNK_STREAM_INVALID),
        ([first + second], Code.CHUNK_STREAM_INVALID),
        ([first, b""], Code.CHUNK_STREAM_INVALID),
        ([bytes((1 << 20) + 1)], Code.CHUNK_STREAM_INVALID),
        ([first, flipped(second)], Code.CHUNK_STREAM_INVALID),
        ([flipped(first, 0), second], Code.CHUNK_STREAM_INVALID),
    ]
    for segments, code in cases:
        assert await refused(attempt, Upload(good.signed, segments), ciphertext_sha256=good.sha256) is code
    assert await refused(attempt, restated(attempt, [above_q, second])) is Code.CIPHERTEXT_INVALID
    swapped = restated(attempt, [first, second], ciphertext_sha256="ab" * 32)
    assert await refused(attempt, swapped, ciphertext_sha256="ab" * 32) is Code.CHUNK_STREAM_INVALID
    expected = [code for _, code in cases] + [Code.CIPHERTEXT_INVALID, Code.CHUNK_STREAM_INVALID]
    assert centre.strikes() == [(NAME, code.value) for code in expected]
    refusals = [event for event in centre.registry.events.values() if event.type == "call.refused"]
    assert [event.subject for event in refusals] == [f"hospital/{NAME}"] * len(expected)
    await _nothing_changed(attempt)


async def test_statements_that_do_not_fit_are_strikes(centre: Centre) -> None:
    attempt = Attempt.of(centre, 4, LONG)
    await attempt.open()
    await attempt.send("hospital-02")
    good = attempt.upload_of(NAME)
    other_keys = Attempt.of(centre, 4, LONG)
    by_another = sign(parse(Statement, good.signed.statement), other_keys.consortium.keys[NAME])
    lists = [
        Upload(by_another, good.segments),
        Upload(other_keys.upload_of(NAME).signed, good.segments),
        Upload(attempt.upload_of("hospital-03").signed, good.segments),
        Upload(Signed(NAME, good.signed.statement + b" ", good.signed.signature), good.segments),
        Upload(Signed(NAME, b"", b""), good.segments),
        Upload(attempt.consortium.states[NAME].advert, good.segments),
        restated(attempt, good.segments, lanes=1),
        restated(attempt, good.segments, vector_length=5),
        restated(attempt, good.segments, adverts="ab" * 32),
        restated(attempt, good.segments, sharers="ab" * 32),
        restated(attempt, good.segments, segments=("ab" * 32,)),
        restated(attempt, good.segments, complaints=("hospital-01",)),
    ]
    for upload in lists:
        assert await refused(attempt, upload) is Code.STATEMENT_INVALID
    assert await refused(attempt, good, size_bytes=1) is Code.CIPHERTEXT_INVALID
    form = attempt.form()
    form.lanes = 1
    assert await refused(attempt, good, form=form) is Code.CIPHERTEXT_INVALID
    codes = [Code.STATEMENT_INVALID] * len(lists) + [Code.CIPHERTEXT_INVALID] * 2
    assert centre.strikes() == [(NAME, code.value) for code in codes]
    await _nothing_changed(attempt)


async def _nothing_changed(attempt: Attempt) -> None:
    assert [item.hospital_id for item in (await attempt.get()).contributions] == ["hospital-02"]
    await attempt.send(NAME)
    await attempt.send("hospital-03")
    await attempt.close(3)
    attempt.uploads.pop("hospital-04", None)
    survivors = ["hospital-01", "hospital-02", "hospital-03"]
    await attempt.compute(survivors, attempt.unmask())
    await attempt.opened(survivors)


async def test_refusals_that_are_no_strikes(centre: Centre) -> None:
    attempt = Attempt.of(centre, 4)
    good = attempt.upload_of(NAME)
    assert await refused(attempt, good) is Code.NOT_FOUND
    await attempt.open()
    assert await refused(attempt, good, ciphertext_sha256="zz") is Code.INVALID_ARGUMENT
    await attempt.send(NAME)
    fresh = restated(attempt, [flipped(good.segments[0])])
    assert await refused(attempt, fresh) is Code.ALREADY_CONTRIBUTED
    assert await refused(attempt, Upload(good.signed, []), ciphertext_sha256=good.sha256) is Code.CANCELLED
    # The same ciphertext with another statement is another upload: the list of survivors names statements.
    same = restated(attempt, good.segments, complaints=("hospital-02",))
    assert await refused(attempt, same) is Code.ALREADY_CONTRIBUTED
    with pytest.raises(FedmeshError) as stranger:
        await attempt.send("stranger", good)
    assert stranger.value.code is Code.PERMISSION_DENIED
    assert not centre.strikes()


async def test_too_many_uploads_are_put_off(centre: Centre) -> None:
    attempt = Attempt.of(centre, 4)
    await attempt.open()
    for name in attempt.sharers:
        attempt.upload_of(name)
    hanging = [asyncio.create_task(attempt.send(name, pause_s=600)) for name in attempt.sharers[:2]]
    await centre.uploading(2)
    assert await refused(attempt, attempt.upload_of("hospital-04"), by="hospital-04") is Code.RATE_LIMITED
    for task in hanging:
        task.cancel()
    await centre.uploading(0)
    await attempt.send_all(attempt.sharers)
    assert not centre.strikes()


async def test_a_newer_upload_takes_the_place_of_a_hanging_one(centre: Centre) -> None:
    attempt = Attempt.of(centre, 4)
    await attempt.open()
    attempt.upload_of(NAME)
    hanging = asyncio.create_task(attempt.send(NAME, pause_s=600))
    await centre.uploading(1)
    assert not (await attempt.send(NAME)).already_counted
    with pytest.raises(FedmeshError) as caught:
        await hanging
    assert caught.value.code is Code.CANCELLED
    assert (await attempt.get()).contributions[0].ciphertext_sha256 == attempt.upload_of(NAME).sha256


async def test_a_stalled_upload_is_dropped(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_centre(tmp_path, redis_server, uploads={"idle_s": 0.2}) as centre:
        attempt = Attempt.of(centre, 4)
        await attempt.open()
        with pytest.raises(FedmeshError) as caught:
            await attempt.send(NAME, pause_s=600)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        await centre.uploading(0)
        assert not centre.strikes()


async def test_the_senders_request_id_hides_no_strike(centre: Centre) -> None:
    attempt = Attempt.of(centre, 4)
    await attempt.open()
    good = attempt.upload_of(NAME)
    again: dict[str, Any] = {
        "request_id": "f1d2c3b4-0000-4000-8000-000000000000",
        "size_bytes": 1,
        "upload": signed(good.signed),
    }
    for _ in range(3):
        assert await refused(attempt, good, **again) is Code.CIPHERTEXT_INVALID
    assert centre.strikes() == [(NAME, "ciphertext-invalid")] * 3
