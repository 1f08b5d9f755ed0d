"""A server with small limits."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.overloaded import Setup


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.audit.release.set()
    for server in made.stopping:
        await server.stop()


@pytest.fixture
async def served(setup: Setup) -> Setup:
    await setup.start()
    return setup
