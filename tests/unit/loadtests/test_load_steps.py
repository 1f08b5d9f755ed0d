"""What a load test does, step by step, and that the uploads it makes are those of rounds."""

import asyncio
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fedmesh.aggregator.v1 import aggregator_pb2

from loadtests.load.driver import serve
from loadtests.load.settings import MEMBERS, Options
from loadtests.load.steps import steps, upload_rate
from loadtests.load.uploads import Uploads, make_sum
from services.common.errors import Code, FedmeshError


def test_calls_are_made_beside_every_number_of_hospitals_and_storms_beside_the_most() -> None:
    found = steps(Options(Path("unused"), hospitals=(50, 15, 1000), params=(40_000, 10_000), uploads=9.0, seconds=10))
    assert [(step.name, step.waiting, step.user) for step in found] == [
        ("idle-15", 15, ""),
        ("calls-15", 15, "ControlPlane"),
        ("calls-50", 50, "ControlPlane"),
        ("idle-1000", 1000, ""),
        ("calls-1000", 1000, "ControlPlane"),
        ("audit-storm", 1000, "AuditStorm"),
        ("upload-storm-10000", 1000, "UploadStorm"),
        ("upload-storm-40000", 1000, "UploadStorm"),
    ]
    *_, small, large = found
    assert (small.rate, large.rate) == (9.0, 4.5)
    # Fifteen uploads a sum: more than are due on average, for calls come at random.
    assert small.sums * MEMBERS > 1.2 * small.rate * small.seconds
    assert json.loads(json.dumps(asdict(small)))["params"] == 10_000


def test_of_the_largest_model_an_upload_a_second_is_made() -> None:
    options = Options(Path("unused"), params=(10_000, 100_000, 10_000_000), uploads=10.0)
    assert [upload_rate(options, params) for params in options.params] == [10.0, pytest.approx(10 / 10**0.5), 1.0]


def test_a_sum_has_one_sound_upload_of_every_hospital() -> None:
    one, other = make_sum(300), make_sum(300)
    opening = aggregator_pb2.OpenSumRequest.FromString(one.opening)
    headers = [aggregator_pb2.UploadHeader.FromString(upload.header) for upload in one.uploads]
    assert sorted(opening.group) == sorted(upload.hospital for upload in one.uploads)
    assert len(headers) == MEMBERS
    assert {header.attempt.job_id for header in headers} == {opening.attempt.job_id}
    assert len({header.ciphertext_sha256 for header in headers}) == MEMBERS
    assert all(sum(map(len, upload.segments)) == one.upload_bytes for upload in one.uploads)
    assert one.attempt != other.attempt


async def test_no_upload_is_handed_out_twice() -> None:
    clients: Any = None
    uploads = Uploads(clients, 300)
    try:
        await uploads.prepare(300, 1)
        # Beyond what was prepared more is made.
        made = await asyncio.gather(*(uploads.take() for _ in range(2 * MEMBERS)))
    finally:
        uploads.close()
    assert set(Counter(one.attempt for one, _ in made).values()) == {MEMBERS}
    assert len({(one.attempt, upload.hospital) for one, upload in made}) == 2 * MEMBERS


class Echo:
    """A driver that waits as long as it is told, and cannot do everything."""

    async def answer(self, what: str, asked: dict[str, Any]) -> dict[str, Any]:
        if what == "fail":
            raise FedmeshError(Code.INVALID_ARGUMENT, "nobody knows how to fail")
        if what == "break":
            raise ValueError("broken")
        await asyncio.sleep(asked["wait_s"])
        return {"said": what}


async def test_questions_are_answered_when_their_answers_are_there(tmp_path: Path) -> None:
    driver: Any = Echo()
    server = await serve(driver, tmp_path / "socket")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
    asked = [("slow", 0.5), ("quick", 0.0), ("fail", 0.0), ("break", 0.0)]
    for number, (what, wait_s) in enumerate(asked):
        writer.write(json.dumps({"number": number, "what": what, "wait_s": wait_s}).encode() + b"\n")
    answers = [json.loads(await reader.readline()) for _ in asked]
    writer.close()
    server.close()
    assert answers[-1] == {"number": 0, "said": "slow"}
    by_number = {answer.pop("number"): answer for answer in answers}
    assert by_number[1] == {"said": "quick"}
    assert by_number[2] == {"error": "nobody knows how to fail"}
    assert by_number[3] == {"error": "ValueError('broken')"}
