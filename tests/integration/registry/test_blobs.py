"""Uploads that are broken in every way leave nothing; whole ones come back as they were."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from tests.integration.registry.harness import HOSPITALS, Registry, digest, parts, refused

MIB = 1 << 20
CONTENT = b"".join(number.to_bytes(4, "big") for number in range(320_000))


def upload(registry: Registry, messages: Iterator[pb.UploadBlobRequest]) -> Any:
    return call(registry.hospital().UploadBlob, lambda: messages)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def nothing_kept(registry: Registry) -> bool:
    found = registry.sql(
        "select 1 from registry.blobs union all select 1 from registry.blob_chunks"
        " union all select 1 from registry.job_blobs"
    )
    return found == []


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, MIB + 1, 8 * MIB])
async def test_content_comes_back_as_it_was(registry: Registry, size: int) -> None:
    job = await registry.job()
    content = (CONTENT * 7)[:size]
    assert await registry.upload(HOSPITALS[0], job.job_id, content) == digest(content)
    assert await registry.upload(HOSPITALS[1], job.job_id, content) == digest(content)
    for stub in (registry.hospital(HOSPITALS[4]), registry.operator()):
        assert await registry.download(stub, digest(content)) == content


async def test_small_chunks_are_stored_as_large_ones(registry: Registry) -> None:
    job = await registry.job()

    def small() -> Iterator[pb.UploadBlobRequest]:
        yield next(parts(job.job_id, CONTENT))
        for start in range(0, len(CONTENT), 7777):
            yield pb.UploadBlobRequest(chunk=CONTENT[start : start + 7777])

    await upload(registry, small())
    assert registry.sql("select position, octet_length(content) from registry.blob_chunks order by position") == [
        (0, MIB),
        (1, len(CONTENT) - MIB),
    ]
    assert await registry.download(registry.hospital(), digest(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("header", "expected", "said"),
    [
        ({"size_bytes": len(CONTENT) + 1}, Code.CHUNK_STREAM_INVALID, "cut short"),
        ({"size_bytes": len(CONTENT) - 1}, Code.CHUNK_STREAM_INVALID, "more than"),
        ({"sha256": "a" * 64}, Code.CHUNK_STREAM_INVALID, "SHA-256"),
        ({"size_bytes": 8 * MIB + 1}, Code.TOO_LARGE, "at most"),
        ({"size_bytes": 2**64 - 1}, Code.TOO_LARGE, "at most"),
        ({"size_bytes": 0}, Code.INVALID_ARGUMENT, "size_bytes"),
        ({"sha256": "A" * 64}, Code.INVALID_ARGUMENT, "sha256"),
        ({"request_id": "1"}, Code.INVALID_ARGUMENT, "request_id"),
        ({"job_id": "1"}, Code.INVALID_ARGUMENT, "job_id"),
        ({"job_id": new_id()}, Code.NOT_FOUND, "no job"),
    ],
)
async def test_a_stream_unlike_its_header_leaves_nothing(
    registry: Registry, tmp_path: Path, header: dict[str, Any], expected: Code, said: str
) -> None:
    job = await registry.job()
    error = await refused(upload(registry, parts(header.pop("job_id", job.job_id), CONTENT, **header)))
    assert error.code is expected
    assert said in error.message
    assert nothing_kept(registry)
    assert files(tmp_path) == []
    await registry.upload(HOSPITALS[0], job.job_id, CONTENT)


async def test_a_refused_stream_is_a_strike(registry: Registry) -> None:
    job = await registry.job()
    await refused(upload(registry, parts(job.job_id, CONTENT, sha256="a" * 64)))
    await registry.drained()
    strike = registry.audit.happened()[-1]
    assert (strike.type, strike.subject) == ("call.refused", f"job/{job.job_id}")
    assert strike.actor.endswith(f"/hospital/{HOSPITALS[0]}")
    assert '"code":"chunk-stream-invalid"' in strike.body_json


async def test_streams_out_of_order_are_refused(registry: Registry) -> None:
    job = await registry.job()
    header, *chunks = parts(job.job_id, CONTENT)
    empty = pb.UploadBlobRequest(chunk=b"")
    for messages in ([], chunks, [chunks[0], header], [header, header, *chunks], [header, empty, *chunks], [empty]):
        assert (await refused(upload(registry, iter(messages)))).code is Code.CHUNK_STREAM_INVALID
    assert nothing_kept(registry)


async def test_chunks_in_the_wrong_order_are_refused(registry: Registry) -> None:
    job = await registry.job()
    header, *chunks = parts(job.job_id, CONTENT)
    assert (await refused(upload(registry, iter([header, *reversed(chunks)])))).code is Code.CHUNK_STREAM_INVALID
    assert nothing_kept(registry)


async def test_an_upload_that_stands_still_or_breaks_off_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    job = await registry.job()
    header, *chunks = parts(job.job_id, CONTENT)
    still = asyncio.Event()

    async def stalled() -> AsyncIterator[pb.UploadBlobRequest]:
        yield header
        yield chunks[0]
        await still.wait()

    error = await refused(call(registry.hospital().UploadBlob, stalled))
    assert error.code is Code.CHUNK_STREAM_INVALID
    assert "stalled" in error.message
    broken = await refused(call(registry.hospital().UploadBlob, stalled, timeout_s=0.3))
    assert broken.code is Code.DEADLINE_EXCEEDED
    assert nothing_kept(registry)

    async def cleaned() -> bool:
        return not files(tmp_path)

    await registry.settled(cleaned)
    await registry.upload(HOSPITALS[0], job.job_id, CONTENT)


async def test_more_uploads_than_slots_are_told_to_come_again(registry: Registry) -> None:
    job = await registry.job()
    go = asyncio.Event()

    def waiting(content: bytes) -> Any:
        header, *chunks = parts(job.job_id, content)

        async def messages() -> AsyncIterator[pb.UploadBlobRequest]:
            yield header
            await asyncio.wait_for(go.wait(), 10)
            for chunk in chunks:
                yield chunk

        return messages

    def attempt(number: int) -> Any:
        return call(registry.hospital().UploadBlob, waiting(bytes([number]) * 10))

    tasks = [asyncio.create_task(attempt(number)) for number in range(5)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [item for item in results if isinstance(item, FedmeshError)]
    assert len(done) == 1
    assert [error.code for error in errors] == [Code.RATE_LIMITED]


async def test_an_unknown_blob_is_not_found(registry: Registry) -> None:
    await registry.register(HOSPITALS[0])
    for stub in (registry.hospital(), registry.operator()):
        assert (await refused(registry.download(stub, "0" * 64))).code is Code.NOT_FOUND
        assert (await refused(registry.download(stub, "0"))).code is Code.INVALID_ARGUMENT
