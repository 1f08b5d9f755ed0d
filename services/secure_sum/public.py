"""Adding uploads without any key. Runs in the aggregator, on bytes that nobody vouches for.

`add` and `validate_upload` are module-level functions of bytes so that they can run in a disposable process
(`services.secure_sum.disposable`); call them there, not in the process that serves requests.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum import seal, wire
from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import ParameterSet


def validate_upload(upload: bytes, params: ParameterSet, vector_length: int, lanes: int = 2) -> bytes:
    """Check an upload completely without adding it, and return its SHA-256 (32 bytes).

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if the bytes are not exactly one upload for this sum.
    """
    blob = wire.parse(upload, wire.Kind.UPLOAD, params, vector_length, lanes)
    wire.unpack(blob.c0, params, blob.count)
    return hashlib.sha256(upload).digest()


def validate_sum(sum_blob: bytes, params: ParameterSet, vector_length: int, lanes: int = 2) -> int:
    """Check a sum completely and return the number of contributions that it claims to hold.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if the bytes are not exactly one sum of this shape.
    """
    blob = wire.parse(sum_blob, wire.Kind.SUM, params, vector_length, lanes)
    polynomials(blob, params)
    return blob.contributions


def polynomials(blob: wire.Blob, params: ParameterSet) -> Coefficients:
    """c0 and c1 of a parsed sum, uint64[count, 2, N]; the c0 coefficients that do not travel are zero.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if a coefficient is not below q.
    """
    both = (wire.unpack(part.reshape(-1), params, blob.count) for part in (blob.c0, blob.c1))
    return np.stack(list(both), axis=1)


def add(accumulator: bytes | None, upload: bytes, params: ParameterSet, vector_length: int, lanes: int = 2) -> bytes:
    """Add one upload to a sum and return the new sum; `accumulator` None starts one.

    The sum does not depend on the order of the uploads. Noise grows by <= 21.5 a contribution (see `ParameterSet`).

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if either blob is not exactly what this sum expects; INVALID_ARGUMENT if the
            sum already holds as many contributions as the parameter set allows.
    """
    blob = wire.parse(upload, wire.Kind.UPLOAD, params, vector_length, lanes)
    c0 = wire.unpack(blob.c0, params, blob.count)
    contributions = 1
    previous: Coefficients | None = None
    if accumulator is not None:
        held = wire.parse(accumulator, wire.Kind.SUM, params, vector_length, lanes)
        contributions += held.contributions
        if contributions > params.max_contributions:
            raise FedmeshError(
                Code.INVALID_ARGUMENT, f"a sum under {params.name} holds at most {params.max_contributions} uploads"
            )
        previous = polynomials(held, params)
    total = _add(params, c0, blob.c1, previous)
    c1 = wire.pack(total[:, 1].reshape(-1)).reshape(blob.count, -1)
    return wire.write(wire.Kind.SUM, params, vector_length, lanes, contributions, total[:, 0], c1)


def _add(
    params: ParameterSet, c0: Coefficients, seeds: npt.NDArray[np.uint8], previous: Coefficients | None
) -> Coefficients:
    """uint64[count, 2, N]: the expanded uploads plus `previous` (same shape) if given."""
    evaluator = sealapi.Evaluator(seal.context(params))
    total = np.empty((len(c0), 2, params.poly_modulus_degree), dtype=np.uint64)
    with seal.memory_file() as file:
        for i in range(len(c0)):
            ciphertext = seal.load_seeded(params, file, c0[i], seeds[i].tobytes())
            if previous is not None:
                evaluator.add_inplace(ciphertext, seal.load_full(params, file, previous[i]))
            total[i] = seal.save_full(params, file, ciphertext)
    return total
