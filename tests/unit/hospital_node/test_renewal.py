"""When a node renews its certificate, and what it does when it is refused."""

import asyncio
from datetime import datetime, timedelta

import pytest
from cryptography import x509

from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.embedded.ca import create_ca
from services.hospital_node.usecases.renewal import Renewal

DAYS = timedelta(days=7)


class Folder:
    """A folder of credentials that is in memory."""

    def __init__(self, certificate: x509.Certificate, clock: FakeClock) -> None:
        self.certificate = certificate
        self.clock = clock
        self.since = clock.now()
        self.requests = 0
        self.waiting = b""

    def present(self) -> tuple[datetime, datetime]:
        return self.since, self.since + DAYS

    def request(self, hospital_id: str) -> bytes:
        if not self.waiting:
            self.requests += 1
            self.waiting = f"{hospital_id} {self.requests}".encode()
        return self.waiting

    def forget_request(self) -> None:
        self.waiting = b""

    def install(self, certificate_pem: bytes, hospital_id: str) -> x509.Certificate:
        assert (certificate_pem, hospital_id) == (self.waiting + b" signed", "north")
        self.since = self.clock.now()
        self.forget_request()
        return self.certificate


class Registry:
    """Signs, or raises what it was told once."""

    def __init__(self) -> None:
        self.errors: list[FedmeshError] = []
        self.asked: list[bytes] = []

    async def __call__(self, csr: bytes) -> bytes:
        self.asked.append(csr)
        if self.errors:
            raise self.errors.pop(0)
        return csr + b" signed"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def folder(clock: FakeClock, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(create_ca(tmp_path_factory.mktemp("ca") / "ca", "c.local").certificate, clock)


def test_it_is_due_before_two_thirds_of_the_time(folder: Folder, clock: FakeClock) -> None:
    renewal = Renewal("north", folder, Registry(), clock)
    assert renewal.wait_s(0.5) == DAYS.total_seconds() / 2
    clock.advance(DAYS.total_seconds() * 0.65)
    assert renewal.wait_s(0.65) == 0


def test_a_request_is_repeated_until_it_is_answered_or_hopeless(folder: Folder, clock: FakeClock) -> None:
    registry = Registry()
    renewal = Renewal("north", folder, registry, clock)
    registry.errors = [
        FedmeshError(Code.SERVICE_UNAVAILABLE, "away"),
        FedmeshError(Code.PERMISSION_DENIED, "suspended"),
        FedmeshError(Code.WRONG_STATE, "this key has a certificate already"),
    ]
    for _ in range(3):
        with pytest.raises(FedmeshError):
            asyncio.run(renewal.renew())
    asyncio.run(renewal.renew())
    assert registry.asked == [b"north 1"] * 3 + [b"north 2"]
    asyncio.run(renewal.renew())
    assert registry.asked[-1] == b"north 3", "each certificate has a key of its own"


def test_pauses_grow_and_shrink_towards_the_end(folder: Folder, clock: FakeClock) -> None:
    renewal = Renewal("north", folder, Registry(), clock)
    assert [renewal.pause_s(failures) for failures in (1, 2, 3, 99)] == [30, 60, 120, 600]
    clock.advance(DAYS.total_seconds() - 1000)
    assert renewal.pause_s(99) == 50
    clock.advance(2000)
    assert renewal.pause_s(99) == 10


def test_the_loop_renews_when_it_is_due_and_goes_on_after_errors(
    folder: Folder, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    registry.errors = [FedmeshError(Code.SERVICE_UNAVAILABLE, "away")]
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.advance(seconds)
        if len(registry.asked) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr("services.hospital_node.usecases.renewal.asyncio.sleep", sleep)
    began = clock.now()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Renewal("north", folder, registry, clock).keep())
    assert registry.asked == [b"north 1", b"north 1", b"north 2"]
    assert max(slept) <= 600
    assert DAYS < clock.now() - began < 1.4 * DAYS
