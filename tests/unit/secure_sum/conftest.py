"""One attempt of seven members (t = 5, f = 2) at every stage. Hospital 7 shares and then leaves."""

import pytest

from tests.support.secure_sum import Consortium, names


@pytest.fixture(scope="session")
def _attempt() -> dict[str, Consortium]:
    consortium, group = Consortium.of(7), names(7)
    stages = {}
    consortium.begin(group)
    stages["begun"] = consortium.copy()
    consortium.share()
    stages["shared"] = consortium.copy()
    consortium.receive(group)
    stages["received"] = consortium.copy()
    consortium.upload(group[:6])
    stages["uploaded"] = consortium.copy()
    confirmations = consortium.confirm()
    stages["confirmed"] = consortium.copy()
    consortium.reveal(group[:6], confirmations)
    stages["revealed"] = consortium
    return stages


@pytest.fixture
def begun(_attempt: dict[str, Consortium]) -> Consortium:
    """Everybody advertised."""
    return _attempt["begun"].copy()


@pytest.fixture
def shared(_attempt: dict[str, Consortium]) -> Consortium:
    """Everybody dealt shares."""
    return _attempt["shared"].copy()


@pytest.fixture
def received(_attempt: dict[str, Consortium]) -> Consortium:
    """Everybody took its shares."""
    return _attempt["received"].copy()


@pytest.fixture
def uploaded(_attempt: dict[str, Consortium]) -> Consortium:
    """Six uploaded."""
    return _attempt["uploaded"].copy()


@pytest.fixture
def confirmed(_attempt: dict[str, Consortium]) -> Consortium:
    """Six signed the list of survivors."""
    return _attempt["confirmed"].copy()


@pytest.fixture
def revealed(_attempt: dict[str, Consortium]) -> Consortium:
    """Six revealed."""
    return _attempt["revealed"].copy()
