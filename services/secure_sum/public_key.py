"""The public half of an epoch's key. Needs no secret and no SEAL: whoever checks or encrypts may hold it.

The public key (b, a), b = -a*s + e, is a fresh symmetric ciphertext of zero under the group key s, and is written like
one: b, all N coefficients, and the 32-byte seed of a (`uniform`). The seed leaves its maker no choice of a.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from services.common.errors import Code, FedmeshError
from services.secure_sum import uniform, wire
from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import Layout

FORM: Final = Layout(DEFAULT, DEFAULT.poly_modulus_degree, lanes=1)
"""The layout of a public key: that of an upload of one whole ciphertext."""


@dataclass(frozen=True)
class PublicKey:
    """What encrypts and cannot decrypt. Every set that `DEFAULT` shares keys with may use it."""

    data: bytes
    """30,752 bytes: b, packed, and the seed of a."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a public key: its length, and that every coefficient is below q.

        Raises: FedmeshError(INVALID_ARGUMENT) when it is none.
        """
        try:
            wire.split_upload(FORM, 0, data)
        except FedmeshError as error:
            raise FedmeshError(Code.INVALID_ARGUMENT, "this is not a public key that this build reads") from error
        return cls(data)

    def polynomials(self) -> Coefficients:
        """b and a, uint64[2, N] below q."""
        b, seeds = wire.split_upload(FORM, 0, self.data)
        return np.stack((b, uniform.expand(seeds[0].tobytes(), FORM.params)))
