"""Fixtures of the registry's integration tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.transparency.checkpoint import generate_key
from tests.integration.registry.consortium import Consortium, running_consortium, save_founding_roster
from tests.integration.registry.harness import CONSORTIUM, Registry, running_registry
from tests.support.stores import PostgresDatabase


@pytest.fixture
async def registry(postgres: PostgresDatabase, tmp_path: Path) -> AsyncIterator[Registry]:
    """A registry on an empty database."""
    async with running_registry(postgres, tmp_path) as running:
        yield running


@pytest.fixture
async def consortium(postgres: PostgresDatabase, tmp_path: Path) -> AsyncIterator[Consortium]:
    """A registry and an audit log on an empty database, and the founding roster that witnesses."""
    save_founding_roster(tmp_path / "roster.json")
    generate_key(tmp_path / "log.key", f"{CONSORTIUM}/audit")
    async with running_consortium(postgres, tmp_path) as running:
        yield running
