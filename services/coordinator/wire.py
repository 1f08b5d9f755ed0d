"""Messages that several of the coordinator's modules make or read."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from fedmesh.common.v1 import round_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.coordinator.domain.attempt import Attempt, AttemptId
from services.secure_sum.opening import Opening
from services.secure_sum.statements import AttemptRef, Signed, Survivors, parse


def timestamp(at: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(at)
    return message


def timestamp_ms(at_ms: int) -> Timestamp:
    return timestamp(datetime.fromtimestamp(at_ms / 1000, UTC))


def wire_attempt(attempt: AttemptId) -> round_pb2.Attempt:
    return round_pb2.Attempt(job_id=attempt.job_id, round=attempt.round, attempt=attempt.attempt)


def attempt_ref(attempt: AttemptId) -> AttemptRef:
    """The attempt as statements name it."""
    return AttemptRef(job_id=attempt.job_id, round=attempt.round, attempt=attempt.attempt)


def listed_uploads(attempt: Attempt) -> dict[str, str]:
    """The SHA-256 of every survivor's `upload` statement, by hospital, as the list of survivors names it."""
    return {item.hospital_id: item.upload for item in parse(Survivors, attempt.survivors.encode()).survivors}


def wire_contributions(attempt: Attempt) -> list[round_pb2.Contribution]:
    return [
        round_pb2.Contribution(
            hospital_id=item.hospital_id, ciphertext_sha256=item.sha256, age=attempt.age(item.hospital_id)
        )
        for item in attempt.contributions
    ]


def wire_signed(signed: Iterable[Signed]) -> list[round_pb2.Signed]:
    return [
        round_pb2.Signed(hospital_id=item.hospital_id, statement=item.statement, signature=item.signature)
        for item in signed
    ]


def parse_signed(message: round_pb2.Signed) -> Signed:
    return Signed(message.hospital_id, message.statement, message.signature)


def wire_signatures(signatures: Mapping[str, bytes]) -> list[round_pb2.Signature]:
    return [
        round_pb2.Signature(hospital_id=hospital_id, signature=signature)
        for hospital_id, signature in sorted(signatures.items())
    ]


def parse_signatures(messages: Iterable[round_pb2.Signature]) -> dict[str, bytes]:
    return {message.hospital_id: message.signature for message in messages}


def wire_opening(opening: Opening) -> round_pb2.Opening:
    def seeds(opened: Mapping[str, bytes]) -> list[round_pb2.OpenedSeed]:
        return [round_pb2.OpenedSeed(hospital_id=name, seed=seed) for name, seed in sorted(opened.items())]

    return round_pb2.Opening(self_seeds=seeds(opening.self_seeds), mask_seeds=seeds(opening.mask_seeds))
