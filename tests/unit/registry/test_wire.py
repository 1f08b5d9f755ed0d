"""Page tokens and response sizes."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import Code, FedmeshError
from services.registry import wire


@pytest.mark.parametrize("key", [1, 255, 2**63 - 1])
def test_a_page_token_comes_back(key: int) -> None:
    assert wire.read_page_token(wire.page_token(key)) == key


def test_the_first_page_has_no_token() -> None:
    assert wire.read_page_token("") is None
    assert wire.page_token(None) == ""


@pytest.mark.parametrize("token", ["1", "AAAA", "é", "_" * 11 + "=", "A" * 13, "' or 1=1"])
def test_a_foreign_page_token_is_refused(token: str) -> None:
    with pytest.raises(FedmeshError) as caught:
        wire.read_page_token(token)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(("asked", "given"), [(0, 100), (1, 1), (500, 500)])
def test_page_sizes(asked: int, given: int) -> None:
    assert wire.page_size(asked) == given


def test_no_contribution_is_older_than_the_first_version() -> None:
    item = round_pb2.Contribution(hospital_id="h1", ciphertext_sha256="ab" * 32, age=2)
    attempt = round_pb2.Attempt(job_id="11111111-2222-4333-8444-555555555555", round=2, attempt=1)
    told = pb.CommittedRound(attempt=attempt, version=2, contributions=[item], burnt=True, survivors_sha256="cd" * 32)
    told.sealed_at.GetCurrentTime()
    with pytest.raises(FedmeshError, match="no contribution to version 2 is of age 2") as caught:
        wire.read_round(pb.CommitRoundRequest(round=told))
    assert caught.value.code is Code.INVALID_ARGUMENT
    item.age = told.contributions[0].age = 1
    (read,) = wire.read_round(pb.CommitRoundRequest(round=told)).contributions
    assert read.age == 1


def test_a_response_takes_what_fits_and_at_least_one() -> None:
    large = pb.Plan(manifest=b"x" * 500_000)
    assert len(wire.fitting([large] * 3)) == 1
    assert len(wire.fitting([pb.Plan(manifest=b"x" * 2_000_000)])) == 1
    assert len(wire.fitting([pb.Plan()] * 500)) == 500
    assert wire.fitting([]) == []


@pytest.mark.parametrize(
    "at",
    [
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 1, tzinfo=UTC),
        datetime(2026, 11, 28, 23, 0, 0, 999_999, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
        datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    ],
)
def test_a_time_goes_out_as_protobuf_has_it(at: datetime) -> None:
    expected = Timestamp()
    expected.FromDatetime(at)
    assert wire.timestamp(at) == expected


def test_no_time_goes_out_as_none() -> None:
    assert wire.timestamp(None) is None
