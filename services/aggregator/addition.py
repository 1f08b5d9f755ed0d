"""What a disposable process does for the aggregator: add a batch of uploads, and say which of them are none."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.errors import Code, FedmeshError
from services.secure_sum import public
from services.secure_sum.parameters import parameter_set

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Addition:
    """accumulator: the new sum, or None when every upload was refused of a sum that had none. refused: by position."""

    accumulator: bytes | None
    refused: dict[int, FedmeshError]


def add_batch(
    accumulator: bytes | None, uploads: Sequence[bytes], parameters: str, vector_length: int, lanes: int
) -> bytes:
    """Runs in the child. Adds the uploads that are valid; the answer is for `parse_addition`."""
    params = parameter_set(parameters)
    refused: dict[str, list[str]] = {}
    for position, upload in enumerate(uploads):
        try:
            accumulator = public.add(accumulator, upload, params, vector_length, lanes)
        except FedmeshError as error:
            refused[str(position)] = [error.code.value, error.message]
    head = json.dumps(refused).encode()
    return _LENGTH.pack(len(head)) + head + (accumulator or b"")


def parse_addition(answer: bytes) -> Addition:
    """Read what a child sent back.

    Raises: FedmeshError(SERVICE_UNAVAILABLE) when it makes no sense: the child was not sound.
    """
    try:
        (length,) = _LENGTH.unpack_from(answer)
        end = _LENGTH.size + length
        head: dict[str, list[str]] = json.loads(answer[_LENGTH.size : end])
        refused = {int(at): FedmeshError(Code(code), message) for at, (code, message) in head.items()}
    except (struct.error, ValueError, AttributeError, TypeError) as error:
        raise FedmeshError(Code.SERVICE_UNAVAILABLE, "a worker process gave a senseless answer: try again") from error
    return Addition(answer[end:] or None, refused)
