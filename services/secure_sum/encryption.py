"""Encrypting under a public key. Runs in hospitals; imports nothing that could decrypt.

A contribution is made from ciphertexts of zero (see `public.add_masked`). Who makes them under a set with a public key
is built from that key alone. Where the secret key encrypts it is `secret.SecretEncryptor`.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from services.common.errors import Code, FedmeshError
from services.secure_sum import seal, wire
from services.secure_sum.public_key import FORM, PublicKey
from services.secure_sum.wire import Layout


class Encryptor(Protocol):
    """Makes what `public.add_masked` turns into an upload."""

    def zeros(self, layout: Layout) -> Iterator[bytes]:
        """Fresh ciphertexts of zero, segment by segment, made when they are asked for. Use each once.

        Raises:
            FedmeshError: INVALID_ARGUMENT for a layout whose parameter set is encrypted in another way.
        """
        ...


class PublicEncryptor:
    """An `Encryptor` that holds a public key and nothing else."""

    def __init__(self, key: PublicKey) -> None:
        self._key = key

    def zeros(self, layout: Layout) -> Iterator[bytes]:
        params = layout.params
        if not params.public_key or not params.shares_keys_with(FORM.params):
            raise FedmeshError(Code.INVALID_ARGUMENT, f"uploads of {params.name} are not encrypted under this key")
        return self._encrypting(layout)

    def _encrypting(self, layout: Layout) -> Iterator[bytes]:
        with seal.public_encryptor(layout.params, self._key.polynomials()) as encrypt_zero:
            for index in range(layout.segments):
                made = np.stack([encrypt_zero() for _ in range(layout.ciphertexts_of(index))])
                used = made[:, 0].reshape(-1)[: layout.coefficients(index)[1]]
                yield wire.join(used, wire.pack(made[:, 1].reshape(-1)))
