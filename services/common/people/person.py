"""A person who signed in, and whether that is enough for a call."""

import hashlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from services.common.config import RoleName
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind

if TYPE_CHECKING:
    from services.common.grpc.access import Rule

# Names made of a hash begin with it, and so no subject that is taken as it is may.
_HASHED: Final = "sub-"
_PLAIN: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Person:
    """Who a token says somebody is. ends_at: Unix time in seconds at which that is over, leeway included."""

    name: str
    roles: frozenset[RoleName]
    mfa: bool
    ends_at: float

    def identity(self, consortium: str) -> Identity:
        """The identity under which the person acts: rules of two persons count these, not certificates."""
        return Identity(consortium, Kind.OPERATOR, self.name)

    def require_current(self) -> None:
        """Raises: FedmeshError(UNAUTHENTICATED) once the sign-in is over, in the middle of a stream too."""
        if time.time() >= self.ends_at:
            raise FedmeshError(Code.UNAUTHENTICATED, "the sign-in is over: run `fedmesh login`")


def person_name(subject: str) -> str:
    """A name of fedmesh's for an issuer's subject: the subject itself where it can be one, else of its hash.

    Two subjects never share a name: rules of two persons count names.
    """
    if _PLAIN.fullmatch(subject) and not subject.startswith(_HASHED):
        return subject
    return _HASHED + hashlib.sha256(subject.encode()).hexdigest()[:40]


def require_rights(person: Person, rule: "Rule", method: str) -> None:
    """Raises: FedmeshError(PERMISSION_DENIED) without a role or the second factor that a method asks for."""
    if not person.roles & rule.roles:
        needed, held = ", ".join(sorted(rule.roles)), ", ".join(sorted(person.roles)) or "none"
        raise FedmeshError(
            Code.PERMISSION_DENIED,
            f"{person.name} may not call {method}: it needs one of the roles {needed}; held: {held}",
        )
    if rule.mfa and not person.mfa:
        raise FedmeshError(
            Code.PERMISSION_DENIED, f"{method} needs a sign-in with a second factor: sign in again with one"
        )
