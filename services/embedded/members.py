"""A consortium's members on one machine: their keys, the founding roster that all of them sign, its publication.

In a real consortium each hospital makes its own keys and signs by itself: see `fedmesh hospital`, `fedmesh roster`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.embedded.processes import write_private
from services.secure_sum.roster import MemberKeys, found, load_roster_file, save_roster_file, sign_roster

KEYS_NAME: Final = "member.keys"
ROSTER_NAME: Final = "roster.json"
_PATIENCE_S: Final = 30.0


@dataclass(frozen=True)
class Founding:
    """A founding roster with its signatures."""

    statement: bytes
    signatures: dict[str, bytes]


def found_roster(homes: Path, path: Path, consortium: str, hospital_ids: Sequence[str]) -> Founding:
    """Make what is missing: keys in every hospital's own folder, the roster in `path`, and a copy of it at each.

    Raises: FedmeshError(CONFIG_INVALID) when a roster of other hospitals was founded here before.
    """
    keys = [_member_keys(homes / name / KEYS_NAME, name) for name in hospital_ids]
    if not path.exists():
        statement = found(consortium, [member.public() for member in keys])
        save_roster_file(path, statement, {member.hospital_id: sign_roster(statement, member) for member in keys})
    roster = load_roster_file(path)
    if set(roster.ids) != set(hospital_ids):
        raise FedmeshError(
            Code.CONFIG_INVALID, f"{path} is the founding roster of {', '.join(roster.ids)}: use another folder"
        )
    for name in hospital_ids:
        write_private(homes / name / ROSTER_NAME, path.read_text(encoding="ascii"))
    return _read(path)


async def publish(founding: Founding, target: str, operator: TlsConfig) -> None:
    """Register the members, which the registry must know, and bring the roster. Harmless when that was done.

    Raises: FedmeshError as the registry does.
    """
    async with MeshChannel(target, operator) as channel:
        registry = channel.stub(registry_pb2_grpc.RegistryServiceStub)
        for name in sorted(founding.signatures):
            request = registry_pb2.RegisterHospitalRequest(request_id=new_id(), hospital_id=name, display_name=name)
            try:
                await call(registry.RegisterHospital, request, patience_s=_PATIENCE_S)
            except FedmeshError as error:
                if error.code is not Code.ALREADY_EXISTS:
                    raise
        published = registry_pb2.PublishRosterRequest(
            request_id=new_id(),
            statement=founding.statement,
            signatures=[
                round_pb2.Signature(hospital_id=name, signature=signature)
                for name, signature in founding.signatures.items()
            ],
        )
        await call(registry.PublishRoster, published, patience_s=_PATIENCE_S)


def _member_keys(path: Path, hospital_id: str) -> MemberKeys:
    if not path.exists():
        MemberKeys.generate(hospital_id).save(path)
    return MemberKeys.load(path)


def _read(path: Path) -> Founding:
    document = json.loads(path.read_text(encoding="ascii"))
    signatures = {item["hospital_id"]: bytes.fromhex(item["signature"]) for item in document["signatures"]}
    return Founding(document["statement"].encode("ascii"), signatures)
