"""How many calls one caller may have in flight and begin, and what each bound leaves to others."""

from contextlib import ExitStack

import pytest

from services.common.config import LimitsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.admission import Admission
from services.common.grpc.buckets import Buckets
from services.common.identity import Identity, parse_identity


class Seconds:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def identity(name: str) -> Identity:
    return parse_identity(f"spiffe://consortium.test/{name}")


NORTH, SOUTH, SERVICE = (identity(name) for name in ("hospital/north", "hospital/south", "service/registry"))


def let_in(admission: Admission, caller: Identity, tries: int) -> int:
    """How many of some calls, one after the other, are let in; the others are told to come again."""
    codes = [_code(admission, caller) for _ in range(tries)]
    assert set(codes) <= {None, Code.RATE_LIMITED}
    return codes.count(None)


def _code(admission: Admission, caller: Identity) -> Code | None:
    try:
        with admission.entered(caller):
            return None
    except FedmeshError as error:
        return error.code


def test_each_caller_has_its_own_rate_and_services_have_none() -> None:
    seconds = Seconds()
    admission = Admission(LimitsConfig(calls_per_s_of_one=8, burst_of_one=5), seconds)
    assert let_in(admission, NORTH, 100) == 5
    assert let_in(admission, SOUTH, 100) == 5
    assert let_in(admission, SERVICE, 1000) == 1000
    # Refused calls cost nothing: whoever goes on too fast gets its rate all the same.
    taken = 0
    for step in range(1, 129):
        seconds.now = step / 128
        taken += let_in(admission, NORTH, 50)
    assert taken == 8
    seconds.now = 3600.0
    assert let_in(admission, NORTH, 100) == 5


def test_a_call_refused_for_those_in_flight_costs_no_token() -> None:
    admission = Admission(LimitsConfig(calls=2, calls_of_one=1, calls_per_s_of_one=1, burst_of_one=2), Seconds())
    with admission.entered(NORTH):
        assert let_in(admission, NORTH, 10) == 0
        with admission.entered(SOUTH), pytest.raises(FedmeshError) as caught, admission.entered(SERVICE):
            pass
        assert caught.value.code is Code.SERVICE_UNAVAILABLE
    assert let_in(admission, NORTH, 10) == 1


def test_defaults_are_far_above_what_a_hospital_does() -> None:
    seconds = Seconds()
    admission = Admission(LimitsConfig(), seconds)
    with ExitStack() as calls:
        for _ in range(100):
            calls.enter_context(admission.entered(NORTH))
    for second in range(600):
        seconds.now = float(second)
        assert let_in(admission, NORTH, 200) == 200


def test_many_callers_take_no_more_memory_than_some() -> None:
    buckets: Buckets[int] = Buckets(1.0, 1.0, Seconds())
    assert all(buckets.take(number) for number in range(10_000))
    assert len(buckets) <= 4096
