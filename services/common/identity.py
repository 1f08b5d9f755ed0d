"""Who a certificate says somebody is: SPIFFE-style URI subject alternative names."""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from services.common.errors import Code, FedmeshError


class Kind(StrEnum):
    HOSPITAL = "hospital"
    SERVICE = "service"
    OPERATOR = "operator"


_SPIFFE: Final = re.compile(
    r"^spiffe://(?P<consortium>[a-z0-9][a-z0-9.-]{0,251})/(?P<kind>hospital|service|operator)/"
    r"(?P<name>[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)$"
)


@dataclass(frozen=True)
class Identity:
    """A caller, taken from its verified certificate and from nowhere else."""

    consortium: str
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"spiffe://{self.consortium}/{self.kind.value}/{self.name}"


# Asked with every call, of the few that there are.
@lru_cache(maxsize=4096)
def parse_identity(uri: str) -> Identity:
    """Parse a URI SAN.

    Raises: FedmeshError(UNAUTHENTICATED) when it is not a fedmesh identity.
    """
    match = _SPIFFE.fullmatch(uri)
    if match is None:
        raise FedmeshError(Code.UNAUTHENTICATED, "the certificate's URI name is not a fedmesh identity")
    return Identity(match["consortium"], Kind(match["kind"]), match["name"])


def require_hospital(caller: Identity, hospital_id: str) -> None:
    """A hospital may only speak for itself.

    Raises: FedmeshError(PERMISSION_DENIED).
    """
    if caller.kind is Kind.HOSPITAL and caller.name != hospital_id:
        raise FedmeshError(
            Code.PERMISSION_DENIED, f"hospital {caller.name} cannot act for another hospital", named=hospital_id
        )
