"""Reads the token of an operator's call: RFC 7519 and 8725, checked against the issuer's keys."""

import base64
import hashlib
import json
import ssl
import time
from typing import Any, Final, cast

import jwt

from services.common.config import PeopleConfig, RoleName
from services.common.errors import Code, FedmeshError
from services.common.people.keys import IssuerKeys
from services.common.people.person import Person, person_name

MAX_TOKEN_BYTES: Final = 8192
_REQUIRED: Final = ["iss", "aud", "sub", "exp", "iat", "auth_time"]
_BEARER: Final = "bearer "


class SignIn:
    """Says which person a token stands for."""

    def __init__(self, config: PeopleConfig, keys: IssuerKeys | None = None) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) as `IssuerKeys`."""
        self._config = config
        self._keys = keys or IssuerKeys(config)

    async def person(self, authorization: list[str], certificate_pem: bytes) -> Person:
        """The person of a call's `authorization` metadata, sent over a connection with this client certificate.

        Raises: FedmeshError(UNAUTHENTICATED) for every token that is missing or does not hold, (SERVICE_UNAVAILABLE)
            when the issuer's keys cannot be had.
        """
        token = _bearer(authorization)
        header, _ = _parts(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._config.algorithms:
            raise _refused("its signature algorithm is not accepted")
        if not isinstance(kid, str) or not kid:
            raise _refused("it names no key (kid)")
        if "crit" in header:
            raise _refused("it asks for an extension that is not known here (crit)")
        claims = self._verified(token, await self._keys.get(kid), cast(str, algorithm))
        _require_bound(claims, certificate_pem)
        return self._person(claims)

    def _verified(self, token: str, jwk: dict[str, Any], algorithm: str) -> dict[str, Any]:
        if jwk.get("alg", algorithm) != algorithm:
            raise _refused("its signature algorithm is not that of its key")
        try:
            return jwt.decode(
                token,
                jwt.PyJWK(jwk, algorithm).key,
                algorithms=[algorithm],
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=self._config.leeway_s,
                options={"require": _REQUIRED},
            )
        except jwt.PyJWTError as error:
            raise _refused(_reason(error)) from error

    def _person(self, claims: dict[str, Any]) -> Person:
        signed_in, subject = claims["auth_time"], claims["sub"]
        now, leeway = time.time(), self._config.leeway_s
        if isinstance(signed_in, bool) or not isinstance(signed_in, int | float) or not signed_in <= now + leeway:
            raise _refused("its time of sign-in (auth_time) is no moment of the past")
        until = min(float(claims["exp"]), signed_in + self._config.max_age_s) + leeway
        if until <= now:
            raise _refused("the sign-in is too long ago: run `fedmesh login`")
        if not subject:
            raise _refused("its subject is empty")
        values = _texts(claims.get(self._config.role_claim))
        roles: frozenset[RoleName] = frozenset(
            self._config.roles[name] for name in values if name in self._config.roles
        )
        mfa = bool(_texts(claims.get("amr")) & self._config.mfa.amr or _texts(claims.get("acr")) & self._config.mfa.acr)
        return Person(person_name(subject), roles, mfa, until)


def _bearer(authorization: list[str]) -> str:
    if not authorization:
        raise FedmeshError(Code.UNAUTHENTICATED, "operators sign in here: run `fedmesh login`")
    if len(authorization) > 1 or not authorization[0].lower().startswith(_BEARER):
        raise _refused("exactly one `authorization: Bearer TOKEN` is expected")
    token = authorization[0][len(_BEARER) :].strip()
    if len(token.encode()) > MAX_TOKEN_BYTES:
        raise _refused(f"it is larger than {MAX_TOKEN_BYTES} bytes")
    return token


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims as they stand, unverified. Of a name that comes twice, two readers may take two values."""
    pieces = token.split(".")
    if len(pieces) != 3:
        raise _refused("it is not a signed JSON Web Token")
    try:
        read = [json.loads(_decoded(piece), object_pairs_hook=_once) for piece in pieces[:2]]
    except (ValueError, RecursionError) as error:
        raise _refused("it is not a signed JSON Web Token, or names a claim twice") from error
    if not all(isinstance(part, dict) for part in read):
        raise _refused("it is not a signed JSON Web Token")
    return read[0], read[1]


def _decoded(piece: str) -> bytes:
    return base64.b64decode(piece + "=" * (-len(piece) % 4), altchars=b"-_", validate=True)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _require_bound(claims: dict[str, Any], certificate_pem: bytes) -> None:
    """RFC 8705: a token that is bound to a key is of use only to who holds that key."""
    if "cnf" not in claims:
        return
    confirmation = claims["cnf"]
    der = ssl.PEM_cert_to_DER_cert(certificate_pem.decode("ascii"))
    thumbprint = base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode("ascii")
    if confirmation != {"x5t#S256": thumbprint}:
        raise _refused("it is bound to another certificate or key (cnf)")


def _texts(claim: object) -> frozenset[str]:
    """The strings of a claim that is a string or a list."""
    if isinstance(claim, str):
        return frozenset({claim})
    return frozenset(item for item in claim if isinstance(item, str)) if isinstance(claim, list) else frozenset()


_REASONS: Final[tuple[tuple[type[jwt.PyJWTError], str], ...]] = (
    (jwt.ExpiredSignatureError, "it has expired: run `fedmesh login`"),
    (jwt.ImmatureSignatureError, "it is not valid yet: check the clocks"),
    (jwt.InvalidAudienceError, "it was made for somebody else (aud)"),
    (jwt.InvalidIssuerError, "it is of another issuer (iss)"),
    (jwt.InvalidSignatureError, "its signature does not hold"),
)


def _reason(error: jwt.PyJWTError) -> str:
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it has no claim {error.claim}"
    return next((text for kind, text in _REASONS if isinstance(error, kind)), "it is malformed or its key does not fit")


def _refused(reason: str) -> FedmeshError:
    return FedmeshError(Code.UNAUTHENTICATED, f"the token is refused: {reason}")
