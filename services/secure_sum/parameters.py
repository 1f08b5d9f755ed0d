"""Named, versioned parameter sets of the homomorphic sum. A published name never changes its meaning."""

from dataclasses import dataclass, replace
from typing import Final

from services.common.errors import Code, FedmeshError


@dataclass(frozen=True)
class ParameterSet:
    """One BFV parameter set (Fan and Vercauteren 2012), used with coefficient packing: no batching, no products.

    A ciphertext of m is (c0, c1) over Z_q[X]/(X^N + 1) with c0 + c1*s = round(q*m/t) + noise.

    - Symmetric (`public_key` false): c0 = -c1*s + e + round(q*m/t), where c1 is expanded from a 32-byte seed
      (`uniform`): an upload holds c0 and the seed. Whoever encrypts holds the secret key s.
    - Public key: with the epoch's public key (b, a), b = -a*s + e, an upload is (b*u + e1 + round(q*m/t), a*u + e2)
      in full. Whoever encrypts needs only (b, a).

    *Security.* N = 4096 with log2(q) = 60, ternary secret and error of standard deviation 3.2 lies inside the 192-bit
    classical row of the HomomorphicEncryption.org standard (2018, table 1: log2(q) <= 75 at N = 4096; the 128-bit row
    allows 109). SEAL is asked for that level and refuses anything weaker. t is not part of the key: sets with the same
    N and q share the keys of an epoch.

    *Exactness, symmetric.* The error is centred binomial with |e| <= 21, as in SEAL. Every plaintext that is added or
    subtracted scaled, as round(q*m/t), errs by at most 1/2 in each coefficient: once in an upload, whose values and
    mask are scaled as one, and once in the correction that takes the masks off a sum. What the integers exceed t by
    vanishes mod q without error, since q*t/t = q. So the sum of k uploads has noise <= 21.5 * k + 1/2. Decryption is
    exact while that is below q/(2t) = 2047.99: k <= 95. At k = 16 the noise is at most 344.5: an honest sum never fails
    to decrypt.

    *Exactness, public key.* The noise of an upload is e*u + e2*s + e1, of standard deviation 239, hence a smaller t: it
    leaves q/(2t) = 32,767.9, and a sum of 16 fails to decrypt with probability below 2^-500 (docs/secure-sum.md).

    What keeps a hospital's update from the other holders of the secret key are its masks, under either set.
    """

    name: str
    """Stable identifier, at most 32 ASCII characters, named by every `upload` statement."""
    poly_modulus_degree: int
    """N: coefficients a plaintext."""
    coeff_modulus_bits: int
    """log2 of the one ciphertext prime q; also the width of a coefficient on the wire."""
    coeff_modulus: int
    """q."""
    plain_modulus_bits: int
    """log2 of the plaintext modulus t."""
    security_bits: int
    """Level of the HomomorphicEncryption.org table that SEAL must enforce."""
    max_contributions: int
    """Ciphertexts that one sum may hold: the lesser of the noise bound and what the lanes are dimensioned for."""
    max_vector_length: int
    """Values that one sum may hold; keeps a hostile header from asking for unbounded room."""
    public_key: bool = False
    """Whether uploads are encrypted under the epoch's public key, not under the secret one."""

    @property
    def plain_modulus(self) -> int:
        """t."""
        return 1 << self.plain_modulus_bits

    def shares_keys_with(self, other: "ParameterSet") -> bool:
        """Whether a secret key of one set is one of the other."""
        return (self.poly_modulus_degree, self.coeff_modulus) == (other.poly_modulus_degree, other.coeff_modulus)


BFV_N4096_Q60_T48_V2: Final = ParameterSet(
    name="bfv-n4096-q60-t48-v2",
    poly_modulus_degree=4096,
    coeff_modulus_bits=60,
    coeff_modulus=0xFFF_FFFF_FFFF_C001,
    plain_modulus_bits=48,
    security_bits=192,
    max_contributions=16,
    max_vector_length=1 << 27,
)

BFV_N4096_Q60_T44_PK_V1: Final = replace(
    BFV_N4096_Q60_T48_V2, name="bfv-n4096-q60-t44-pk-v1", plain_modulus_bits=44, public_key=True
)

DEFAULT: Final = BFV_N4096_Q60_T48_V2

_SETS: Final = {p.name: p for p in (BFV_N4096_Q60_T48_V2, BFV_N4096_Q60_T44_PK_V1)}


def parameter_set_names() -> tuple[str, ...]:
    """Every set that this release knows, the default first."""
    return tuple(_SETS)


def public_key_sets() -> tuple[str, ...]:
    """The sets whose uploads are encrypted under a public key."""
    return tuple(name for name, params in _SETS.items() if params.public_key)


def parameter_set(name: str) -> ParameterSet:
    """Look up a parameter set.

    Raises:
        FedmeshError: INVALID_ARGUMENT if no set has this name.
    """
    found = _SETS.get(name)
    if found is None:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"unknown parameter set {name[:64]!r}; known: {', '.join(sorted(_SETS))}",
            parameter_set=name[:64],
        )
    return found
