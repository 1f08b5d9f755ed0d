"""How often strangers may knock."""

import pytest
from fedmesh.registry.v1 import enrolment_pb2

from services.common.errors import Code, FedmeshError
from services.common.grpc.access import load_policy, load_stranger_methods
from services.common.grpc.strangers import Rate, StrangersConfig


class Seconds:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def taken(rate: Rate, address: str, tries: int) -> int:
    """How many of some tries are let in."""
    codes = [_code(rate, address) for _ in range(tries)]
    assert set(codes) <= {None, Code.RATE_LIMITED}
    return codes.count(None)


def _code(rate: Rate, address: str) -> Code | None:
    try:
        rate.take(address)
    except FedmeshError as error:
        return error.code
    return None


def test_each_address_has_its_own_rate_and_all_share_one() -> None:
    seconds = Seconds()
    rate = Rate(StrangersConfig(listen="127.0.0.1:1", per_minute=6, burst=3, all_per_minute=10), seconds)
    assert taken(rate, "a", 100) == 3
    assert taken(rate, "b", 100) == 3, "whoever is over its rate takes nothing from the others"
    assert taken(rate, "c", 100) + taken(rate, "d", 100) == 4
    seconds.now = 10.0
    assert taken(rate, "a", 100) == 1
    seconds.now = 3600.0
    assert taken(rate, "a", 100) == 3


def test_many_addresses_take_no_more_memory_than_some() -> None:
    rate = Rate(StrangersConfig(listen="127.0.0.1:1"), Seconds())
    for number in range(10_000):
        taken(rate, f"10.0.{number // 256}.{number % 256}", 1)
    assert len(rate.addresses) <= 4096


def test_what_is_for_strangers_is_never_served_beside_the_rest() -> None:
    services = enrolment_pb2.DESCRIPTOR.services_by_name
    assert load_stranger_methods(services["EnrolmentService"]) == {"/fedmesh.registry.v1.EnrolmentService/Enrol"}
    with pytest.raises(FedmeshError, match="Enrol"):
        load_policy([services["EnrolmentService"]])
    with pytest.raises(FedmeshError, match="not for strangers"):
        load_stranger_methods(services["CredentialService"])
